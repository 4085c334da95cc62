"""The values of COCO annotations, read in the same way for training and for evaluation.

Exports write many of them otherwise than COCO does. What has one meaning only is accepted, and counted.
"""

import logging
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detr.errors import UserError, brief

logger = logging.getLogger(__name__)
_FLAGS = {0: False, 1: True, "false": False, "true": True}
_WHOLE = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")
_FOUR_FLOATS = [float] * 4
_TEXT, _EMPTY, _DECIMAL = "numbers as text", "fields without a value", "whole numbers with decimals"

# Keys of an image in COCO's files, besides addresses; all others are attributes, such as its weather.
COCO_KEYS = frozenset({"id", "file_name", "height", "width", "license", "date_captured"})


class AnnotationReader:
    """Reads the values of one annotation file. `report` warns once of what is written otherwise than in COCO.

    source: of the annotations, for messages. The `place` of a value completes the message "... has the area 'x'".
    """

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self._accepted: dict[str, tuple[int, str]] = {}  # of each kind how many, and the first one

    def accept(self, kind: str, example: str) -> None:
        """Count something that was read although COCO writes it otherwise."""
        count, first = self._accepted.get(kind, (0, example))
        self._accepted[kind] = count + 1, first

    def report(self) -> None:
        """Warn of what was accepted, in one line."""
        if self._accepted:
            kinds = "; ".join(f"{count} {kind}, such as {first}" for kind, (count, first) in self._accepted.items())
            logger.warning(
                "%s writes some values otherwise than COCO does; they are read as meant: %s.", self.source, kinds
            )

    def whole(self, value: Any, place: str, name: str) -> int:
        """A whole number, such as an id. Raises UserError for anything else."""
        if type(value) is int:
            return value
        number = identity(value)
        if type(number) is not int:
            raise UserError(
                f"{self.source}: {place} has the {name} {brief(value)}, wanted a whole number. Correct it in the file."
            )
        self.accept(_TEXT if isinstance(value, str) else _DECIMAL, f"{name} {brief(value)} of {place}")
        return number

    def number(self, value: Any, place: str, name: str) -> float | None:
        """A number, which may be NaN or infinite; None where it is none."""
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                return None
            self.accept(_TEXT, f"{name} {brief(value)} of {place}")
            return number
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if abs(value) <= sys.float_info.max else math.nan  # JSON has whole numbers of any length

    def box(self, entry: Mapping[str, Any], place: str) -> tuple[float, ...]:
        """x, y, width, height of an object; NaN where it has no box at all. Raises UserError for what is no box."""
        box = entry.get("bbox")
        if is_missing(box) or box == []:
            self.accept("annotations without a bbox, which are left out", place)
            return (math.nan,) * 4
        values = [self.number(value, place, "bbox") for value in box] if isinstance(box, list | tuple) else []
        if len(values) != 4 or None in values:
            raise UserError(
                f"{self.source}: {place} has the bbox {brief(box)}, wanted [x, y, width, height] in pixels."
            )
        return tuple(value for value in values if value is not None)

    def area(self, entry: Mapping[str, Any], box: tuple[float, ...], place: str) -> float:
        """Of an object, in pixels; that of its box where the file has none. Raises UserError for what is no number."""
        value = entry.get("area")
        if is_missing(value):
            if "area" in entry:
                self.accept(_EMPTY, f"area {brief(value)} of {place}")
            return box[2] * box[3]
        area = self.number(value, place, "area")
        if area is None:
            raise UserError(
                f"{self.source}: {place} has the area {brief(value)}, wanted a number of pixels. Correct it, or leave "
                "it out."
            )
        if not math.isfinite(area):
            self.accept("areas that are infinite, and replaced by those of the boxes", place)
            return box[2] * box[3]
        return area

    def crowd(self, entry: Mapping[str, Any], place: str) -> bool:
        """Whether an object is a crowd; no where the file does not say. Raises UserError for what is neither."""
        value = entry.get("iscrowd", 0)
        if is_missing(value):
            self.accept(_EMPTY, f"iscrowd {brief(value)} of {place}")
            return False
        key = identity(value.strip().lower() if isinstance(value, str) else value)
        if isinstance(key, list | dict) or key not in _FLAGS:
            raise UserError(
                f"{self.source}: {place} has iscrowd {brief(value)}, wanted 0 or 1. Correct it, or leave it out."
            )
        if isinstance(value, str):
            self.accept(_TEXT, f"iscrowd {brief(value)} of {place}")
        return _FLAGS[key]


def is_plain(entry: Mapping[str, Any]) -> bool:
    """Whether an annotation is written as COCO does, as nearly all are: there is nothing to read otherwise."""
    box, area, crowd = entry.get("bbox"), entry.get("area"), entry.get("iscrowd")
    return (
        type(box) is list
        and [type(value) for value in box] == _FOUR_FLOATS
        and type(area) is float
        and 0 <= area < math.inf
        and type(crowd) is int
        and crowd in (0, 1)
        and type(entry.get("image_id")) is int
        and type(entry.get("category_id")) is int
    )


def identity(value: Any) -> Any:
    """An id as a whole number where it is one, as text or with decimals too; otherwise as it is."""
    if type(value) is int:
        return value
    if isinstance(value, str):
        return int(value.partition(".")[0]) if _WHOLE.fullmatch(value) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_missing(value: Any) -> bool:
    """Whether a field has no value: null, blank text, or NaN, which table programs write for an empty cell."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))
