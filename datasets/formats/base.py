"""What a reader of any format returns.

A reader is a function or class that a `_target_` node of `data.train` and `data.val` names, with options of its own. It
raises UserError where its files are not what it wanted. What it returns is checked for all formats: `Annotations`
checks ids, labels, and that the arrays of an image fit together; `datasets.detection` that images are there, that boxes
have an area inside of their image, and that categories are those of the model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from detr.errors import UserError, brief
from detr.masks import Masks
from detr.types import Category

MOST_CATEGORIES = 20_000
UNKNOWN = (0, 0)  # size of an image that is yet to be read from its file


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
    attributes: what else is known of the image, such as its weather: texts, numbers or bools by name.
    masks: of each object, in pixels of the image; None where they were not asked for, in all images alike.
    segments: the id of each object in the picture of segments that a panoptic data set has for each image.
    """

    id: int
    file_name: str
    size: tuple[int, int]
    boxes: Float64[np.ndarray, "n 4"]
    labels: Int64[np.ndarray, " n"]
    crowds: Bool[np.ndarray, " n"]
    areas: Float64[np.ndarray, " n"]
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    masks: Masks | None = None
    segments: Int64[np.ndarray, " n"] | None = None

    @classmethod
    def of(
        cls,
        file_name: str,
        corners: Sequence[Sequence[float]],
        labels: Sequence[int],
        *,
        id: int = 0,
        size: tuple[int, int] = UNKNOWN,
        crowds: Sequence[bool] | None = None,
    ) -> "ImageRecord":
        """From corners (left, top, right, bottom) in pixels, with the areas of the boxes."""
        edges = np.array(corners, dtype=np.float64).reshape(-1, 4)
        boxes = np.concatenate((edges[:, :2], edges[:, 2:] - edges[:, :2]), axis=1)
        return cls(
            id=id,
            file_name=file_name,
            size=size,
            boxes=boxes,
            labels=np.array(labels, dtype=np.int64),
            crowds=np.array([False] * len(boxes) if crowds is None else crowds, dtype=bool),
            areas=boxes[:, 2:].prod(1),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names of their fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def select(self, chosen: np.ndarray) -> "ImageRecord":
        """The same image with some of its objects."""
        masks = None if self.masks is None else self.masks.select(np.arange(len(self.masks))[chosen])
        return replace(self, masks=masks, **{name: values[chosen] for name, values in self.arrays().items()})


def numbered(names: Sequence[str], source: Path) -> list[Category]:
    """Categories of these names, in this order, with the ids 1, 2, ... Raises UserError where a name occurs twice."""
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise UserError(
                f"{source}: {count} classes have the name {brief(name)}. Give each class a name of its own."
            )
    return [Category(id=number, name=name) for number, name in enumerate(names, start=1)]


@dataclass(frozen=True)
class Annotations:
    """The images of a data set and what is in them.

    source: the file or folder that was read, for messages.
    images: the folder of the image files.
    categories: the classes, sorted by id; ids may be any integers.
    named: the files know the classes by their names alone, so that the ids may be replaced.
    segments: the folder of the pictures of segments, where the data set is panoptic.

    Raises UserError where ids repeat, categories are not sorted, or a record does not fit them or itself.
    """

    source: Path
    images: Path
    categories: Sequence[Category]
    records: Sequence[ImageRecord]
    named: bool = False
    segments: Path | None = None

    def __post_init__(self) -> None:
        self._check_ids()
        for record in self.records:
            self._check_shapes(record)
        self._check_masks()
        self._check_labels()

    def classified(self, categories: Sequence[Category]) -> "Annotations":
        """The same with the categories of others, such as those of a model, found by their names.

        Raises UserError where there is a name that these do not have.
        """
        names, own = [category.name for category in categories], [category.name for category in self.categories]
        if unknown := [name for name in own if name not in names]:
            missing = [name for name in names if name not in own]
            others = f" Not here, but there: {brief(missing)}." if missing else ""
            raise UserError(
                f"{self.source}: the classes {brief(unknown)} are not among the {len(names)} that the model is trained "
                f"on, so that they can never be found.{others} Use the same names for training and evaluation."
            )
        rank_of = np.array([names.index(name) for name in own], dtype=np.int64)
        records = [replace(record, labels=rank_of[record.labels]) for record in self.records]
        return replace(self, categories=categories, records=records)

    def first(self, count: int) -> "Annotations":
        """The first images that have objects to train on: the same few to train on and to evaluate on."""
        return replace(self, records=[record for record in self.records if not record.crowds.all()][:count])

    def _check_ids(self) -> None:
        ids = [category.id for category in self.categories]
        if not ids or ids != sorted(set(ids)):
            raise UserError(
                f"{self.source}: the categories have the ids {brief(ids)}, wanted at least one, each once and sorted."
            )
        if len(ids) > MOST_CATEGORIES:
            raise UserError(
                f"{self.source}: there are {len(ids)} categories, wanted at most {MOST_CATEGORIES}, for which "
                "memory and time suffice. Join classes, or leave out those without objects."
            )
        for image, count in Counter(record.id for record in self.records).most_common(1):
            if count > 1:
                raise UserError(f"{self.source}: {count} images have the id {image}. Ids must be unique.")

    def _check_shapes(self, record: ImageRecord) -> None:
        lengths = {name: len(values) for name, values in record.arrays().items()}
        if record.masks is not None:
            lengths["masks"] = len(record.masks)
            if record.masks.size != record.size:
                raise UserError(
                    f"{self.source}: image {record.id} has masks of {record.masks.size} pixels, wanted its own size, "
                    f"{record.size}."
                )
        if len(set(lengths.values())) > 1 or record.boxes.shape[1:] != (4,):
            found = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise UserError(
                f"{self.source}: image {record.id} has {found}, and boxes of shape {record.boxes.shape}. Wanted one of "
                "each for each of the n objects, and boxes of shape (n, 4)."
            )

    def _check_masks(self) -> None:
        without = [record.id for record in self.records if record.masks is None]
        if 0 < len(without) < len(self.records):
            raise UserError(
                f"{self.source}: {len(without)} of {len(self.records)} images, such as {without[0]}, have no masks. "
                "Wanted them in all images, in those without objects too, or in none."
            )

    def _check_labels(self) -> None:
        labels = np.concatenate([np.empty(0, np.int64), *(record.labels for record in self.records)])
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{self.source}: labels are {labels.dtype}, wanted int64, in images without objects too.")
        wrong = (labels < 0) | (labels >= len(self.categories))
        if wrong.any():
            images = np.repeat([record.id for record in self.records], [len(record.labels) for record in self.records])
            raise UserError(
                f"{self.source}: image {images[wrong][0]} has the label {labels[wrong][0]}, wanted the rank of one of "
                f"the {len(self.categories)} categories, 0 to {len(self.categories) - 1}."
            )
