"""What looks wrong in the annotations of any format, without being an error of it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from datasets.findings import Finding, some
from datasets.records import Records
from detr.errors import brief
from detr.types import Category

# Kinds of findings after which no size of a box means anything.
UNITS = ("relative boxes", "boxes given as corners", "boxes given as centers", "boxes of smaller images")
_MOST = 0.95  # of the boxes: a few may be wrong beside
_SOME = 0.1  # more than are wrong by chance
_ENOUGH = 20  # boxes that say something together
_ROUNDED = 0.51  # pixels that rounding moves an edge
_SHOWN = 1000  # objects among which a few files are looked for
_NEIGHBORS = 4  # in the order of their left edges, among which a copy is looked for


class _Objects:
    """All objects of a set. place: of their image among the records. sides: (width, height) of their image."""

    def __init__(self, records: Records) -> None:
        self.records, self.place = records, records.places
        self.boxes, self.labels, self.crowds = records.boxes, records.labels, records.crowds
        self.areas = records.arrays["areas"]
        self.sides = records.sizes[self.place, ::-1].astype(np.float64)

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, chosen: np.ndarray) -> str:
        """The first of the chosen objects, in words."""
        index = int(chosen.argmax())
        box = ", ".join(f"{value:g}" for value in self.boxes[index])
        width, height = self.sides[index]
        return f"[{box}] in image {self.records[self.place[index]].id} of {width:g}x{height:g} pixels"

    def finding(self, kind: str, chosen: np.ndarray, text: str, advice: str) -> Finding:
        """Of the chosen objects. text: with {share} and {example} for these."""
        places = self.place[chosen][:_SHOWN].tolist()
        return Finding(
            kind=kind,
            severity="warning",
            count=int(chosen.sum()),
            text=text.format(share=f"{int(chosen.sum())} of {len(chosen)}", example=self.example(chosen)),
            advice=advice,
            files=some(map(self.records.file_name, places)),
        )


def annotation_findings(records: Records, categories: Sequence[Category]) -> list[Finding]:
    """One a kind. records: with the names that their files have."""
    found = [*_of_files(records), *_of_names(categories)]
    if len(records.labels):
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            objects = _Objects(records)
            units = list(_of_units(objects))
            found += [*units, *_of_copies(objects), *([] if units else _of_areas(objects))]
            found += [] if units else _of_extents(objects)
    return found


def _of_files(records: Records) -> Iterator[Finding]:
    counts = Counter(str(PurePosixPath(records.file_name(place))) for place in range(len(records)))
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        yield Finding(
            kind="file listed twice",
            severity="warning",
            count=len(repeated),
            text=f"{len(repeated)} files are listed as several images, such as {brief(repeated[0])}.",
            advice="Each is trained on and evaluated on several times, with a part of its objects or the same ones; "
            "list it once.",
            files=some(repeated),
        )


def _of_names(categories: Sequence[Category]) -> Iterator[Finding]:
    of_name: dict[str, list[str]] = {}
    for category in categories:
        of_name.setdefault(category.name.strip().casefold(), []).append(f"{category.id} {brief(category.name)}")
    repeated = [same for same in of_name.values() if len(same) > 1]
    if repeated:
        yield Finding(
            kind="class named twice",
            severity="warning",
            count=len(repeated),
            text=f"{len(repeated)} names belong to several categories, such as {' and '.join(repeated[0])}.",
            advice="These count as different classes; give them one id, or names of their own.",
        )


def _of_units(objects: _Objects) -> Iterator[Finding]:
    """Boxes that are no x, y, width, height in pixels."""
    near, extent = objects.boxes[:, :2], objects.boxes[:, 2:]
    far = near + extent
    relative = np.asarray((objects.boxes <= 1).all(1) & (extent > 0).all(1) & (objects.sides > 4).all(1))
    if relative.any():
        text = "{share} boxes are in [0, 1], such as {example}."
        yield objects.finding("relative boxes", relative, text, "Wanted pixels: multiply by width and height.")
    if relative.mean() >= _MOST:
        return
    beyond = (far > 1.05 * objects.sides).any(1)
    as_corners = (extent > near).all(1) & (extent <= objects.sides + 1).all(1)
    kinds = (
        ("corners", "[left, top, right, bottom]", as_corners, "subtract left and top"),
        (
            "centers",
            "[center x, center y, width, height]",
            (near - extent / 2 >= -1).all(1),
            "subtract half of width and height",
        ),
    )
    for kind, form, fits, remedy in kinds:
        if beyond.mean() >= _SOME and fits.mean() >= _MOST:
            text = f"the boxes look like {form}: as [x, y, width, height] {{share}} reach out of their image, such as "
            advice = f"Wanted [x, y, width, height]: {remedy}."
            yield objects.finding(f"boxes given as {kind}", beyond, text + "{example}.", advice)
            return
    moved = as_corners & ~np.isclose(extent.prod(1), objects.areas, rtol=0.02)
    as_areas = moved & np.isclose((extent - near).prod(1), objects.areas, rtol=0.02)
    if as_areas.mean() >= _SOME:
        yield objects.finding(
            "boxes given as corners",
            as_areas,
            "{share} boxes look like [left, top, right, bottom], because these fit their areas, such as {example}.",
            "Wanted [x, y, width, height]: subtract left and top.",
        )
        return
    inside = np.minimum(far, objects.sides) - np.maximum(near, 0)
    outside = (inside > 0).all(1) & (inside.prod(1) < 0.5 * extent.prod(1))
    if outside.any():
        yield objects.finding(
            "boxes far out",
            outside,
            "{share} boxes reach far out of their image, with more than half of their area, such as {example}.",
            "They are cut at its edges; see whether they are of another image or size.",
        )
    corner = (far < 0.5 * objects.sides).all(1)
    if len(objects) >= _ENOUGH and corner.mean() >= _MOST:
        yield objects.finding(
            "boxes of smaller images",
            corner,
            "{share} boxes are in the upper left quarter of their image, such as {example}.",
            "See whether they are in percent, or of smaller images.",
        )


def _of_copies(objects: _Objects) -> Iterator[Finding]:
    copies = _copies(np.column_stack((objects.place, objects.labels, objects.crowds)), objects.boxes)
    if copies.any():
        yield objects.finding(
            "repeated boxes",
            copies,
            "{share} objects are copies of another one, of the same class and box, such as {example}.",
            "Each copy counts as an object that has to be found; remove them.",
        )
        return
    copies = _copies(objects.place[:, None], objects.boxes)
    if copies.any():
        text = "{share} boxes are there under several classes, such as {example}."
        yield objects.finding("boxes of two classes", copies, text, "Each counts as an object of its own.")


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


def _of_areas(objects: _Objects) -> Iterator[Finding]:
    extent = objects.boxes[:, 2:]
    ratio = objects.areas / extent.prod(1)
    odd = ((ratio > 1.5) | (ratio < 0.01)) & (extent > 0).all(1) & ~objects.crowds
    if odd.mean() >= 0.1:
        area = f"{objects.areas[int(odd.argmax())]:g}"
        yield objects.finding(
            "areas of another unit",
            odd,
            f"{{share}} areas do not fit their boxes, such as {area} of {{example}}.",
            "They decide which objects count as small, medium and large; wanted pixels.",
        )


def _of_extents(objects: _Objects) -> Iterator[Finding]:
    """Boxes around the whole image, as labels of images become where a tool turns them into boxes."""
    near, far = objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]
    whole = (near <= 0).all(1) & (far >= objects.sides).all(1) & ~objects.crowds
    if len(objects) >= _ENOUGH and whole.mean() >= _SOME:
        yield objects.finding(
            "boxes around the image",
            whole,
            "{share} boxes cover their whole image, such as {example}.",
            "See whether they are labels of images instead of objects; if so, draw boxes.",
        )
