"""Masks as COCO's files write them: polygons, and run-length encodings."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pycocotools.mask

from detr.annotations import AnnotationReader, is_missing
from detr.errors import UserError, brief

_POINTS = 6  # numbers of the three points that a polygon has at least
_FAR = 10  # times the side of an image, beyond which there is no sensible point
_WANTED = "wanted polygons [[x1, y1, x2, y2, x3, y3, ...], ...] or a run-length encoding"


def encoded(value: Any, size: tuple[int, int], reader: AnnotationReader, place: str) -> bytes | None:
    """An object's `segmentation` as one compressed run-length encoding; None, which is counted, where it has none.

    Polygons of fewer than three points are left out, and counted. size: (height, width) of the image.
    Raises UserError for what is no mask of such an image.
    """
    if is_missing(value) or value in ([], {}):
        reader.accept("objects without a mask, which are left out", place)
        return None
    found: bytes | None
    if isinstance(value, dict):
        found = _of_runs(value, size, reader, place)
    elif isinstance(value, list):
        found = _of_polygons(value, size, reader, place)
    else:
        raise UserError(f"{reader.source}: {place} has the segmentation {brief(value)}, {_WANTED}.")
    if found is None or pycocotools.mask.area({"size": list(size), "counts": found}) == 0:
        reader.accept("objects whose masks have no pixel, which are left out", place)
        return None
    return found


def no_masks(source: Path, count: int) -> UserError:
    """Where not one of so many objects has a mask."""
    return UserError(
        f"{source}: not one of its {count} objects has a mask, which model.masks is to learn. Export the data set with "
        "masks or polygons, or set model/masks=none."
    )


def _of_polygons(value: list[Any], size: tuple[int, int], reader: AnnotationReader, place: str) -> bytes | None:
    if all(isinstance(number, int | float) for number in value):
        reader.accept("polygons that are not in a list of polygons", place)
        value = [value]
    height, width = size
    polygons = []
    for polygon in value:
        numbers = [reader.number(number, place, "segmentation") for number in polygon] if _is_list(polygon) else [None]
        known = [number for number in numbers if number is not None and math.isfinite(number)]
        if len(known) < len(numbers) or len(known) % 2:
            raise UserError(f"{reader.source}: {place} has the polygon {brief(polygon)}, {_WANTED}, all of numbers.")
        if any(abs(x) > _FAR * width for x in known[::2]) or any(abs(y) > _FAR * height for y in known[1::2]):
            raise UserError(
                f"{reader.source}: {place} has a polygon that reaches to {brief(max(known, key=abs))}, far out of its "
                f"image of {width} x {height} pixels. Give points in pixels."
            )
        if len(known) < _POINTS:
            reader.accept("polygons of fewer than three points, which are left out", place)
        else:
            polygons.append(known)
    if not polygons:
        return None
    return pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, height, width))["counts"]


def _of_runs(value: dict[str, Any], size: tuple[int, int], reader: AnnotationReader, place: str) -> bytes:
    height, width = size
    if value.get("size") != [height, width]:
        raise UserError(
            f"{reader.source}: {place} has a mask of the size {brief(value.get('size'))}, wanted that of its image, "
            f"[height, width] = [{height}, {width}]."
        )
    counts = value.get("counts")
    runs: Any = list(_runs(counts)) if isinstance(counts, str) else counts
    whole = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs) != height * width:
        raise UserError(
            f"{reader.source}: {place} has a run-length encoding {brief(counts)} that is damaged, wanted runs of "
            f"{height * width} pixels in all."
        )
    return pycocotools.mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"]


def _runs(text: str) -> Iterator[int]:
    """The runs of a compressed encoding, as COCO's tools write them; -1 where it is damaged, which they do not see.

    Each is in groups of 5 bits, of which a sixth says whether more follow. From the third on, it is a difference from
    the one before the last.
    """
    before: Sequence[int] = ()
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            yield -1
            return
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(before) == 3:
            value += before[-2]
        before = (*before[-2:], value)
        yield value
        value, shift = 0, 0
    if shift:
        yield -1


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0
