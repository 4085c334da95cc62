"""From data sets to batches."""

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from datasets.detection import DetectionDataset
from datasets.workers import Batch, BatchLoader, explained
from detr import distributed
from detr.errors import UserError

logger = logging.getLogger(__name__)
_CHUNK = 50  # batches whose images are sorted together: enough to be similar, few enough to stay shuffled


Place = tuple[int, int, int | None]


class ShuffledBatches(Sampler[list[Place]]):
    """Batches of (epoch, index, size), in an order that follows from (seed, epoch). The last incomplete one is dropped.

    Each process has its part of every batch. aspects: those of the images, where similar ones are to share a batch.
    image_sizes: sizes of images, of which each batch draws one; none: `size` is None. dealt: each process has whole
    batches instead, its part of each so many in a row.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        aspects: Sequence[float] | None,
        image_sizes: Sequence[int] = (),
        dealt: int | None = None,
    ) -> None:
        self.size, self.batch_size, self.seed, self.image_sizes = size, batch_size, seed, image_sizes
        self.aspects = None if aspects is None else torch.tensor(aspects)
        self.rank, self.processes = (0, 1) if dealt else (distributed.rank(), distributed.world_size())
        self.dealt, self.own = dealt or 1, distributed.part(dealt) if dealt else range(1)
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[Place]]:
        # Within 64 bits, which is what a generator takes.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**64)
        batch = self.batch_size * self.processes
        order = torch.randperm(self.size, generator=generator)[: len(self) * batch]
        if self.aspects is not None:
            chunks = order.split(_CHUNK * batch)
            order = torch.cat([chunk[self.aspects[chunk].argsort(stable=True)] for chunk in chunks])
            order = order.view(-1, batch)[torch.randperm(len(self), generator=generator)]
        sizes: list[int | None] = [None] * len(self)
        if self.image_sizes:
            drawn = torch.randint(len(self.image_sizes), (len(self),), generator=generator)
            sizes = [self.image_sizes[index] for index in drawn.tolist()]
        parts = order.view(-1, self.processes, self.batch_size)[:, self.rank].tolist()
        for number in range(self.start, len(self)):
            if number % self.dealt in self.own:
                yield [(self.epoch, index, sizes[number]) for index in parts[number]]


class TrainLoader:
    """Endless training batches, each determined by the seed and its place (epoch, batch) alone.

    Processes of one run have each their part of the same batches, which are those of one process with larger batches.
    With `dealt` the batches are those of one process: of each so many in a row a process has its part.

    batch_size: images in a batch of each process. workers: processes that prepare them; 0 prepares them in the training
    process. group_by_aspect: batches of images with similar aspect ratios, which saves padding. pad_to: batches are
    padded to a multiple of so many pixels, which bounds the number of their shapes. image_sizes: sizes of images, of
    which each batch draws one; what it means is up to the data set.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_size: int,
        workers: int,
        seed: int,
        group_by_aspect: bool = False,
        pad_to: int = 1,
        image_sizes: Sequence[int] = (),
        dealt: int | None = None,
    ) -> None:
        processes = 1 if dealt else distributed.world_size()
        if len(dataset) < batch_size * processes:
            each = f" in each of {processes} processes" if processes > 1 else ""
            raise UserError(
                f"{dataset.source} has {len(dataset)} images, too few for one batch of {batch_size}{each}. "
                "Lower data.batch_size, or use more images."
            )
        if dataset.count_objects() == 0:
            raise UserError(
                f"{dataset.source} has no object to train on in its {len(dataset)} images: there is no annotation that "
                "is not a crowd (iscrowd). Train on annotated images, and see whether the file is the right one."
            )
        with explained():
            dataset.begin_training(workers=workers)
        self._dataset, self.batch_size = dataset, batch_size
        aspects = [record.size[1] / record.size[0] for record in dataset.records] if group_by_aspect else None
        self._sampler = ShuffledBatches(len(dataset), batch_size, seed, aspects, image_sizes, dealt)
        self._loader = BatchLoader(
            dataset, workers=workers, pad_to=pad_to, batch_sampler=self._sampler, persistent_workers=workers > 0
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from the one with index `start` on; at its end a warning of unreadable images."""
        self._sampler.epoch, self._sampler.start = epoch, start
        try:
            yield from self._loader
        finally:
            self._dataset.report_unreadable()


def evaluation_loader(dataset: DetectionDataset, *, batch_size: int, workers: int, pad_to: int = 1) -> Iterable[Batch]:
    """Every image once, in the order of the data set; raises UserError where there is none.

    Processes of one run take turns with batches, so that any number of them computes the same ones; with fewer batches
    than processes the last ones have none.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.source} lists no images, so there is nothing to evaluate on.")
    if dataset.count_objects() == 0:
        text = "%s has no object to be found in its %d images, so AP is -1. See whether the file is the right one."
        logger.warning(text, dataset.source, len(dataset))
    own = range(distributed.rank() * batch_size, len(dataset), distributed.world_size() * batch_size)
    batches = [range(start, min(start + batch_size, len(dataset))) for start in own]
    return BatchLoader(dataset, workers=workers, pad_to=pad_to, batch_sampler=batches)
