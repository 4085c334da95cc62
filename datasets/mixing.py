"""Augmentation that makes one sample of several, before `data.transforms` change it."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.transforms import resized
from detr.images import short_side_size
from detr.ranges import checked

# An image and what is in it: {"boxes": tv_tensors.BoundingBoxes in pixels, "labels": int64 (n,)}, and "masks":
# tv_tensors.Mask (n, H, W) where the data have them.
Sample = tuple[tv_tensors.Image, dict[str, Any]]
Draw = Callable[[], Sample]
_LONGEST = 16  # times the short side is the long side of a tile, at most: a line of pixels would fill the memory


class Mixing(Protocol):
    """What `data.mixing` builds: for example a mosaic of four images.

    Randomness must come from torch's default generator, which is seeded from (seed, epoch, index), and from `draw`,
    which draws from it too. The k-th sample of an epoch is then the same for any number of workers.

    An attribute `images` may say of how many images it makes a sample at most; a check before training reads it.
    A method `finish`, called in the same way, may change samples after the transforms; its `draw` returns such samples.
    """

    def __call__(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        """The mixed sample, with the size of its image as its boxes' `canvas_size`; or the same image, unchanged.

        draw: returns another sample at random, any of the data set, before any transform.
        """
        ...


class Chain:
    """Several, by name, one after another. What one of them draws has gone through those before it.

    Those that change finished samples, after the transforms, do so in the same order.

    parts: None in place of one leaves it out.
    """

    def __init__(self, *, parts: Mapping[str, Mixing | None]) -> None:
        for name, part in parts.items():
            checked(part, f"parts.{name}", "a node with a _target_", callable)
        self.parts = tuple(part for part in parts.values() if part is not None)
        self.images = prod(getattr(part, "images", 1) for part in self.parts)

    def __call__(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        for part in self.parts:
            image, objects = part(image, objects, draw)
            draw = _through(part, draw)
        return image, objects

    def finish(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        for part in self.parts:
            finish = getattr(part, "finish", None)
            if finish is not None:
                image, objects = finish(image, objects, draw)
                draw = _through(finish, draw)
        return image, objects


class Mosaic:
    """Four images around one point, rotated, scaled and moved together (YOLOv4, Bochkovskiy et al., 2020).

    Each image is first resized to fit into its tile, so that large photographs take no more memory than small ones.

    probability: of a mosaic; otherwise the image stays as it is.
    size: side of a tile in pixels; the mosaic has twice as many.
    rotation: the most degrees, in either direction. translation: the most, as a fraction of the mosaic's side, in any
    direction. scaling: the least and the greatest factor.
    fill: gray level of what no image covers, 0 to 255.
    short_side: as in DEIM (Huang et al., CVPR 2025): the short side of each image is resized to `size`, the long one to
    at most 16 times that. All tiles are as high and wide as the highest and the widest image, and each image lies at
    the top left of its own. With `data.square` the mosaic becomes a square afterwards.

    Boxes are cut off at the border. Those with less than a pixel left, in width or height, are dropped.
    """

    images = 4

    def __init__(
        self,
        *,
        size: int,
        probability: float = 0.5,
        rotation: float = 10.0,
        translation: float = 0.1,
        scaling: Sequence[float] = (0.5, 1.5),
        fill: int = 0,
        short_side: bool = False,
    ) -> None:
        self.short_side = short_side
        self.size = checked(size, "size", "at least 1", lambda value: value >= 1)
        self.probability = _fraction(probability, "probability")
        self.rotation = checked(rotation, "rotation", "degrees from 0 to 180", lambda value: 0 <= value <= 180)
        self.translation = _fraction(translation, "translation")
        self.scaling = checked(
            scaling,
            "scaling",
            "the least and the greatest factor, above 0",
            lambda value: _rises(value) and value[0] > 0,
        )
        self.fill = checked(fill, "fill", "a gray level from 0 to 255", lambda value: 0 <= value <= 255)

    def __call__(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        if torch.rand(()) >= self.probability:
            return image, objects
        # One at a time: photographs may be large.
        tiles = [self._tile(*(draw() if number > 0 else (image, objects))) for number in range(self.images)]
        height, width = self.size, self.size
        if self.short_side:
            height, width = (max(part.shape[dim] for part, _ in tiles) for dim in (1, 2))
        canvas = torch.full((3, 2 * height, 2 * width), self.fill, dtype=torch.uint8)
        parts = []
        for number, (part, found) in enumerate(tiles):
            own_height, own_width = part.shape[1:]
            row, column = divmod(number, 2)
            left, top = column * width, row * height
            if not self.short_side:  # all four meet in the middle
                left, top = left or width - own_width, top or height - own_height
            canvas[:, top : top + own_height, left : left + own_width] = part
            parts.append(_placed(found, left, top, canvas.shape[1:]))
        return self._moved(tv_tensors.Image(canvas), _together(parts))

    def _tile(self, image: tv_tensors.Image, objects: dict[str, Any]) -> Sample:
        if not self.short_side:
            return _fitted(image, objects, (self.size, self.size))
        height, width = image.shape[1:]
        return resized(image, objects, short_side_size(height, width, self.size, _LONGEST * self.size))

    def _moved(self, image: tv_tensors.Image, objects: dict[str, Any]) -> Sample:
        height, width = image.shape[1:]
        affine: dict[str, Any] = {
            "angle": _between(-self.rotation, self.rotation),
            "translate": [side * _between(-self.translation, self.translation) for side in (width, height)],
            "scale": _between(*self.scaling),
            "shear": [0.0, 0.0],
        }
        fill = self.fill or None  # None is 0 too, in half the time
        moved = F.affine(image, **affine, interpolation=InterpolationMode.BILINEAR, fill=fill)
        boxes = F.affine(objects["boxes"], **affine)
        found = _chosen({**objects, "boxes": boxes}, ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1))
        if "masks" in found:
            found["masks"] = _moved_masks(found["masks"], affine)
        return moved, found


class Mixup:
    """Another image blended in, with its objects (Zhang et al., ICLR 2018; for detection Zhang et al., 2019).

    The other image is resized to fit into this one, keeps its aspect ratio, and comes to a random place in it.

    probability: of the blend. weight: the least and the greatest weight of this image where both are; the other has
    the rest.
    whole: as in DEIM (Huang et al., CVPR 2025), blend what the transforms have made of both images, the other at the
    size of this one. DEIM draws once for a batch, and blends each image with the one before it. Here each sample draws
    for itself, so that it is the same in any batch. Its distribution is the same as there; only how many samples of a
    batch are blended differs.
    """

    images = 2

    def __init__(
        self, *, probability: float = 0.5, weight: Sequence[float] = (0.45, 0.55), whole: bool = False
    ) -> None:
        self.probability, self.weight = _fraction(probability, "probability"), _weights(weight)
        self.whole = whole

    def __call__(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        return (image, objects) if self.whole else self._blended(image, objects, draw)

    def finish(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        return self._blended(image, objects, draw) if self.whole else (image, objects)

    def _blended(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        if torch.rand(()) >= self.probability:
            return image, objects
        size = (image.shape[1], image.shape[2])
        other, more = resized(*draw(), size) if self.whole else _fitted(*draw(), size)
        mixed = image.clone()
        left, top = _blend(mixed, other, 1 - _between(*self.weight))
        return tv_tensors.Image(mixed), _together([objects, _placed(more, left, top, image.shape[1:])])


class CopyBlend:
    """Objects of another image, with some of what is around them, blended in (DEIMv2, Huang et al., 2025).

    Each comes to a random place. One that does not fit is made smaller; no other is resized.

    probability: of the blend. number: the most objects. min_area: of their boxes, in pixels.
    expand: the least and the greatest share of its width and height that a box is expanded by at each side.
    weight: the least and the greatest weight of the pasted pixels; 1 covers what was there.
    """

    images = 2

    def __init__(
        self,
        *,
        probability: float = 0.5,
        number: int = 3,
        min_area: float = 100.0,
        expand: Sequence[float] = (0.1, 0.25),
        weight: Sequence[float] = (0.45, 0.55),
    ) -> None:
        self.probability, self.weight = _fraction(probability, "probability"), _weights(weight)
        self.number = checked(number, "number", "at least 1", lambda value: value >= 1)
        self.min_area = checked(min_area, "min_area", "at least 0", lambda value: value >= 0)
        self.expand = checked(expand, "expand", "the least and the greatest share, from 0 on", _rises)

    def __call__(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Draw) -> Sample:
        if torch.rand(()) >= self.probability:
            return image, objects
        other, more = draw()
        areas = (more["boxes"][:, 2:] - more["boxes"][:, :2]).prod(1)
        usable = (areas >= self.min_area).nonzero()[:, 0]
        chosen = usable[torch.randperm(len(usable))[: self.number]]
        if len(chosen) == 0:
            return image, objects
        mixed, parts = image.clone(), [objects]
        for index in chosen:
            patch, found = self._cut(other, _chosen(more, index[None]))
            if max(patch.shape[1] - image.shape[1], patch.shape[2] - image.shape[2]) > 0:
                patch, found = _fitted(patch, found, image.shape[1:])
            left, top = _blend(mixed, patch, _between(*self.weight))
            parts.append(_placed(found, left, top, image.shape[1:]))
        return tv_tensors.Image(mixed), _together(parts)

    def _cut(self, image: tv_tensors.Image, objects: dict[str, Any]) -> Sample:
        """An image's one object with its surroundings, as a sample."""
        box = objects["boxes"].as_subclass(Tensor)[0]
        margin = (box[2:] - box[:2]) * _between(*self.expand)
        height, width = image.shape[1:]
        left, top = (box[:2] - margin).floor().clamp(min=0).int().tolist()
        right, bottom = (box[2:] + margin).ceil().minimum(torch.tensor([width, height])).int().tolist()
        window = [top, left, bottom - top, right - left]
        found = {name: F.crop(value, *window) if name == "masks" else value for name, value in objects.items()}
        patch = tv_tensors.Image(image[:, top:bottom, left:right])
        return patch, {**found, "boxes": _boxes(box[None] - torch.tensor([left, top, left, top]), patch.shape[1:])}


