"""The processes that prepare batches, and what becomes of them."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from os import setpgrp
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, get_worker_info

from detr.errors import UserError
from detr.images import pad_to_batch
from detr.types import ImageBatch, Target

Batch = tuple[ImageBatch, list[Target]]
_ALIGNMENT = 8  # bytes, which every dtype's size divides


class BatchLoader:
    """torch's loader for batches of images and targets; lost workers are a UserError, at the next batch.

    workers: processes that prepare batches; 0 prepares them in this process. pad_to: images are padded to a multiple of
    so many pixels. options: further ones of torch's loader.
    """

    def __init__(self, dataset: Dataset[Any], *, workers: int, pad_to: int, **options: Any) -> None:
        with _any_number():
            self._loader = DataLoader(
                dataset,
                collate_fn=partial(collate, pad_to=pad_to),
                num_workers=workers,
                worker_init_fn=_begin,
                pin_memory=torch.cuda.is_available(),
                **options,
            )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        with explained():
            if self._loader.num_workers > 0:
                _check_semaphores(8 + 4 * self._loader.num_workers)
            with _any_number(), _deaths_unheard():
                batches = iter(self._loader)
            yield from batches


@contextmanager
def _any_number() -> Iterator[None]:
    """Without torch's warnings about more workers than cores: these wait for files too, and never freeze unheard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


@contextmanager
def explained() -> Iterator[None]:
    """Errors of loading in other processes as a UserError, where it is known what they mean and what to do."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        lost = isinstance(error, ConnectionError | EOFError)
        message = _explanation("DataLoader worker (pid unknown) closed its connection" if lost else str(error))
        if message is None:
            raise
        raise UserError(message) from error


def collate(samples: Sequence[tuple[Tensor, Target]], pad_to: int = 1) -> Batch:
    """Pad the images of several samples to one batch."""
    images, targets = zip(*samples, strict=True)
    batch = pad_to_batch(images, pad_to)
    return (batch, list(targets)) if get_worker_info() is None else _in_shared_memory(batch, targets)


def _in_shared_memory(batch: ImageBatch, targets: Sequence[Target]) -> Batch:
    """Ready to be sent to the training process.

    torch would do this in a thread, whose errors it only prints: the training would wait for the batch for ever. All
    targets together take one piece of memory, because each piece is an open file, of which there are not many.
    """
    tensors = [tensor for target in targets for tensor in target.tensors().values()]
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    memory = iter(torch.empty(sum(sizes), dtype=torch.uint8).share_memory_().split(sizes))

    def move(tensor: Tensor) -> Tensor:
        return next(memory)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return batch.map(Tensor.share_memory_), [target.map(move) for target in targets]


def _begin(worker: int) -> None:
    """What a worker does first."""
    # Signals to the whole group, as from Ctrl-C, must not end workers before the training process has saved.
    setpgrp()
    # Batches are sent by threads, whose errors are only printed: the training would wait for the batch for ever.
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    sys.excepthook = _end


def _send_error(queue: Any, error: Exception, message: tuple[int, Any]) -> None:
    """In place of a batch, given by its number and content, that cannot be sent."""
    queue.put((message[0], ExceptionWrapper(where="in a process that loads images")))


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The training process sees that the worker is gone."""
    os._exit(1)


@contextmanager
def _deaths_unheard() -> Iterator[None]:
    """Keep torch from raising the death of a worker in the midst of a training step; the next batch reports it too."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _check_semaphores(count: int) -> None:
    """Processes talk through these; where there is no memory for them, torch's loader would leave a traceback."""
    try:
        [multiprocessing.Lock() for _ in range(count)]
    except OSError as error:
        raise UserError(_without_shared_memory(str(error))) from error


def _without_shared_memory(reason: str) -> str:
    state = "cannot be used" if "Read-only" in reason or "denied" in reason else "is full"
    return (
        f"Shared memory {state}: {reason}. In Docker set --ipc=host or a larger --shm-size; or lower data.workers or "
        "data.batch_size. data.workers=0 needs no shared memory."
    )


def _explanation(error: str) -> str | None:
    """What an error of torch's loader means and what to do about it, where that is known."""
    if "Too many open files" in error or "ancdata" in error:
        return (
            "The processes that load images have too many files open. Raise the limit with ulimit -n, or lower "
            "data.workers."
        )
    if "shared memory" in error:
        return _without_shared_memory(error.splitlines()[-1])
    if "DataLoader worker (pid" in error or "in memory thread exited" in error:
        return (
            f"A process that loads images died: {error.splitlines()[0]}. Either the main memory is full, or the shared "
            "memory is too small (in Docker set --ipc=host or a larger --shm-size), or too many files are open (raise "
            "ulimit -n). Lower data.workers; data.workers=0 loads images in the training process."
        )
    return None
