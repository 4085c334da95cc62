"""DETR's augmentation and evaluation recipes (Carion et al., ECCV 2020, section 4), and SSD's augmentation (Liu et al.,
ECCV 2016), on torchvision's v2 transforms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detr.errors import UserError
from detr.images import model_size, resize, short_side_size
from detr.ranges import checked

_LONGEST = 16  # times the short side is the long side before a crop, at most: a line of pixels would fill the memory
_SMALLEST_CROP = 0.3  # of an image's height and width: torchvision's


class RandomShortSide(v2.Transform):
    """Resize the short side to one of `sizes`, drawn at random, with the long side at most `max_size`.

    square: resize both sides to it, whatever the aspect ratio was.
    """

    def __init__(self, sizes: Sequence[int], max_size: int | None = None, *, square: bool = False) -> None:
        super().__init__()
        if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise UserError(f"RandomShortSide: wanted a list of positive sizes, got {list(sizes)}.")
        self.sizes, self.max_size, self.square = list(sizes), max_size, square

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        return {"size": list(model_size(height, width, size, self.max_size, square=self.square))}

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


class ZoomOutAndCrop(v2.Transform):
    """SSD's: put the image into a larger one, then crop it so that objects stay in.

    A sample that mixing changed, which has `mixed` among its objects, stays as it is: its objects are small already,
    and cut off.

    zoom_out, iou_crop: probabilities. fill: gray level around the image.
    limit: of the long side before it is put into a larger one, in pixels. That one has up to 16 times as many pixels,
    and is resized afterwards anyway.
    """

    def __init__(self, *, zoom_out: float, fill: int, iou_crop: float, limit: int) -> None:
        super().__init__()
        self.zoom_out, self.iou_crop, self.limit = zoom_out, iou_crop, limit
        fills: dict[Any, Any] = {tv_tensors.Mask: 0, "others": fill}
        self._zoom_out, self._crop = v2.RandomZoomOut(fills, p=1.0), v2.RandomIoUCrop(min_scale=_SMALLEST_CROP)

    def forward(self, image: tv_tensors.Image, objects: dict[str, Any]) -> tuple[tv_tensors.Image, dict[str, Any]]:
        if objects.get("mixed", False):
            return image, objects
        if torch.rand(()) < self.zoom_out:
            height, width = image.shape[1:]
            size = short_side_size(height, width, min(height, width), self.limit)
            image, objects = self._zoom_out(*resized(image, objects, size))
        # torchvision's crop would look for an object for long where there is none, and divide by 0 in a tiny image.
        possible = len(objects["boxes"]) > 0 and min(image.shape[1:]) * _SMALLEST_CROP >= 1
        if torch.rand(()) < self.iou_crop and possible:
            image, objects = self._crop(image, objects)
        return image, objects


def resized(
    image: tv_tensors.Image, objects: dict[str, Any], size: tuple[int, int]
) -> tuple[tv_tensors.Image, dict[str, Any]]:
    """A sample resized to (height, width) with its boxes and masks."""
    image = tv_tensors.Image(resize(image.as_subclass(Tensor), size))
    placed: dict[str, Any] = {
        name: F.resize(objects[name], list(size)) for name in ("boxes", "masks") if name in objects
    }
    return image, {**objects, **placed}


def train(
    *,
    sizes: Sequence[int],
    max_size: int,
    square: bool = False,
    crop: bool = True,
    crop_from: Sequence[int] = (400, 500, 600),
    crop_min: int = 384,
    crop_max: int = 600,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    zoom_out: float = 0.0,
    fill: int = 0,
    iou_crop: float = 0.0,
    photometric_distortion: float = 0.0,
) -> v2.Transform:
    """DETR's training recipe: flip; then resize, half the time after a crop at another scale. SSD's parts are optional.

    sizes, max_size: lengths of the short side to draw from, and limit of the long side, in pixels.
    square: resize both sides to one of `sizes`, whatever the aspect ratio was; max_size is no limit then.
    crop: half the time resize the short side to one of `crop_from` and cut a window of crop_min..crop_max, before.
    horizontal_flip, vertical_flip: probabilities.
    zoom_out, iou_crop: probabilities of SSD's zoom out and crop, before all resizing, where mixing changed nothing.
    fill: gray level around a zoomed-out image, 0 to 255.
    photometric_distortion: probability of a change of each of brightness, contrast, saturation, hue and the order of
    colors, after all resizing, where large photographs cost no more than small ones.
    """
    checked(fill, "fill", "a gray level from 0 to 255", lambda value: 0 <= value <= 255)
    for name, value in {
        "zoom_out": zoom_out,
        "iou_crop": iou_crop,
        "photometric_distortion": photometric_distortion,
    }.items():
        checked(value, name, "at least 0 and at most 1", lambda value: 0 <= value <= 1)
    rescale: v2.Transform = RandomShortSide(sizes, max_size, square=square)
    if crop:
        enlarge = RandomShortSide(crop_from, _LONGEST * max(crop_from, default=1))
        cropped = v2.Compose([enlarge, RandomSizeCrop(crop_min, crop_max), rescale])
        rescale = v2.RandomChoice([rescale, cropped])
    parts: list[v2.Transform] = [v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip)]
    if zoom_out > 0 or iou_crop > 0:
        parts.append(ZoomOutAndCrop(zoom_out=zoom_out, fill=fill, iou_crop=iou_crop, limit=max_size))
    parts.append(rescale)
    if photometric_distortion > 0:
        parts.append(v2.RandomPhotometricDistort(p=photometric_distortion))
    return v2.Compose(parts)


def evaluation(*, size: int, max_size: int, square: bool = False) -> v2.Transform:
    """DETR's evaluation recipe: the short side at `size`, the long side at most `max_size`; or both sides at `size`."""
    return RandomShortSide([size], max_size, square=square)
