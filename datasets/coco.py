"""Any data set in COCO format as a torch data set (Lin et al., ECCV 2014; https://cocodataset.org/#format-data)."""

import json
import logging
import math
import os
import reprlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from detr.boxes import xyxy_to_cxcywh
from detr.errors import UserError
from detr.images import read_image
from detr.types import Category, Target

logger = logging.getLogger(__name__)
UNREADABLE = ("stop", "skip")
_brief = reprlib.Repr()  # values in messages, which may be of any length
_brief.maxstring = 200


@dataclass(frozen=True)
class ImageRecord:
    """One image of an annotation file with its usable objects. boxes: (n, 4) float32 xyxy in pixels."""

    id: int
    file_name: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray


class CocoDetection(Dataset[tuple[UInt8[Tensor, "3 _ _"], Target]]):
    """Images and targets of a COCO-format annotation file.

    Crowd regions are left out, images without objects stay in. Category ids may be any integers; labels are their
    ranks, 0..K-1, and `categories` lists them in that order.

    images: the folder that file names are relative to.
    annotations: the JSON file.
    transforms: called with an image (uint8 tensor) and {"boxes": tv_tensors.BoundingBoxes, "labels": Tensor}, as
        those of torchvision.transforms.v2 are. Randomness must come from torch's default generator, which is seeded
        from (seed, epoch, index): the k-th sample of an epoch is the same for any number of workers.
    categories: the classes to use, such as those that a checkpoint was trained on; the file's own by default.
    seed: of the augmentation.
    unreadable: what to do where an image cannot be read: stop with a UserError, or skip it: the next one that can be
        read takes its place. `report_unreadable` tells of these.

    Items are asked for by index, or by (epoch, index). Raises UserError where the file or its images are not usable;
    boxes without any area inside their image are dropped, with a warning that counts them.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        transforms: Callable[..., Any] | None = None,
        *,
        categories: Sequence[Category] | None = None,
        seed: int = 0,
        unreadable: str = "stop",
    ) -> None:
        if unreadable not in UNREADABLE:
            raise UserError(f"data.unreadable: wanted {' or '.join(UNREADABLE)}, got '{unreadable}'.")
        self.folder, self.annotations = Path(images), Path(annotations)
        self.transforms, self.seed, self.unreadable = transforms, seed, unreadable
        self._later_transforms, self._later_epoch = transforms, math.inf
        content = _read_json(self.annotations)
        own_categories = _categories(content, self.annotations)
        if categories is not None:
            _check_same_categories(own_categories, categories, self.annotations)
        self.categories = list(categories if categories is not None else own_categories)
        self.records, self._unusable = _records(content, self.categories, self.annotations)
        _check_files(self.folder, self.records)
        # Of each image whether it was skipped; shared with the loader's processes, which are those that find out.
        self._skipped = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def switch_transforms(self, transforms: Callable[..., Any], epoch: int) -> None:
        """Use other transforms from this epoch on. Comes before a loader's workers start, which hold copies."""
        self._later_transforms, self._later_epoch = transforms, epoch

    def ground_truth(self) -> dict[str, Any]:
        """The content of the annotation file without the boxes that were dropped: what to evaluate against."""
        content = _read_json(self.annotations)
        usable = [entry for entry in content["annotations"] if entry["id"] not in self._unusable]
        return {**content, "annotations": usable}

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[UInt8[Tensor, "3 _ _"], Target]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record, image = self._read(index)
        boxes, labels = torch.from_numpy(record.boxes), torch.from_numpy(record.labels)
        transforms = self.transforms if epoch < self._later_epoch else self._later_transforms
        if transforms is not None:
            objects = {
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=record.size),
                "labels": labels,
            }
            with torch.random.fork_rng(devices=[]):
                entropy = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(entropy[0]))
                image, objects = transforms(tv_tensors.Image(image), objects)
            image, boxes, labels = image.as_subclass(Tensor), objects["boxes"].as_subclass(Tensor), objects["labels"]

        height, width = image.shape[1:]
        limits = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        boxes = boxes.clamp(min=0).minimum(limits)
        visible = (boxes[:, 2:] > boxes[:, :2]).all(1)  # a crop can have cut a box away
        boxes = xyxy_to_cxcywh(boxes[visible]) / limits
        return image, Target(labels=labels[visible], boxes=boxes, image_id=record.id, original_size=record.size)

    def report_unreadable(self) -> None:
        """Warn of the images that were skipped since the last time, in this process and the loader's."""
        names = [self.records[index].file_name for index in self._skipped.nonzero()[:, 0].tolist()]
        self._skipped.zero_()
        if names:
            text = "%d images in %s could not be read and were skipped: %s. Replace them, or remove them from %s."
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            logger.warning(text, len(names), self.folder, shown, self.annotations)

    def _read(self, index: int) -> tuple[ImageRecord, UInt8[Tensor, "3 _ _"]]:
        """The image with this index, or the next one after it that can be read."""
        index = range(len(self))[index]
        for place in range(index, index + len(self)):
            record = self.records[place % len(self)]
            try:
                return record, read_image(self.folder / record.file_name, record.size)
            except UserError as error:
                if self.unreadable == "stop":
                    raise
                self._skipped[place % len(self)] = True
                reason = error
        raise UserError(f"Not one of the {len(self)} images in {self.folder} can be read. The last one: {reason}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_repeated_keys)
    except FileNotFoundError:
        raise UserError(
            f"Annotation file {path} does not exist. Set data.root, or data.train.annotations and data.val.annotations."
        ) from None
    except IsADirectoryError:
        raise UserError(f"Annotation file {path} is a folder, wanted a JSON file in COCO format.") from None
    except RecursionError:
        raise UserError(
            f"Annotation file {path} is nested too deeply for COCO format. Export the data set as COCO detection."
        ) from None
    except ValueError as error:
        raise UserError(
            f"Annotation file {path} is no valid JSON: {str(error).partition('; ')[0]}. It may be cut short; copy or "
            "export it again."
        ) from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"Annotation file {path} is not in COCO format: wanted an object with the lists 'images', "
                f"'annotations' and 'categories', but '{key}' is missing. Export the data set as COCO detection."
            )
    return content


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, of which Python alone would silently take the last value of a key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {_brief.repr(key)} occurs twice in one object")
    return content


