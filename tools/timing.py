"""Time measured side by side."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch


def medians(calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, as in `in_turns`."""
    seconds = in_turns({name: partial(timed, call) for name, call in calls.items()}, repeats, warmup)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_turns(runs: Mapping[str, Callable[[], float]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """The seconds of each run, which every one of them returns, turn by turn, without those of the warm-up.

    They take turns, A B C A B C, so that whatever else the machine does slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            found = run()
            if turn >= warmup:
                seconds[name].append(found)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, with what it leaves to the device."""
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
