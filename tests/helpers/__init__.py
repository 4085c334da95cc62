"""Inputs that several test files make."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from detr.models.backbones.base import Backbone
from detr.types import ImageBatch, Target


class TinyBackbone(Backbone):
    """Stride 16, batch norm, 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.strides, self.stages = [24], [16], ("body",)
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 4, stride=4),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 4, stride=4),
            nn.BatchNorm2d(24),
        )

    def modules_of(self, stage: str) -> list[nn.Module]:
        return [self.body]

    def plug(self, placements: object) -> None:
        """Attention blocks go to the neck only."""

    def forward(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [self.body(images)]


def make_batch(images: list[torch.Tensor]) -> ImageBatch:
    """Float images of several sizes, padded as the loader pads."""
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = False
    return ImageBatch(images=batch, mask=mask, padded=bool(mask.any()))


def make_target(labels: torch.Tensor, boxes: torch.Tensor, image_id: int = 0) -> Target:
    return Target(labels=labels, boxes=boxes, image_id=image_id, original_size=(100, 100))


def random_targets(counts: list[int], num_classes: int, seed: int = 0) -> list[Target]:
    generator = torch.Generator().manual_seed(seed)
    return [
        make_target(
            torch.randint(num_classes, (count,), generator=generator),
            torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
            image_id=100 + index,
        )
        for index, count in enumerate(counts)
    ]


def torchrun(options: list[str], *more: str) -> list[str]:
    """The command that trains in two processes. more: options of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, *more, "train.py", *options]


def with_small_disk(folder: str | Path, size: str) -> tuple[list[str], str]:
    """A command that runs a shell script with mounts of its own, and the script's beginning, which mounts the disk.

    Skips the test where that is not allowed.
    """
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder}"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], check=False).returncode:
        pytest.skip(f"needs the right to mount a small disk at {folder} for one process")
    return namespace, mount