def _categories(content: dict[str, Any], path: Path) -> list[Category]:
    entries = content["categories"]
    _check_ids(entries, "categories", path)
    if not entries:
        raise UserError(f"Annotation file {path} lists no categories, so there is nothing to detect.")
    return sorted((Category(entry["id"], str(entry.get("name", entry["id"]))) for entry in entries), key=lambda c: c.id)


def _check_same_categories(own: Sequence[Category], wanted: Sequence[Category], path: Path) -> None:
    names = {category.id: category.name for category in wanted}
    for category in own:
        if category.id not in names:
            known = ", ".join(f"{c.id} '{c.name}'" for c in wanted[:5])
            raise UserError(
                f"Annotation file {path} has the category {category.id} '{category.name}', which the model does not "
                f"know; it was trained on {len(wanted)} categories ({known}, ...). Use annotations with the same "
                "categories for training and evaluation."
            )
        if names[category.id] not in (category.name, str(category.id)):  # weights without names have ids for names
            raise UserError(
                f"Annotation file {path} calls category {category.id} '{category.name}', but the model was trained "
                f"with '{names[category.id]}' under that id. Use the same ids and names for training and evaluation."
            )


def _records(content: dict[str, Any], categories: Sequence[Category], path: Path) -> tuple[list[ImageRecord], set[int]]:
    """All images with their usable objects, and the ids of unusable annotations."""
    _check_ids(content["images"], "images", path)
    _check_ids(content["annotations"], "annotations", path)
    label_of = {category.id: label for label, category in enumerate(categories)}
    sizes = {entry["id"]: _size(entry, path) for entry in content["images"]}
    boxes: dict[int, list[list[float]]] = defaultdict(list)
    labels: dict[int, list[int]] = defaultdict(list)
    dropped: dict[int, str] = {}
    for entry in content["annotations"]:
        image, category = entry.get("image_id"), entry.get("category_id")
        if not isinstance(image, int) or image not in sizes:
            raise UserError(
                f"{path}: annotation {entry['id']} belongs to image {_brief.repr(image)}, which 'images' does not "
                "list. Add it there, or remove the annotation."
            )
        if not isinstance(category, int) or category not in label_of:
            raise UserError(
                f"{path}: annotation {entry['id']} has the category {_brief.repr(category)}, which is not among the "
                f"{len(label_of)} known ones ({', '.join(map(str, list(label_of)[:10]))}). Add it to 'categories', "
                "or correct the annotation."
            )
        if not _is_finite(entry.get("area", 0)):
            raise UserError(
                f"{path}: annotation {entry['id']} has the area {_brief.repr(entry['area'])}, wanted a number of "
                "pixels. Correct it, or leave it out."
            )
        box, problem = _clipped_box(entry, sizes[image], path)
        if problem:
            dropped[entry["id"]] = problem
        if problem or entry.get("iscrowd", 0):
            continue
        boxes[image].append(box)
        labels[image].append(label_of[category])
    _report_dropped(dropped, sum(map(len, boxes.values())), path)
    records = [
        ImageRecord(
            id=entry["id"],
            file_name=_file_name(entry, path),
            size=sizes[entry["id"]],
            boxes=np.array(boxes[entry["id"]], dtype=np.float32).reshape(-1, 4),
            labels=np.array(labels[entry["id"]], dtype=np.int64),
        )
        for entry in content["images"]
    ]
    return records, set(dropped)