def _through(part: Callable[..., Sample], draw: Draw) -> Draw:
    """Draws samples that go through this part."""
    return lambda: part(*draw(), draw)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _fitted(image: tv_tensors.Image, objects: dict[str, Any], limits: Sequence[int]) -> Sample:
    """A sample as large as fits into (height, width), with its aspect ratio."""
    scale = min(limit / extent for limit, extent in zip(limits, image.shape[1:], strict=True))
    height, width = (max(round(scale * extent), 1) for extent in image.shape[1:])
    return resized(image, objects, (height, width))


def _blend(image: tv_tensors.Image, patch: tv_tensors.Image, weight: float) -> tuple[int, int]:
    """Blend a patch, with this weight, into a random place of an image, in place. Returns its left and top."""
    (height, width), (free_height, free_width) = patch.shape[1:], image.shape[1:]
    top = int(torch.randint(free_height - height + 1, ()))
    left = int(torch.randint(free_width - width + 1, ()))
    for place, pasted in zip(image[:, top : top + height, left : left + width], patch, strict=True):  # by color
        place.copy_(place.float().lerp_(pasted.float(), weight).round_())
    return left, top


def _moved_masks(masks: tv_tensors.Mask, affine: dict[str, Any]) -> tv_tensors.Mask:
    """By nearest pixels, eight masks in the time and memory of one: as the bits of each byte."""
    pixels = masks.as_subclass(Tensor)
    packed = torch.zeros((-(-len(pixels) // 8), *pixels.shape[1:]), dtype=torch.uint8)
    for number, mask in enumerate(pixels):
        packed[number // 8] |= mask << number % 8
    moved = F.affine_mask(packed, **affine) if len(packed) else packed
    found = torch.empty_like(pixels)
    for number, mask in enumerate(found):
        torch.bitwise_right_shift(moved[number // 8], number % 8, out=mask).bitwise_and_(1)
    return tv_tensors.Mask(found)


def _placed(objects: dict[str, Any], left: int, top: int, size: Sequence[int]) -> dict[str, Any]:
    """What is in an image that comes to a place of another one. size: (height, width) of that."""
    boxes = objects["boxes"].as_subclass(Tensor) + torch.tensor([left, top, left, top])
    found = {**objects, "boxes": _boxes(boxes, size)}
    if "masks" in objects:
        height, width = objects["masks"].shape[1:]
        found["masks"] = F.pad(objects["masks"], [left, top, size[1] - left - width, size[0] - top - height])
    return found


def _chosen(objects: dict[str, Any], index: Tensor) -> dict[str, Any]:
    boxes = _boxes(objects["boxes"].as_subclass(Tensor)[index], objects["boxes"].canvas_size)
    found = {**objects, "boxes": boxes, "labels": objects["labels"][index]}
    if "masks" in objects:
        found["masks"] = tv_tensors.Mask(objects["masks"].as_subclass(Tensor)[index])
    return found


def _together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The objects of images that have become one."""
    corners = torch.cat([part["boxes"].as_subclass(Tensor) for part in parts])
    found: dict[str, Any] = {
        "boxes": _boxes(corners, parts[0]["boxes"].canvas_size),
        "labels": torch.cat([part["labels"] for part in parts]),
    }
    if "masks" in parts[0]:
        found["masks"] = tv_tensors.Mask(torch.cat([part["masks"].as_subclass(Tensor) for part in parts]))
    return found


def _boxes(corners: Tensor, size: Sequence[int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(size[0], size[1]))


def _rises(values: Sequence[float]) -> bool:
    return len(values) == 2 and 0 <= values[0] <= values[1]


def _fraction(value: float, name: str) -> float:
    return checked(value, name, "at least 0 and at most 1", lambda value: 0 <= value <= 1)


def _weights(values: Sequence[float]) -> Sequence[float]:
    return checked(
        values, "weight", "the least and the greatest weight, 0 to 1", lambda value: _rises(value) and value[1] <= 1
    )
