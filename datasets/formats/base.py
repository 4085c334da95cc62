"""What a reader of any format returns.

A reader is a function or class that a `_target_` node of `data.train` and `data.val` names, with options of its own. It
raises UserError where its files are not what it wanted. `datasets.detection` checks the rest: that images are there,
that boxes have an area inside of their image, and that categories are those of the model.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from detr.types import Category

_repr = reprlib.Repr()
_repr.maxstring = 200
brief = _repr.repr  # for values in messages, which may be of any length


@dataclass(frozen=True)
class ImageRecord:
    """One image with everything that is annotated in it, as the files have it.

    The first dimension of every array is that of the objects.

    id: of the image, unique in the data set.
    file_name: relative to the image folder.
    size: (height, width) in pixels.
    boxes: x, y, width, height in pixels, with the origin at the top left.
    labels: ranks in the categories.
    crowds: which boxes hold a crowd: evaluation ignores detections in them, training leaves them out.
    areas: in pixels, which decide whether an object counts as small, medium or large.
    """

    id: int
    file_name: str
    size: tuple[int, int]
    boxes: Float64[np.ndarray, "n 4"]
    labels: Int64[np.ndarray, " n"]
    crowds: Bool[np.ndarray, " n"]
    areas: Float64[np.ndarray, " n"]

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names of their fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def select(self, chosen: np.ndarray) -> "ImageRecord":
        """The same image with some of its objects."""
        return replace(self, **{name: values[chosen] for name, values in self.arrays().items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Annotations:
    """The images of a data set and what is in them.

    source: the file or folder that was read, for messages.
    images: the folder of the image files.
    categories: the classes, sorted by id; ids may be any integers.
    """

    source: Path
    images: Path
    categories: Sequence[Category]
    records: Sequence[ImageRecord]