def _clipped_box(entry: dict[str, Any], size: tuple[int, int], path: Path) -> tuple[list[float], str]:
    """The annotation's box as xyxy inside the image, and what makes it unusable ('' where nothing does)."""
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise UserError(
            f"{path}: annotation {entry['id']} has the bbox {_brief.repr(box)}, wanted [x, y, width, height] in pixels."
        )
    x, y, width, height = box
    if not all(map(_is_finite, box)):
        return [], "NaN or infinite"
    if width < 0 or height < 0:
        return [], "of negative size"
    if width == 0 or height == 0:
        return [], "of zero size"
    x1, y1 = max(x, 0.0), max(y, 0.0)
    x2, y2 = min(x + width, size[1]), min(y + height, size[0])
    return [x1, y1, x2, y2], "" if x1 < x2 and y1 < y2 else "outside the image"


def _is_finite(value: Any) -> bool:
    """Whether it is a number, and also as a float finite: JSON has whole numbers of any length."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _report_dropped(dropped: dict[int, str], kept: int, path: Path) -> None:
    if not dropped:
        return
    counts = ", ".join(f"{count} {problem}" for problem, count in Counter(dropped.values()).items())
    if kept == 0:
        raise UserError(
            f"{path}: not one of the {len(dropped)} boxes is usable ({counts}). Boxes are [x, y, width, height] in "
            "pixels of the image, with the origin at the top left."
        )
    logger.warning("%s: dropped %d of %d boxes: %s.", path, len(dropped), len(dropped) + kept, counts)


def _size(entry: dict[str, Any], path: Path) -> tuple[int, int]:
    height, width = entry.get("height"), entry.get("width")
    if not (isinstance(height, int) and isinstance(width, int) and 0 < height < 2**31 and 0 < width < 2**31):
        raise UserError(
            f"{path}: image {entry['id']} has width {_brief.repr(width)} and height {_brief.repr(height)}, wanted two "
            "positive whole numbers."
        )
    return height, width


def _file_name(entry: dict[str, Any], path: Path) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: image {entry['id']} has no 'file_name'.")
    parts = PureWindowsPath(name)  # which takes both kinds of slashes for one
    if parts.root or ".." in parts.parts or "\0" in name:
        raise UserError(
            f"{path}: image {entry['id']} has the file name {_brief.repr(name)}, which leads out of the image folder "
            "or is no name at all. Give names relative to the folder in data.train.images and data.val.images."
        )
    return name


def _check_ids(entries: Iterable[Any], kind: str, path: Path) -> None:
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        identity = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(identity, int) or isinstance(identity, bool) or not -(2**63) <= identity < 2**63:
            raise UserError(
                f"{path}: entry {position} of '{kind}' has the id {_brief.repr(identity)}, wanted a whole number."
            )
        if identity in seen:
            raise UserError(f"{path}: the id {identity} occurs twice in '{kind}'. Ids must be unique.")
        seen.add(identity)


def _check_files(folder: Path, records: Sequence[ImageRecord]) -> None:
    if not folder.is_dir():
        raise UserError(
            f"Image folder {folder} does not exist. Set data.root, or data.train.images and data.val.images."
        )
    # One listing a folder instead of one system call an image; links alone are looked at.
    root, present, leading_out = folder.resolve(), set(), set()
    for parent in {PurePosixPath(record.file_name).parent for record in records}:
        if not (folder / parent).is_dir():
            continue
        inside = (folder / parent).resolve().is_relative_to(root)
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                name = str(parent / entry.name)
                if entry.is_file():
                    present.add(name)
                if not inside or (entry.is_symlink() and not Path(entry).resolve().is_relative_to(root)):
                    leading_out.add(name)
    missing = [record.file_name for record in records if str(PurePosixPath(record.file_name)) not in present]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(records)} image files are missing in {folder}, the first is "
            f"{_brief.repr(missing[0])}. Complete the folder, or remove the images from the annotation file."
        )
    outside = [record.file_name for record in records if str(PurePosixPath(record.file_name)) in leading_out]
    if outside:
        raise UserError(
            f"{len(outside)} of {len(records)} image files are links that lead out of {folder}, the first is "
            f"{_brief.repr(outside[0])}. Put the files themselves there, or name the folder that holds them all."
        )
