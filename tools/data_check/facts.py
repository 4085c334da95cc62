"""What a part of a data set holds, in numbers, and what becomes of its boxes before the model sees them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from datasets import Augmentation, DetectionDataset
from datasets.findings import Finding, some
from datasets.formats.base import ImageRecord
from datasets.image_checks import ImageFile
from detr.images import model_size

SMALL, LARGE = 32**2, 96**2  # areas in pixels, below and above which COCO calls objects small and large
CELL = 8  # pixels of a side of the finest feature map's cells, in all models for few images and in RT-DETR
_TINY = CELL / 2
_SIZES = 5  # of images, the most frequent ones
_DRAWN = 100  # images whose augmentation is drawn
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Part:
    """A part of a data set with all that was found in it.

    annotated: the records as they were read, by file name, with the boxes that training drops.
    resized: (objects,) short side of each box in pixels after the resizing of evaluation.
    """

    name: str
    dataset: DetectionDataset
    annotated: dict[str, ImageRecord]
    files: Sequence[ImageFile]
    resized: np.ndarray


def short_sides(records: Sequence[ImageRecord], *, size: int, max_size: int, square: bool) -> np.ndarray:
    """(objects,) short side in pixels of each box but crowds, in images resized as in evaluation."""
    sides = [np.empty(0)]
    for record in records:
        height, width = model_size(*record.size, size, max_size, square=square)
        scale = np.array([width / record.size[1], height / record.size[0]])
        sides.append((record.boxes[~record.crowds, 2:] * scale).min(1, initial=np.inf))
    return np.concatenate(sides)


def of_part(part: Part) -> dict[str, Any]:
    """Counts and quantiles, ready for JSON."""
    dataset = part.dataset
    objects, per_class = dataset.objects_per_image(), dataset.count_by_category()
    images_of: Counter[int] = Counter()
    areas = [np.empty(0)]
    for record in dataset.records:
        images_of.update(np.unique(record.labels[~record.crowds]).tolist())
        areas.append(record.areas[~record.crowds])
    area = np.concatenate(areas)
    sizes = Counter(f"{record.size[1]} x {record.size[0]}" for record in dataset.records)
    levels = [file.levels for file in part.files if file.levels is not None]
    own = {category.id: rank for rank, category in enumerate(dataset.own_categories)}
    return {
        "source": str(dataset.source),
        "images": len(dataset),
        "objects": int(objects.sum()),
        "crowds": sum(int(record.crowds.sum()) for record in dataset.records),
        "images without objects": int((objects == 0).sum()),
        "objects an image": _quantiles(objects),
        "small, medium, large objects": [
            int(count)
            for count in ((area < SMALL).sum(), ((area >= SMALL) & (area <= LARGE)).sum(), (area > LARGE).sum())
        ],
        "sizes of images": dict(sizes.most_common(_SIZES)),
        "different sizes": len(sizes),
        "short side of boxes after resizing": _quantiles(part.resized),
        "gray levels used": _quantiles(np.array(levels)),
        "classes": [
            {
                "id": category.id,
                "name": category.name,
                "objects": int(count),
                "images": images_of[own[category.id]] if category.id in own else 0,
            }
            for category, count in zip(dataset.categories, per_class.tolist(), strict=True)
        ],
    }


def tiny_boxes(part: Part, size: int) -> list[Finding]:
    """Boxes that are narrower than half a cell of the finest feature map."""
    tiny = part.resized < _TINY
    if len(tiny) == 0 or tiny.mean() <= 0.1:
        return []
    counts = part.dataset.objects_per_image()
    first = int(np.repeat(np.arange(len(counts)), counts)[tiny.argmax()])
    name = part.dataset.records[first].file_name
    return [
        Finding(
            kind="tiny boxes",
            severity="warning",
            count=int(tiny.sum()),
            text=f"{int(tiny.sum())} of {len(tiny)} boxes are narrower than {_TINY:g} pixels after resizing to "
            f"data.size={size}, such as one in {name}.",
            advice=f"A cell of the finest feature map has {CELL}. Raise data.size, or cut images and boxes into tiles.",
            files=some([name]),
        )
    ]


def augmented(part: Part, augmentation: Augmentation) -> dict[str, Any] | None:
    """What training's transforms, without mixing, do to boxes: of all, and of those narrower than two cells before.

    None where there is nothing to draw. They work on empty images, so that nothing is read.
    """
    transforms = augmentation.recipe.transforms
    place = np.cumsum(part.dataset.objects_per_image())
    chosen = np.flatnonzero(part.dataset.objects_per_image())
    chosen = chosen[:: max(len(chosen) // _DRAWN, 1)][:_DRAWN].tolist()
    if transforms is None or not chosen:
        return None
    before, after = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for index in chosen:
            record = part.dataset.records[index]
            kept = record.select(~record.crowds)
            corners = torch.from_numpy(np.hstack((kept.boxes[:, :2], kept.boxes[:, :2] + kept.boxes[:, 2:]))).float()
            image = tv_tensors.Image(torch.zeros((3, *record.size), dtype=torch.uint8))
            objects = {
                "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=record.size),
                "labels": torch.arange(len(corners)),
            }
            image, objects = transforms(image, objects)
            limits = torch.tensor(image.shape[:0:-1]).repeat(2)
            boxes = objects["boxes"].as_subclass(Tensor).clamp(min=0).minimum(limits)
            sides = (boxes[:, 2:] - boxes[:, :2]).amin(1).clamp(min=0)
            drawn = torch.zeros(len(corners))
            drawn[objects["labels"]] = sides
            end = int(place[index])
            before.append(part.resized[end - len(corners) : end])
            after.append(drawn.numpy())
    old, new = np.concatenate(before), np.concatenate(after)
    small = old < 2 * CELL
    return {
        "images": len(chosen),
        "boxes": len(old),
        "lost": int((new <= 0).sum()),
        "narrow boxes": int(small.sum()),
        "narrow boxes lost": int((new[small] <= 0).sum()),
        "short side in evaluation": _quantiles(old),
        "short side in training": _quantiles(new[new > 0]),
    }


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    found = np.quantile(values, _QUANTILES)
    return {
        name: round(float(value), 1)
        for name, value in zip(("least", "10%", "median", "90%", "most"), found, strict=True)
    }
