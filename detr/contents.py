"""What files hold, checked before it is used: a schema is made of the functions here.

Each gives a check, which takes a value and its place in the file, and raises Misfit where the value is not as wanted.
"""

import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr.errors import UserError

Check = Callable[[Any, str], None]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_LARGEST = 2**53  # of whole numbers, which floats still tell apart
_DEEPEST, _MOST = 50, 10**6  # levels and values of what may hold anything


class Misfit(ValueError):
    """A value of a file that is not as wanted."""

    def __init__(self, place: str, wanted: str, value: Any) -> None:
        where = f" as {place.lstrip('.')}" if place else ""
        super().__init__(f"holds {_shown(value)}{where}, wanted {wanted}")


class Lacking(Misfit):
    """A part of a file that is not there."""

    def __init__(self, place: str) -> None:
        ValueError.__init__(self, f"lacks {place.lstrip('.')}")


def check_content(content: Any, schema: Check, source: object) -> None:
    """Raise UserError where the content of a file does not fit. source: the file, for the message."""
    try:
        schema(content, "")
    except Misfit as misfit:
        raise UserError(f"{source} {misfit}, so it is incomplete or damaged. Use an intact copy.") from None


def record(**parts: Check) -> Check:
    """A dict with these keys, each fitting its check. Further ones may be there."""

    def check(value: Any, place: str) -> None:
        _of_type(value, place, "a dict", dict)
        for name, part in parts.items():
            if name not in value:
                raise Lacking(f"{place}.{name}")
            part(value[name], f"{place}.{name}")

    return check


def mapping(part: Check) -> Check:
    """A dict of texts to values that all fit."""

    def check(value: Any, place: str) -> None:
        _of_type(value, place, "a dict", dict)
        for name, entry in value.items():
            _of_type(name, place, "texts as keys", str)
            part(entry, f"{place}.{name}")

    return check


def items(part: Check, *, count: int | None = None) -> Check:
    """A list or tuple of values that all fit. count: how many there must be."""

    def check(value: Any, place: str) -> None:
        _of_type(value, place, "a list", list, tuple)
        if count is not None and len(value) != count:
            raise Misfit(place, f"{count} entries", value)
        for index, entry in enumerate(value):
            part(entry, f"{place}[{index}]")

    return check


def maybe(part: Check) -> Check:
    """None, or what fits."""
    return lambda value, place: None if value is None else part(value, place)


def whole(least: int = 0, most: int = _LARGEST) -> Check:
    """A whole number within limits; True and False are none."""

    def check(value: Any, place: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise Misfit(place, f"a whole number from {least} to {most}", value)

    return check


def number(least: int | float = -math.inf, most: int | float = math.inf) -> Check:
    """A number within limits, not NaN."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not least <= value <= most:
            limits = "" if (least, most) == (-math.inf, math.inf) else f" from {least:g} to {most:g}"
            raise Misfit(place, f"a number{limits}", value)

    return check


def text(value: Any, place: str) -> None:
    _of_type(value, place, "text", str)


def flag(value: Any, place: str) -> None:
    _of_type(value, place, "true or false", bool)


def plain(value: Any, place: str) -> None:
    """Texts, numbers, and lists and dicts of these, as configurations hold them."""
    _walk(value, place, (str, int, float, bool, type(None)), "texts, numbers, lists and dicts")


def saved(value: Any, place: str) -> None:
    """Likewise, with tensors: what callbacks and optimizers keep."""
    _walk(value, place, (str, int, float, bool, type(None), Tensor, nn.Parameter), "plain values and tensors")


def tensor(
    *dtypes: torch.dtype, dims: int | None = None, shape: Sequence[int] | None = None, least: int | float | None = None
) -> Check:
    """An ordinary tensor in main memory, as large as it says, of one of these types of numbers.

    least: where given, all numbers are finite and none is below.
    """
    size = f" of shape {list(shape)}" if shape is not None else f" of {dims} dimensions" if dims is not None else ""
    limits = "" if least is None else f", finite and at least {least:g}"
    wanted = f"an ordinary tensor{size} of {' or '.join(map(str, dtypes))}{limits}"

    def check(value: Any, place: str) -> None:
        fits = type(value) in (Tensor, nn.Parameter) and _is_ordinary(value) and value.dtype in dtypes
        fits = fits and dims in (None, value.ndim) and (shape is None or list(shape) == list(value.shape))
        if not fits or (least is not None and not ((value >= least) & value.isfinite()).all()):
            raise Misfit(place, wanted, value)

    return check


state_dict = mapping(tensor(*FLOATS, *INTEGERS))


def refuse_non_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Raise UserError where weights are NaN or infinite. source: the file, for the message."""
    found = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if found:
        raise UserError(
            f"{source} holds weights that are NaN or infinite: {len(found)} of {len(state)} tensors, such as "
            f"{found[0]}. No detection can come of them. Use an earlier checkpoint or an intact copy."
        )


def _is_ordinary(tensor: Tensor) -> bool:
    """Not sparse, quantized, nested, without data, or expanded from fewer values than its shape promises."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _walk(value: Any, place: str, kinds: tuple[type, ...], wanted: str) -> None:
    """Without recursion, and with an end: lists in a file may hold themselves."""
    left, seen = [(value, place, 0)], 0
    while left:
        entry, at, depth = left.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST:
            raise Misfit(place, f"at most {_MOST} values in {_DEEPEST} levels", value)
        if isinstance(entry, dict):
            for key in entry:
                if type(key) not in (*kinds, tuple):
                    raise Misfit(at, f"{wanted} as keys", key)
            left += [(part, f"{at}.{key}", depth + 1) for key, part in entry.items()]
        elif type(entry) in (list, tuple):
            left += [(part, f"{at}[{index}]", depth + 1) for index, part in enumerate(entry)]
        elif type(entry) not in kinds or (isinstance(entry, Tensor) and not _is_ordinary(entry)):
            raise Misfit(at, wanted, entry)


def _of_type(value: Any, place: str, wanted: str, *kinds: type) -> None:
    if not isinstance(value, kinds):
        raise Misfit(place, wanted, value)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}, {value.layout} on {value.device.type}"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return "a huge number" if type(value) is int and abs(value) > 2**64 else reprlib.repr(value)


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The options of a configuration by dotted name, with their values as text."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
