"""Annotated images of any format as a torch data set."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from datasets.files import with_files
from datasets.findings import Finding, some
from datasets.formats.base import Annotations, ImageRecord
from datasets.formats.checks import annotation_findings
from datasets.formats.coco_panoptic import read_masks, read_segments, segments_file
from datasets.mixing import Mixing, Sample
from datasets.records import Records
from datasets.schedule import Augmentation, Phase, Recipe, Transforms
from detr.boxes import xyxy_to_cxcywh
from detr.errors import UserError
from detr.images import read_image
from detr.masks import Masks
from detr.segments import VOID, Panoptic, Segment
from detr.types import Category, Target

logger = logging.getLogger(__name__)
UNREADABLE = ("stop", "skip")
SKIP_ADVICE = " Or set data.unreadable=skip: in training the next image takes its place."
_SAMPLED = 1000  # files whose sizes tell whether the images are the same
_PROBLEMS = ("NaN or infinite", "of negative size", "of zero size", "outside the image")


class DetectionDataset(Dataset[tuple[UInt8[Tensor, "3 _ _"], Target]]):
    """Images and training targets.

    Targets leave crowds out; images without objects stay in. Labels are the ranks of category ids, 0..K-1, and
    `categories` lists them in that order.

    annotations: from a reader of `datasets.formats`.
    transforms: called with an image (uint8 tensor) and {"boxes": tv_tensors.BoundingBoxes, "labels": Tensor}, as
        those of torchvision.transforms.v2 are, and "masks": tv_tensors.Mask where the annotations have them.
        Randomness must come from torch's default generator, which is seeded from (seed, epoch, index): the k-th sample
        of an epoch is the same for any number of workers.
    mixing: makes one sample of several, before `transforms`. A sample that it changed has "mixed" among its objects.
    categories: the classes to use, such as those that a checkpoint was trained on; the annotations' own by default.
    seed: of the augmentation.
    unreadable: what to do where an image cannot be read: stop with a UserError, or skip it: the next one that can be
        read takes its place. `report_unreadable` warns of these.

    Items are asked for by index, by (epoch, index), or by (epoch, index, size), where size is the one that the batch
    has drawn, if it has. Raises UserError where the images are not usable; boxes without any area inside their image
    are dropped, with a warning that counts them.
    """

    def __init__(
        self,
        annotations: Annotations,
        transforms: Transforms | None = None,
        *,
        mixing: Mixing | None = None,
        categories: Sequence[Category] | None = None,
        seed: int = 0,
        unreadable: str = "stop",
    ) -> None:
        if unreadable not in UNREADABLE:
            raise UserError(f"data.unreadable: wanted {' or '.join(UNREADABLE)}, got '{unreadable}'.")
        if annotations.named and categories is not None:
            annotations = annotations.classified(categories)
        self.source, self.folder, self.segments = annotations.source, annotations.images, annotations.segments
        self.seed, self.unreadable = seed, unreadable
        self._phases = [Phase(0, Recipe(transforms), mixing)]
        self.own_categories = annotations.categories
        self.categories = list(annotations.categories if categories is None else categories)
        _check_same_categories(annotations.categories, self.categories, self.source)
        rank_of = {category.id: rank for rank, category in enumerate(self.categories)}
        self._rank_of_own = np.array([rank_of[category.id] for category in annotations.categories], dtype=np.int64)
        records = Records(with_files(annotations.records, self.folder, self.source))
        self.records, dropped = _usable(records, self.source)
        self.findings = [*annotation_findings(records, annotations.categories), *dropped]
        for finding in self.findings:
            logger.warning("%s: %s", self.source, finding)
        self._places = {record.id: place for place, record in enumerate(self.records)} if self.segments else {}
        self._advice = ""
        self._skipped = torch.zeros(len(self.records), dtype=torch.bool)  # of each image whether it was

    def __len__(self) -> int:
        return len(self.records)

    def summary(self) -> str:
        """How many images and objects there are, in words."""
        counts = self.objects_per_image()
        empty = int((counts == 0).sum())
        return (
            f"{len(counts):,} images, {counts.sum():,} objects of {len(self.own_categories)} classes, "
            f"{counts.sum() / max(len(counts), 1):.1f} an image, at most {counts.max(initial=0)}"
            + (f"; {empty:,} images without objects" if empty else "")
        )

    def count_objects(self) -> int:
        """The objects to be found, without crowds."""
        return int(self.objects_per_image().sum())

    def objects_per_image(self) -> np.ndarray:
        """The objects to be found in each of the images, without crowds."""
        records = self.records
        return np.bincount(records.places[~records.crowds], minlength=len(records))

    def count_by_category(self) -> np.ndarray:
        """The objects to be found of each of the categories, without crowds."""
        ranks = self._rank_of_own[self.records.labels[~self.records.crowds]]
        return np.bincount(ranks, minlength=len(self.categories))

    def begin_training(self, *, workers: int) -> None:
        """Comes before the processes of a training's loader, which find out which images are skipped.

        From here on the message about an image that cannot be read says how to go on without it.
        """
        self._advice = SKIP_ADVICE
        if self.unreadable == "skip" and workers > 0:
            self._skipped.share_memory_()

    def schedule(self, augmentation: Augmentation, *, epochs: int) -> None:
        """Have another augmentation, which follows the epochs of a training.

        Comes before the first epoch of a loader, whose workers hold copies.
        """
        self._phases = augmentation.phases(epochs)
        if len(self._phases) > 1:
            text = "; ".join(f"from epoch {phase.epoch} {phase.name}" for phase in self._phases)
            logger.info("Augmentation (epochs count from 0): %s.", text)

    def fingerprint(self) -> dict[str, str]:
        """What tells these data from others: texts by name, the same for the same data on any machine.

        Of the images' contents only the sizes of some files count.
        """
        records = self.records
        some = records[:: -(-len(records) // _SAMPLED) or 1]
        return {
            "number of images": str(len(records)),
            "names or order of images": _digest((record.id, record.file_name, record.size) for record in records),
            "boxes or labels": _digest(
                part
                for record in records
                for part in (
                    *(values.tobytes() for values in record.arrays().values()),
                    *(record.masks.counts if record.masks else ()),
                )
            ),
            "categories": _digest((category.id, category.name) for category in self.categories),
            "image files": _digest(_bytes(self.folder / record.file_name) for record in some),
        }

    def ground_truth(self) -> dict[str, Any]:
        """What to evaluate against, as the content of a COCO annotation file; without the boxes that were dropped."""
        categories = self.own_categories
        rows = [
            {
                "image_id": record.id,
                "category_id": categories[label].id,
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
                **mask,
            }
            for record in self.records
            for label, box, area, crowd, mask in zip(
                record.labels.tolist(),
                record.boxes.tolist(),
                record.areas.tolist(),
                record.crowds.astype(int).tolist(),
                [{} for _ in record.labels] if record.masks is None else _segmentations(record.masks),
                strict=True,
            )
        ]
        return {
            "images": [
                {
                    **record.attributes,
                    "id": record.id,
                    "file_name": record.file_name,
                    "height": record.size[0],
                    "width": record.size[1],
                }
                for record in self.records
            ],
            "annotations": [{"id": number, **row} for number, row in enumerate(rows, start=1)],
            "categories": [
                {"id": category.id, "name": category.name, **self._kind(category)} for category in categories
            ],
        }

    def _kind(self, category: Category) -> dict[str, int]:
        """Whether it is one of things, where that matters."""
        return {} if self.segments is None else {"isthing": int(category.is_thing)}

    def panoptic(self, image_id: int) -> Panoptic:
        """What is annotated in an image of a panoptic data set; labels are ranks in its own categories.

        Raises UserError where its PNG is missing or damaged.
        """
        assert self.segments is not None
        record = self.records[self._places[image_id]]
        assert record.segments is not None
        ids = read_segments(self.segments / segments_file(record.file_name))
        columns = (record.segments.tolist(), record.labels.tolist(), record.crowds.tolist())
        segments = tuple(Segment(key, label, crowd) for key, label, crowd in zip(*columns, strict=True))
        return Panoptic(ids=np.where(np.isin(ids, record.segments), ids, VOID), segments=segments)

    def __getitem__(
        self, key: int | tuple[int, int] | tuple[int, int, int | None]
    ) -> tuple[UInt8[Tensor, "3 _ _"], Target]:
        epoch, index, *drawn = key if isinstance(key, tuple) else (0, key)
        record, (image, objects) = self._sample(index)
        phase = next(phase for phase in reversed(self._phases) if phase.epoch <= epoch)
        transforms = phase.recipe.of(*drawn or [None])
        with _seeded(self.seed, epoch, index):
            image, objects = self._made((image, objects), phase.mixing, transforms)
            if (finish := getattr(phase.mixing, "finish", None)) is not None:
                image, objects = finish(image, objects, lambda: self._made(self._draw(), phase.mixing, transforms))
        boxes, labels = objects["boxes"].as_subclass(Tensor), objects["labels"]

        height, width = image.shape[1:]
        limits = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        boxes = boxes.clamp(min=0).minimum(limits)
        visible = (boxes[:, 2:] > boxes[:, :2]).all(1)  # a crop can have cut a box away
        boxes = xyxy_to_cxcywh(boxes[visible]) / limits
        masks = objects["masks"].as_subclass(Tensor)[visible].bool() if "masks" in objects else None
        target = Target(labels=labels[visible], boxes=boxes, image_id=record.id, original_size=record.size, masks=masks)
        return image.as_subclass(Tensor), target

    def report_unreadable(self) -> None:
        """Warn of the images that were skipped since the last time, in this process and the loader's."""
        names = [self.records[index].file_name for index in self._skipped.nonzero()[:, 0].tolist()]
        self._skipped.zero_()
        if names:
            text = "%d images in %s could not be read and were skipped: %s. Replace them, or remove them from %s."
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            logger.warning(text, len(names), self.folder, shown, self.source)

    def _made(self, sample: Sample, mixing: Mixing | None, transforms: Transforms | None) -> Sample:
        """What mixing and transforms make of a sample."""
        image, objects = sample
        if mixing is not None:
            before = image
            image, objects = mixing(image, objects, self._draw)
            if image is not before:
                objects = {**objects, "mixed": True}
        return (image, objects) if transforms is None else transforms(image, objects)

    def _draw(self) -> Sample:
        return self._sample(int(torch.randint(len(self), ())))[1]

    def _sample(self, index: int) -> tuple[ImageRecord, Sample]:
        """The image with this index, or the next one after it that can be read, and its objects but crowds."""
        record, image = self._read(index)
        objects = record.select(~record.crowds)
        boxes = torch.from_numpy(_clipped(objects.boxes, np.array(record.size)).astype(np.float32))
        found = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=record.size),
            "labels": torch.from_numpy(self._rank_of_own[objects.labels]),
        }
        if objects.masks is not None:
            found["masks"] = tv_tensors.Mask(objects.masks.decode().byte())
        elif self.segments is not None:
            found["masks"] = tv_tensors.Mask(torch.from_numpy(read_masks(objects, self.segments)).byte())
        return record, (tv_tensors.Image(image), found)

    def _read(self, index: int) -> tuple[ImageRecord, UInt8[Tensor, "3 _ _"]]:
        index = range(len(self))[index]
        for place in range(index, index + len(self)):
            record = self.records[place % len(self)]
            try:
                return record, read_image(self.folder / record.file_name, record.size)
            except UserError as error:
                if self.unreadable == "stop":
                    raise UserError(f"{error}{self._advice}") from None
                self._skipped[place % len(self)] = True
                reason = error
        raise UserError(f"Not one of the {len(self)} images in {self.folder} can be read. The last one: {reason}")


@contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """torch's default generator as (seed, epoch, index) alone decide, and afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        entropy = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(entropy[0]))
        yield


def _segmentations(masks: Masks) -> list[dict[str, Any]]:
    return [{"segmentation": row} for row in masks.rows()]


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()[:12]


def _bytes(path: Path) -> int:
    """The size of a file; -1 where it is gone, which is for those who read it to report."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _check_same_categories(own: Sequence[Category], wanted: Sequence[Category], source: Path) -> None:
    names = {category.id: category.name for category in wanted}
    for category in own:
        if category.id not in names:
            known = ", ".join(f"{c.id} '{c.name}'" for c in wanted[:5])
            raise UserError(
                f"Annotation file {source} has the category {category.id} '{category.name}', which the model does not "
                f"know; it was trained on {len(wanted)} categories ({known}, ...). Use annotations with the same "
                "categories for training and evaluation."
            )
        if names[category.id] not in (category.name, str(category.id)):  # weights without names have ids for names
            raise UserError(
                f"Annotation file {source} calls category {category.id} '{category.name}', but the model was trained "
                f"with '{names[category.id]}' under that id. Use the same ids and names for training and evaluation."
            )


def _usable(records: Records, source: Path) -> tuple[Records, list[Finding]]:
    """The records without the objects whose boxes have no area inside their image, and a finding of these."""
    boxes = records.boxes
    problems = _problems(boxes, records.sizes[records.places])
    usable = problems < 0
    if usable.all():
        return records, []
    dropped = np.bincount(problems[~usable], minlength=len(_PROBLEMS)).tolist()
    text = ", ".join(f"{count} {problem}" for count, problem in zip(dropped, _PROBLEMS, strict=True) if count)
    if not usable.any():
        raise UserError(
            f"{source}: not one of the {len(boxes)} boxes is usable ({text}). Boxes are [x, y, width, height] in "
            "pixels of the image, with the origin at the top left."
        )
    finding = Finding(
        kind="unusable boxes",
        severity="warning",
        count=sum(dropped),
        text=f"dropped {sum(dropped)} of {len(boxes)} boxes: {text}.",
        advice="Correct them, or remove them from the file.",
        files=some(map(records.file_name, records.places[~usable].tolist())),
    )
    return records.select(usable), [finding]


def _problems(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What makes each box unusable, as the first index in _PROBLEMS; -1 where nothing does."""
    extents, corners = boxes[:, 2:], _clipped(boxes, sizes)
    found = (
        ~np.isfinite(boxes).all(1),
        (extents < 0).any(1),
        (extents == 0).any(1),
        ~(corners[:, :2] < corners[:, 2:]).all(1),
    )
    return np.select(found, range(len(_PROBLEMS)), -1)


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes of x, y, width, height as xyxy inside their images. sizes: (height, width) of each image, or of one."""
    with np.errstate(over="ignore", invalid="ignore"):
        far = np.minimum(boxes[:, :2] + boxes[:, 2:], sizes[..., ::-1])
    return np.concatenate((np.maximum(boxes[:, :2], 0.0), far), axis=1)
