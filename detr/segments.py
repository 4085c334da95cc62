"""Panoptic segmentations: which segment each pixel of an image belongs to, and what the segments are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from detr.types import Category

VOID = 0  # of pixels that belong to no segment
_STEP = 0x9E3779  # 256^3 by the golden ratio


@dataclass(frozen=True)
class Segment:
    """One object, or all of a kind of stuff.

    label: the rank of its class in the categories. crowd: whether it holds objects that are not told apart.
    """

    id: int
    label: int
    crowd: bool = False


@dataclass(frozen=True, eq=False)
class Panoptic:
    """The segmentation of one image (Kirillov et al., CVPR 2019).

    ids: (H, W) the id of the segment of each pixel. `VOID` is none, except where a segment has this id.
    """

    ids: Int64[np.ndarray, "height width"]
    segments: tuple[Segment, ...]

    def numbered(self, labels: Mapping[int, int]) -> "Panoptic":
        """With other labels, and ids that COCO's files can have; segments of labels without one are void.

        Ids are multiples of an odd number, modulo 256^3: none comes twice, and in a picture their colors are far apart.
        """
        kept = [segment for segment in self.segments if segment.label in labels]
        numbers = [place * _STEP % 256**3 for place in range(1, len(kept) + 1)]
        ids = np.full_like(self.ids, VOID)
        for number, segment in zip(numbers, kept, strict=True):
            ids[self.ids == segment.id] = number
        pairs = zip(numbers, kept, strict=True)
        segments = tuple(Segment(number, labels[one.label], one.crowd) for number, one in pairs)
        return Panoptic(ids=ids, segments=segments)

    def rows(self, categories: Sequence[Category]) -> list[dict[str, Any]]:
        """The segments as COCO's files of results have them, with their areas in pixels. categories: by label."""
        counts = dict(zip(*(column.tolist() for column in np.unique(self.ids, return_counts=True)), strict=True))
        return [
            {
                "id": segment.id,
                "category_id": categories[segment.label].id,
                "isthing": categories[segment.label].is_thing,
                "area": counts.get(segment.id, 0),
            }
            for segment in self.segments
        ]


def ids_of_colors(colors: UInt8[np.ndarray, "height width 3"]) -> Int64[np.ndarray, "height width"]:
    """COCO's files of segments are pictures: id = red + 256 green + 256^2 blue."""
    return colors.astype(np.int64) @ np.array([1, 256, 256**2])


def colors_of_ids(ids: Int64[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """The inverse of `ids_of_colors`; ids are below 256^3."""
    return (ids[..., None] >> np.array([0, 8, 16]) & 255).astype(np.uint8)
