"""Masks of the objects in one image as run-length encodings, the form that COCO's files and metrics have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64
from torch import Tensor


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
        return np.asarray(pycocotools.mask.area(self._encoded()), dtype=np.float64) if self.counts else np.zeros(0)

    def rows(self) -> list[dict[str, Any]]:
        """Each as COCO's files have it: {"size": [height, width], "counts": text}."""
        return [{"size": list(self.size), "counts": counts.decode()} for counts in self.counts]

    def _encoded(self) -> list[dict[str, Any]]:
        return [{"size": list(self.size), "counts": counts} for counts in self.counts]
