"""Masks of the objects in one image as run-length encodings, the form that COCO's files and metrics have."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from detr.errors import brief


@dataclass(frozen=True)
class Masks:
    """n masks of one size. An encoding takes some hundred bytes, where the pixels of a photograph take megabytes.

    size: (height, width) in pixels. counts: of each mask, in COCO's compressed form.
    """

    size: tuple[int, int]
    counts: tuple[bytes, ...]

    @classmethod
    def encode(cls, masks: Bool[Tensor, "n height width"]) -> "Masks":
        height, width = masks.shape[1:]
        pixels = masks.cpu().to(torch.uint8).numpy()
        counts = tuple(pycocotools.mask.encode(np.asfortranarray(mask))["counts"] for mask in pixels)
        return cls(size=(height, width), counts=counts)

    def decode(self) -> Bool[Tensor, "n height width"]:
        if not self.counts:
            return torch.zeros((0, *self.size), dtype=torch.bool)
        return torch.from_numpy(np.asarray(pycocotools.mask.decode(self._encoded()))).permute(2, 0, 1).bool()

    def __len__(self) -> int:
        return len(self.counts)

    def select(self, chosen: Sequence[int] | Int64[Tensor, " chosen"] | Int64[np.ndarray, " chosen"]) -> "Masks":
        """Some of them, by index."""
        numbers = chosen if isinstance(chosen, Sequence) else chosen.tolist()
        return Masks(size=self.size, counts=tuple(self.counts[number] for number in numbers))

    def resized(self, size: tuple[int, int]) -> "Masks":
        """The same in an image of another (height, width), by its nearest pixels."""
        pixels = (F.interpolate(mask[None, None].byte(), size=size)[0].bool() for mask in self.decode())
        return Masks(size=size, counts=tuple(count for one in pixels for count in Masks.encode(one).counts))

    def areas(self) -> Float64[np.ndarray, " n"]:
        """In pixels."""
        # One by one: of a list pycocotools wants at most 255.
        return np.array([pycocotools.mask.area(mask) for mask in self._encoded()], dtype=np.float64)

    def ious(self, other: "Masks") -> Float64[np.ndarray, " n"]:
        """Intersection over union of each with the same one of others, which are as many; 1 where both are empty."""
        pairs = zip(self._encoded(), other._encoded(), strict=True)
        found = [(pycocotools.mask.iou([a], [b], [False])[0, 0], pycocotools.mask.area([a, b]).sum()) for a, b in pairs]
        return np.array([iou if area else 1.0 for iou, area in found], dtype=np.float64)

    def rows(self) -> list[dict[str, Any]]:
        """Each as COCO's files have it: {"size": [height, width], "counts": text}."""
        return [{"size": list(self.size), "counts": counts.decode()} for counts in self.counts]

    def _encoded(self) -> list[dict[str, Any]]:
        return [{"size": list(self.size), "counts": counts} for counts in self.counts]


def encode_segmentation(segmentation: Any, size: tuple[int, int]) -> bytes:
    """One mask as COCO's files have it, in COCO's compressed form.

    segmentation: polygons [[x1, y1, x2, y2, ...], ...], or {"size": [height, width], "counts"} with run lengths or with
    text. size: (height, width) of the image. Raises ValueError, which says what is wrong, for anything else.
    """
    if isinstance(segmentation, dict):
        return _checked_runs(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"wanted polygons or a run-length encoding, got {brief(segmentation)}")
    for polygon in segmentation:
        _check_polygon(polygon, size)
    parts = pycocotools.mask.frPyObjects(segmentation, *size)
    return pycocotools.mask.merge(parts)["counts"]


def _check_polygon(polygon: Any, size: tuple[int, int]) -> None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"wanted polygons of at least three points x, y, got {brief(polygon)}")
    reach = 2 * max(size)  # rasterizing takes memory for each pixel of an edge, outside the image too
    if not all(type(value) in (int, float) and abs(value) <= reach for value in polygon):  # nor NaN
        raise ValueError(f"wanted polygons in pixels of the image {size[1]} x {size[0]}, got {brief(polygon)}")


def _checked_runs(encoding: dict[str, Any], size: tuple[int, int]) -> bytes:
    if encoding.get("size") != list(size):
        raise ValueError(f"wanted the size {list(size)} of the image, got {brief(encoding.get('size'))}")
    counts = encoding.get("counts")
    if isinstance(counts, list):
        if not all(type(run) is int for run in counts):
            raise ValueError(f"wanted whole numbers as counts, got {brief(counts)}")
        runs = np.array(counts, dtype=object)
    elif isinstance(counts, str) and counts.isascii():
        runs = _runs(counts.encode())
    else:
        raise ValueError(f"wanted counts as a list or as text, got {brief(counts)}")
    if (runs < 0).any() or runs.sum() != math.prod(size):
        raise ValueError(f"wanted counts of {math.prod(size)} pixels, got damaged ones, {brief(counts)}")
    if isinstance(counts, str):
        return counts.encode()
    return pycocotools.mask.frPyObjects(encoding, *size)["counts"]


def _runs(counts: bytes) -> Int64[np.ndarray, " runs"]:
    """The run lengths in COCO's compressed form: five bits a character, and from the fourth run on differences from the
    run before the last. pycocotools checks nothing of it, and reads beyond the end of what was cut short."""
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    ends = (codes & 32 == 0).nonzero()[0]
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    whole = len(ends) and ends[-1] == len(codes) - 1 and lengths.max() <= 7
    if not whole or codes.min() < 0 or codes.max() > 63:
        raise ValueError(f"wanted compressed counts, got {brief(counts)}")
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * places, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs
