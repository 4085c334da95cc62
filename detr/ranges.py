"""Ranges of options: written beside the fields that they limit, checked by whoever fills these in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from math import inf
from typing import Any

from detr.errors import UserError

_KEY = "range"  # in a field's metadata


@dataclass(frozen=True)
class Range:
    """The values that an option may have, beside None.

    wanted: completes the message "wanted ...". former: names of values that have others now.
    """

    wanted: str
    fits: Callable[[Any], bool]
    former: Mapping[str, str] = field(default_factory=dict)

    def check(self, value: Any, path: str) -> None:
        """Raise UserError for a value outside, of the option at this path."""
        if value is not None and not self.fits(value):
            got = f"'{value}'" if isinstance(value, str) else value
            renamed = (
                f" '{value}' is replaced: write '{self.former[value]}'."
                if got != value and value in self.former
                else ""
            )
            raise UserError(f"{path}: wanted {self.wanted}, got {got}.{renamed}")


def at_least(least: int | float, *, default: Any, most: int | float = inf, below: int | float = inf) -> Any:
    """A dataclass field for a number of at least `least`, and of at most `most`, or below `below`."""
    wanted = f"at least {least}"
    wanted += f" and at most {most}" if most < inf else f" and below {below}" if below < inf else ""
    return field(
        default=default, metadata={_KEY: Range(wanted, lambda value: least <= value <= most and value < below)}
    )


def each_from(least: int, most: int) -> dict[str, Range]:
    """Metadata of a dataclass field for a list, not an empty one, of numbers from `least` to `most`."""
    wanted = f"one or several numbers from {least} to {most}"
    return {_KEY: Range(wanted, lambda values: len(values) > 0 and all(least <= value <= most for value in values))}


def number_or_text(least: int, most: int, texts: str) -> dict[str, Range]:
    """Metadata of a dataclass field for a number from `least` to `most` or a text. texts: which ones, for messages."""
    wanted = f"at least {least} and at most {most}, or {texts}"
    return {_KEY: Range(wanted, lambda value: isinstance(value, str) or least <= value <= most)}


def one_of(*choices: str, default: str, former: Mapping[str, str] | None = None) -> Any:
    """A dataclass field for one of a few names. former: earlier names, each with the one to write instead."""
    limits = Range(" or ".join(choices), lambda value: value in choices, former or {})
    return field(default=default, metadata={_KEY: limits})


def checked(value: Any, name: str, wanted: str, fits: Callable[[Any], bool]) -> Any:
    """The value of a parameter; UserError where it does not fit. wanted: completes the message "wanted ..."."""
    Range(wanted, fits).check(value, name)
    return value


def non_negative(value: Any) -> bool:
    """Whether it is a number of at least 0, and finite."""
    return isinstance(value, int | float) and 0 <= value < inf


def check_ranges(options: Any, path: str = "") -> None:
    """Check the fields of a dataclass instance, and of those inside it, against their ranges.

    path: its place among the options, for messages. Raises UserError for the first value that is out of its range.
    """
    for one in fields(options):
        value, place = getattr(options, one.name), f"{path}.{one.name}".lstrip(".")
        if is_dataclass(value):
            check_ranges(value, place)
        if _KEY in one.metadata:
            one.metadata[_KEY].check(value, place)
