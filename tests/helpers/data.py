"""Small data sets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DetectionDataset
from datasets.formats.coco import read_coco


def coco_set(
    images: Path, annotations: Path, transforms: Callable[..., Any] | None = None, **options: Any
) -> DetectionDataset:
    return DetectionDataset(read_coco(images=images, annotations=annotations), transforms, **options)


def shapes_set(
    root: Path, split: str = "train", transforms: Callable[..., Any] | None = None, **options: Any
) -> DetectionDataset:
    """A split of the generated shapes."""
    return coco_set(root / split, root / f"instances_{split}.json", transforms, **options)
