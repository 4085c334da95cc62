"""DETR's augmentation and evaluation recipes (Carion et al., ECCV 2020, section 4) on torchvision's v2 transforms."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detr.errors import UserError
from detr.images import short_side_size

_LONGEST = 16  # times the short side is the long side before a crop, at most: a line of pixels would fill the memory


class RandomShortSide(v2.Transform):
    """Resize the short side to one of `sizes`, drawn at random, with the long side at most `max_size`."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        super().__init__()
        if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise UserError(f"RandomShortSide: wanted a list of positive sizes, got {list(sizes)}.")
        self.sizes, self.max_size = list(sizes), max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        return {"size": list(short_side_size(height, width, size, self.max_size))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)


class RandomSizeCrop(v2.Transform):
    """Crop a window at random, its height and width each drawn from min_size..max_size and at most the image's."""

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        if not 1 <= min_size <= max_size:
            raise UserError(f"RandomSizeCrop: wanted 1 <= min_size <= max_size, got {min_size} and {max_size}.")
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        window = []
        for extent in v2.query_size(flat_inputs):
            low, high = min(self.min_size, extent), min(self.max_size, extent)
            length = int(torch.randint(low, high + 1, ()))
            window.append((int(torch.randint(extent - length + 1, ())), length))
        (top, height), (left, width) = window
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


def train(
    *,
    sizes: Sequence[int],
    max_size: int,
    crop: bool = True,
    crop_from: Sequence[int] = (400, 500, 600),
    crop_min: int = 384,
    crop_max: int = 600,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
) -> v2.Transform:
    """DETR's training recipe: flip; then resize, half the time after a crop at another scale.

    sizes, max_size: lengths of the short side to draw from, and limit of the long side, in pixels.
    crop: half the time resize the short side to one of `crop_from` and cut a window of crop_min..crop_max, before.
    horizontal_flip, vertical_flip: probabilities.
    """
    resize: v2.Transform = RandomShortSide(sizes, max_size)
    if crop:
        enlarge = RandomShortSide(crop_from, _LONGEST * max(crop_from, default=1))
        cropped = v2.Compose([enlarge, RandomSizeCrop(crop_min, crop_max), resize])
        resize = v2.RandomChoice([resize, cropped])
    return v2.Compose([v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip), resize])


def evaluation(*, size: int, max_size: int) -> v2.Transform:
    """DETR's evaluation recipe: the short side at `size`, the long side at most `max_size`."""
    return RandomShortSide([size], max_size)
