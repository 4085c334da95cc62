"""Where the time of a training step goes."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

logger = logging.getLogger(__name__)

_WAIT, _WARMUP, STEPS = 5, 2, 5  # the first steps are slower than those that follow
_OPERATIONS = 30


def phase(name: str) -> record_function:
    """A context manager around a part of a step, which the summary lists."""
    return record_function(f"step/{name}")


@contextmanager
def profiled(run_dir: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Record some steps; what it gives is to be called after each of them.

    Writes profile/trace.json, for chrome://tracing or ui.perfetto.dev, and profile/summary.txt: the time of each phase
    and of the operations that take most. Nothing is written where the training is shorter than the steps before these.
    """

    def write(profiler: profile) -> None:
        folder = run_dir / "profile"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        (folder / "summary.txt").write_text(summary(profiler, device))
        logger.info("The profile of %d steps is in %s.", STEPS, folder)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    chosen = schedule(wait=_WAIT, warmup=_WARMUP, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=chosen, on_trace_ready=write) as profiler:
        yield profiler.step


def summary(profiler: profile, device: torch.device) -> str:
    """Milliseconds of a step by phase, on the CPU and, where there is one, on the GPU; then the longest operations."""
    events = profiler.key_averages()
    phases = [event for event in events if event.key.startswith("step/") and event.cpu_time_total]
    whole = sum(event.cpu_time_total for event in phases)
    lines = [f"{'phase':<12}{'CPU, ms':>10}{'share':>8}{'GPU, ms':>10}"]
    lines += [
        f"{event.key.removeprefix('step/'):<12}{event.cpu_time_total / STEPS / 1000:>10.2f}"
        f"{event.cpu_time_total / whole:>8.1%}{event.device_time_total / STEPS / 1000:>10.2f}"
        for event in sorted(phases, key=lambda event: -event.cpu_time_total)
    ]
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return "\n".join([*lines, "", events.table(sort_by=order, row_limit=_OPERATIONS)])
