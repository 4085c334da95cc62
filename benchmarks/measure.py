"""Processes, memory, threads, and the table of results."""

import ctypes
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from detr.memory import forget_peak_memory, peak_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One measurement.

    target: the largest value wanted of ours, or the smallest where `more_is_better`.
    published: the published code's value in the same run. elsewhere: the same, measured on another machine.
    """

    name: str
    unit: str
    ours: float
    target: float | None = None
    published: float | None = None
    elsewhere: float | None = None
    more_is_better: bool = False

    def cells(self) -> list[str]:
        target = "" if self.target is None else f"{'≥' if self.more_is_better else '≤'} {_number(self.target)}"
        better, worse = (self.ours, self.target) if self.more_is_better else (self.target, self.ours)
        met = "" if better is None or worse is None else "yes" if better >= worse else "no"
        ratio = ""
        if self.published is not None:
            gain = self.ours / self.published if self.more_is_better else self.published / self.ours
            ratio = f"{_number(gain)}x"
        published, elsewhere = _number(self.published), _number(self.elsewhere)
        return [self.name, self.unit, _number(self.ours), target, met, published, ratio, elsewhere]


def table(rows: Sequence[Row]) -> str:
    """All rows in markdown."""
    head = ["benchmark", "unit", "ours", "target", "met", "published, this run", "gain"]
    head.append("published, as measured on another 2-core machine")
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
