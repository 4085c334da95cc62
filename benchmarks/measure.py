"""Processes, memory and threads."""

import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from detr.memory import forget_peak_memory, peak_memory

T = TypeVar("T")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """What `function` returns, without anything that this process holds in memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def extra_memory(call: Callable[[], object]) -> float:
    """Most memory that a call on the CPU holds beyond what this process held before it, in MiB."""
    # M_MMAP_THRESHOLD: from 64 KiB on, what is freed goes back at once, and does not stay with the process in pieces.
    ctypes.CDLL(None).mallopt(-3, 2**16)
    forget_peak_memory()
    before = peak_memory()
    call()
    return (peak_memory() - before) / 2**20
