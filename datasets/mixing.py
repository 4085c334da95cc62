"""Augmentation that makes one sample of several, before `data.transforms` change it."""

from collections.abc import Callable
from typing import Any, Protocol

from torchvision import tv_tensors

# An image and what is in it: {"boxes": tv_tensors.BoundingBoxes in pixels, "labels": int64 (n,)}.
Sample = tuple[tv_tensors.Image, dict[str, Any]]


class Mixing(Protocol):
    """What `data.mixing` builds: for example a mosaic of four images.

    Randomness must come from torch's default generator, which is seeded from (seed, epoch, index), and from `draw`,
    which draws from it too. The k-th sample of an epoch is then the same for any number of workers.
    """

    def __call__(self, image: tv_tensors.Image, objects: dict[str, Any], draw: Callable[[], Sample]) -> Sample:
        """The mixed sample. Its boxes have the size of its image as `canvas_size`.

        draw: returns another sample at random, any of the data set, before any transform.
        """
        ...
