"""Masks as COCO's files write them: polygons, and run-length encodings."""

from pathlib import Path
from typing import Any

from detr.annotations import AnnotationReader, is_missing
from detr.errors import UserError
from detr.masks import Masks, encode_segmentation

_POINTS = 6  # numbers of the three points that a polygon has at least


def encoded(value: Any, size: tuple[int, int], reader: AnnotationReader, place: str) -> bytes | None:
    """An object's `segmentation` as one compressed run-length encoding; None, which is counted, where it has none.

    Polygons of fewer than three points are left out, and counted. size: (height, width) of the image.
    Raises UserError for what is no mask of such an image.
    """
    if is_missing(value) or value in ([], {}):
        reader.accept("objects without a mask, which are left out", place)
        return None
    if isinstance(value, list):
        value = _polygons(value, reader, place)
    try:
        found = encode_segmentation(value, size) if value else None
    except ValueError as error:
        raise UserError(
            f"{reader.source}: {place} has a damaged segmentation: {error}. Correct it, or remove the annotation."
        ) from None
    if found is None or Masks(size=size, counts=(found,)).areas()[0] == 0:
        reader.accept("objects whose masks have no pixel, which are left out", place)
        return None
    return found


def _polygons(value: list[Any], reader: AnnotationReader, place: str) -> list[Any]:
    """Those of three points and more, of numbers where these are texts."""
    if all(isinstance(number, int | float) for number in value):
        reader.accept("polygons that are not in a list of polygons", place)
        value = [value]
    polygons = []
    for polygon in value:
        if isinstance(polygon, list):
            numbers = [reader.number(number, place, "segmentation") for number in polygon]
            if len(numbers) < _POINTS and len(numbers) % 2 == 0:
                reader.accept("polygons of fewer than three points, which are left out", place)
            else:
                polygons.append(polygon if None in numbers else numbers)
        else:
            polygons.append(polygon)
    return polygons


def no_masks(source: Path, count: int) -> UserError:
    """Where not one of so many objects has a mask."""
    return UserError(
        f"{source}: not one of its {count} objects has a mask, which model.masks is to learn. Export the data set with "
        "masks or polygons, or set model/masks=none."
    )
