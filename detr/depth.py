"""Images of more than 8 bits a sample: which of their values is white, and whether little of that range is used."""

import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)
_BITS, _PHOTOMETRIC, _LEAST, _MOST, _SAMPLE_FORMAT, _SIGNED_LEAST, _SIGNED_MOST = 258, 262, 280, 281, 339, 340, 341
_SIGNED = 2  # a value of _SAMPLE_FORMAT
_USUAL_WHITES = (1.0, 255.0, 65535.0)  # of samples of 32 bits, whose kind does not say it; the first of floats alone
_OVERSHOOT = 1.01  # how far resizing leads beyond white
_LITTLE = 0.25  # of the range: 64 of 256 gray levels
_reported: set[tuple[Path, str]] = set()  # folders, each with what was said of it


@dataclass(frozen=True)
class Depth:
    """What a file says of its samples.

    bits: that each takes; None where that is not known. signed: whether they can be negative.
    black, white: the values that the file names. significant: bits that count, as PNG files name them.
    inverted: whether 0 is white.
    """

    bits: int | None = None
    signed: bool = False
    black: float = 0.0
    white: float | None = None
    significant: int | None = None
    inverted: bool = False


def depth_of(image: Image.Image) -> Depth:
    """What the file of an image says; nothing for an image that comes from none. Comes before its pixels are read."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return _depth_of_tiff(tags)
    if image.format == "PNG" and getattr(image, "fp", None) is not None:
        return _depth_of_png(image.fp)  # type: ignore[attr-defined]
    return Depth(bits=16) if image.mode.startswith("I;16") else Depth()


def to_8_bits(image: Image.Image, depth: Depth, name: str | Path) -> Image.Image:
    """An image of mode I, I;16 or F in gray, from black to white of its range. NaN becomes black.

    name: of its file, for warnings.
    """
    values = np.array(image, dtype=np.float32)
    usable = np.isfinite(values)
    most = float(values.max(initial=0.0, where=usable))
    white = _white(values, most, depth, image.mode == "F")
    black = depth.black if depth.black < white else 0.0
    if not usable.all():
        text = "%s has %d pixels that are NaN or infinite. NaN is read as black, infinity as white."
        _warn(Path(name).parent, text, name, int((~usable).sum()))
        np.nan_to_num(values, copy=False, nan=black, posinf=white, neginf=black)
    _warn_of_narrow_range(most, white, name)
    if white == most > _OVERSHOOT * _USUAL_WHITES[-1] and depth.white is None:
        text = (
            "%s: its greatest value, %g, is read as white, and most others may be black then. If it marks pixels "
            "without a value, make it NaN; if not, store what is white in the file (TIFF tag SMaxSampleValue)."
        )
        _warn(Path(name).parent, text, name, most)
    if values.min(initial=0.0) < black:
        _warn(Path(name).parent, "%s has values below %g, which are read as black.", name, black)
    values -= black
    values *= 255.0 / (white - black)
    values = values.round(out=values).clip(0, 255, out=values)
    return Image.fromarray((255 - values if depth.inverted else values).astype(np.uint8))


def colors_to_8_bits(image: Image.Image, depth: Depth, name: str | Path) -> Image.Image:
    """A color image of which Pillow has read the upper 8 of 16 bits, brightened where the file names another white."""
    most = float(np.array(image).max(initial=0))
    white = 255.0 if depth.white is None else min(depth.white / 257, 255.0)
    _warn_of_narrow_range(most, 255.0, name)
    if white == 255 or most > white + 1:
        return image
    return image.point(lambda value: min(round(value * 255 / white), 255))


def _white(values: np.ndarray, most: float, depth: Depth, floating: bool) -> float:
    if depth.white is not None and depth.white >= most:
        return depth.white
    if depth.significant is not None and _is_unshifted(values, most, depth.significant):
        return 2.0**depth.significant - 1
    if depth.bits is not None and depth.bits < 32:
        return 2.0 ** (depth.bits - depth.signed) - 1
    usual = (white for white in _USUAL_WHITES[not floating :] if most <= _OVERSHOOT * white)
    return next(usual, most if floating else 2.0 ** (32 - depth.signed) - 1)


def _is_unshifted(values: np.ndarray, most: float, significant: int) -> bool:
    """Whether samples of a PNG file are small, against its specification, which wants the bits that count on top."""
    return most < 2**significant and bool((values % 2 ** (16 - significant)).any())


def _depth_of_tiff(tags: Mapping[int, Any]) -> Depth:
    first = {tag: value[0] if isinstance(value, tuple) and value else value for tag, value in tags.items()}
    named = {tag: float(first[tag]) for tag in (_LEAST, _MOST, _SIGNED_LEAST, _SIGNED_MOST) if _is_number(first, tag)}
    white = named.get(_SIGNED_MOST, named.get(_MOST))
    bits = int(first[_BITS]) if _is_number(first, _BITS) else None
    return Depth(
        bits=bits,
        signed=first.get(_SAMPLE_FORMAT) == _SIGNED,
        black=min(named.get(_SIGNED_LEAST, 0.0), 0.0),  # the least value of this image alone may be above
        white=white if white else None,
        inverted=first.get(_PHOTOMETRIC) == 0,
    )


def _is_number(tags: Mapping[int, Any], tag: int) -> bool:
    value = tags.get(tag)
    return value is not None and not isinstance(value, str | bytes | tuple) and bool(np.isfinite(float(value)))


def _depth_of_png(file: BinaryIO) -> Depth:
    """From its first chunks: IHDR has the bits of a sample, sBIT those that count."""
    place = file.tell()
    try:
        file.seek(8)
        bits, significant = None, None
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IDAT":
                break
            if kind in (b"IHDR", b"sBIT"):
                content = file.read(length)
                bits = content[8] if kind == b"IHDR" else bits
                significant = max(content[:3], default=None) if kind == b"sBIT" else significant
            else:
                file.seek(length, 1)
            file.seek(4, 1)  # the check sum
    finally:
        file.seek(place)
    return Depth(bits=bits, significant=significant if significant and 8 < significant < 16 else None)


def _warn_of_narrow_range(most: float, white: float, name: str | Path) -> None:
    if 0 < most <= _LITTLE * white:
        text = (
            "%s: its values reach only %g of %g, so the image is dark and has few gray levels. If white is meant to be "
            "less, store that in the file (TIFF tag MaxSampleValue, PNG chunk sBIT), or scale the values."
        )
        _warn(Path(name).parent, text, name, most, white)


def _warn(folder: Path, text: str, *values: object) -> None:
    if get_worker_info() is None and _is_first(folder, text):  # the processes of a loader would repeat it
        logger.warning(text + " Further images of this folder are not reported.", *values)


def _is_first(folder: Path, text: str) -> bool:
    new = (folder, text) not in _reported
    _reported.add((folder, text))
    return new
