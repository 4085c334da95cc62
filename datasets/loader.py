"""From data sets to batches."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datasets.coco import CocoDetection
from detr import distributed
from detr.errors import UserError
from detr.images import pad_to_batch
from detr.types import ImageBatch, Target

Batch = tuple[ImageBatch, list[Target]]


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pad the images of several samples to one batch."""
    images, targets = zip(*samples, strict=True)
    return pad_to_batch(images), list(targets)


def _leave_process_group(worker: int) -> None:
    """Signals to the whole group, as from Ctrl-C, must not end workers before the training process has saved."""
    os.setpgrp()


class _ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), in an order that follows from (seed, epoch). The last incomplete batch is dropped.

    Each process has its part of what one process with a batch of all their images would have, in the same order.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * distributed.world_size())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.start, len(self)):
            first = (batch * distributed.world_size() + distributed.rank()) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


class TrainLoader:
    """Endless training batches, each determined by the seed and its place (epoch, batch) alone.

    batch_size: images in a batch of one process.
    workers: processes that prepare them; 0 prepares them in the training process.
    """

    def __init__(self, dataset: CocoDetection, *, batch_size: int, workers: int, seed: int) -> None:
        if len(dataset) < batch_size * distributed.world_size():
            processes = f" in each of {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
            raise UserError(
                f"{dataset.annotations} has {len(dataset)} images, too few for one batch of {batch_size}{processes}. "
                "Lower data.batch_size, or use more images."
            )
        self._dataset, self.batch_size = dataset, batch_size
        self._sampler = _ShuffledBatches(len(dataset), batch_size, seed)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=_leave_process_group,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def switch_transforms(self, transforms: Callable[..., Any], *, after: float, epochs: int) -> None:
        """Give training images other transforms after a fraction of the training, in whole epochs, at least one.

        after: 1.0 never switches. epochs: of the training, begun ones counted. Comes before the first epoch.
        Raises UserError where `after` is not in [0, 1].
        """
        if not 0 <= after <= 1:
            raise UserError(f"data.plain_after: wanted a fraction of the training in [0, 1], got {after}.")
        if after < 1:
            self._dataset.switch_transforms(transforms, min(round(after * epochs), epochs - 1))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from the one with index `start` on."""
        self._sampler.epoch, self._sampler.start = epoch, start
        return iter(self._loader)


def evaluation_loader(dataset: CocoDetection, *, batch_size: int, workers: int) -> Iterable[Batch]:
    """Every image once, in the order of the annotation file, by one of the processes; UserError where there is none."""
    if len(dataset) == 0:
        raise UserError(f"{dataset.annotations} lists no images, so there is nothing to evaluate on.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(distributed.rank(), len(dataset), distributed.world_size()),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_leave_process_group,
        pin_memory=torch.cuda.is_available(),
    )
