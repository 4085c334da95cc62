"""Batches of a training, and where they come from."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, runtime_checkable

from detr.engine.profile import phase
from detr.types import ImageBatch, Target

Batch = tuple[ImageBatch, Sequence[Target]]


@runtime_checkable
class Loader(Protocol):
    """Training batches that are determined by their place in the training."""

    batch_size: int

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """So many batches at a time; what is left over at the end is dropped."""
    iterator = iter(batches)
    while True:
        with phase("data"):
            group = list(islice(iterator, size))
        if len(group) < size:
            return
        yield group
