"""What looks wrong in the annotations of any format, without being an error of it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from datasets.formats.base import ImageRecord
from detr.errors import brief
from detr.types import Category

_MOST = 0.95  # of the boxes: a few may be wrong beside
_SOME = 0.1  # more than are wrong by chance
_ROUNDED = 0.51  # pixels that rounding moves an edge
_NEIGHBORS = 4  # in the order of their left edges, among which a copy is looked for


@dataclass(frozen=True)
class _Objects:
    """All objects of a set. place: of their image among the records."""

    records: Sequence[ImageRecord]
    place: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    sides: np.ndarray  # (width, height) of their image

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> "_Objects":
        counts = [len(record.labels) for record in records]
        sides = np.array([record.size[::-1] for record in records], dtype=np.float64).reshape(-1, 2)
        arrays = {
            name: np.concatenate([getattr(record, name) for record in records])
            for name in ("boxes", "labels", "areas", "crowds")
        }
        place = np.repeat(np.arange(len(records)), counts)
        return cls(records=records, place=place, sides=sides[place], **arrays)

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, chosen: np.ndarray) -> str:
        """The first of the chosen objects, in words."""
        index = int(chosen.argmax())
        box = ", ".join(f"{value:g}" for value in self.boxes[index])
        width, height = self.sides[index]
        return f"[{box}] in image {self.records[self.place[index]].id} of {width:g}x{height:g} pixels"


def annotation_warnings(records: Sequence[ImageRecord], categories: Sequence[Category]) -> list[str]:
    """One line a kind, with its count and an example. records: with the names that their files have."""
    found = [*_file_warnings(records), *_name_warnings(categories)]
    if any(len(record.labels) for record in records):
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            objects = _Objects.of(records)
            units = list(_unit_warnings(objects))
            found += [*units, *_copy_warnings(objects), *([] if units else _area_warnings(objects))]
    return found


def _file_warnings(records: Sequence[ImageRecord]) -> Iterator[str]:
    counts = Counter(str(PurePosixPath(record.file_name)) for record in records)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        yield (
            f"{len(repeated)} files are listed as several images, such as {brief(repeated[0])}. Each is trained on and "
            "evaluated on several times, with a part of its objects or the same ones; list it once."
        )


def _name_warnings(categories: Sequence[Category]) -> Iterator[str]:
    of_name: dict[str, list[str]] = {}
    for category in categories:
        of_name.setdefault(category.name.strip().casefold(), []).append(f"{category.id} {brief(category.name)}")
    repeated = [same for same in of_name.values() if len(same) > 1]
    if repeated:
        yield (
            f"{len(repeated)} names belong to several categories, such as {' and '.join(repeated[0])}. These count as "
            "different classes; give them one id, or names of their own."
        )


def _unit_warnings(objects: _Objects) -> Iterator[str]:
    """Boxes that are no x, y, width, height in pixels."""
    near, extent = objects.boxes[:, :2], objects.boxes[:, 2:]
    far = near + extent
    relative = np.asarray((objects.boxes <= 1).all(1) & (extent > 0).all(1) & (objects.sides > 4).all(1))
    if relative.any():
        yield (
            f"{_share(relative)} boxes are in [0, 1], such as {objects.example(relative)}. Wanted pixels: multiply by "
            "width and height."
        )
    if relative.mean() >= _MOST:
        return
    beyond = (far > 1.05 * objects.sides).any(1)
    as_corners = (extent > near).all(1) & (extent <= objects.sides + 1).all(1)
    kinds = (
        ("[left, top, right, bottom]", as_corners, "subtract left and top"),
        ("[center x, center y, width, height]", (near - extent / 2 >= -1).all(1), "subtract half of width and height"),
    )
    for kind, fits, remedy in kinds:
        if beyond.mean() >= _SOME and fits.mean() >= _MOST:
            yield (
                f"the boxes look like {kind}: as [x, y, width, height] {_share(beyond)} reach out of their image, "
                f"such as {objects.example(beyond)}. Wanted [x, y, width, height]: {remedy}."
            )
            return
    moved = as_corners & ~np.isclose(extent.prod(1), objects.areas, rtol=0.02)
    as_areas = moved & np.isclose((extent - near).prod(1), objects.areas, rtol=0.02)
    if as_areas.mean() >= _SOME:
        yield (
            f"{_share(as_areas)} boxes look like [left, top, right, bottom], because these fit their areas, such as "
            f"{objects.example(as_areas)}. Wanted [x, y, width, height]: subtract left and top."
        )
        return
    inside = np.minimum(far, objects.sides) - np.maximum(near, 0)
    outside = (inside > 0).all(1) & (inside.prod(1) < 0.5 * extent.prod(1))
    if outside.any():
        yield (
            f"{_share(outside)} boxes reach far out of their image, with more than half of their area, such as "
            f"{objects.example(outside)}. They are cut at its edges; see whether they are of another image or size."
        )
    if len(objects) >= 20 and (far < 0.5 * objects.sides).all(1).mean() >= _MOST:
        corner = (far < 0.5 * objects.sides).all(1)
        yield (
            f"{_share(corner)} boxes are in the upper left quarter of their image, such as {objects.example(corner)}. "
            "See whether they are in percent, or of smaller images."
        )


def _copy_warnings(objects: _Objects) -> Iterator[str]:
    for keys, text in (
        (
            (objects.place, objects.labels, objects.crowds),
            "objects are copies of another one, of the same class and box, such as {}. Each copy counts as an object "
            "that has to be found; remove them.",
        ),
        ((objects.place,), "boxes are there under several classes, such as {}. Each counts as an object of its own."),
    ):
        copies = _copies(np.column_stack(keys), objects.boxes)
        if copies.any():
            yield f"{_share(copies)} {text.format(objects.example(copies))}"
            return


def _copies(keys: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which boxes are those of an object before with the same keys, but for what rounding to whole pixels changes."""
    order = np.lexsort((*boxes.T[::-1], *keys.T[::-1]))
    keys, boxes = keys[order], boxes[order]
    copies = np.zeros(len(keys), dtype=bool)
    for distance in range(1, _NEIGHBORS + 1):  # boxes of nearly the same left edge need not follow one another
        same, other = boxes[distance:], boxes[:-distance]
        alike = np.abs(same - other).max(1, initial=0) <= np.minimum(_ROUNDED, same[:, 2:].min(1, initial=np.inf) / 20)
        copies[order[distance:]] |= (keys[distance:] == keys[:-distance]).all(1) & alike
    return copies


def _area_warnings(objects: _Objects) -> Iterator[str]:
    extent = objects.boxes[:, 2:]
    ratio = objects.areas / extent.prod(1)
    odd = ((ratio > 1.5) | (ratio < 0.01)) & (extent > 0).all(1) & ~objects.crowds
    if odd.mean() >= 0.1:
        index = int(odd.argmax())
        yield (
            f"{_share(odd)} areas do not fit their boxes, such as {objects.areas[index]:g} of {objects.example(odd)}. "
            "They decide which objects count as small, medium and large; wanted pixels."
        )


def _share(chosen: np.ndarray) -> str:
    return f"{int(chosen.sum())} of {len(chosen)}"
