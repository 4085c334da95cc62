"""Small data sets."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets import DetectionDataset
from datasets.formats.coco import read_coco
from detr.config import compose
from detr.errors import UserError


def coco_set(
    images: Path, annotations: Path, transforms: Callable[..., Any] | None = None, **options: Any
) -> DetectionDataset:
    return DetectionDataset(read_coco(images=images, annotations=annotations), transforms, **options)


def shapes_set(
    root: Path, split: str = "train", transforms: Callable[..., Any] | None = None, **options: Any
) -> DetectionDataset:
    """A split of the generated shapes."""
    return coco_set(root / split, root / f"instances_{split}.json", transforms, **options)


def refusal(override: str) -> str:
    """A pattern of the message with which the configuration refuses an override: data sets use the same words."""
    with pytest.raises(UserError) as refused:
        compose([override])
    return f"^{re.escape(str(refused.value))}$"
