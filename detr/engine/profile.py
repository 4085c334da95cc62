"""Where the time of a training step goes."""

import torch
from torch.profiler import profile, record_function

_OPERATIONS = 30


def phase(name: str) -> record_function:
    """A context manager around a part of a step, which the summary lists."""
    return record_function(f"step/{name}")


def summary(profiler: profile, device: torch.device, steps: int) -> str:
    """Milliseconds of a step by phase, on the CPU and, where there is one, on the GPU; then the longest operations.

    steps: how many the profiler recorded.
    """
    events = profiler.key_averages()
    phases = [event for event in events if event.key.startswith("step/") and event.cpu_time_total]
    whole = sum(event.cpu_time_total for event in phases)
    lines = [f"{'phase':<12}{'CPU, ms':>10}{'share':>8}{'GPU, ms':>10}"]
    lines += [
        f"{event.key.removeprefix('step/'):<12}{event.cpu_time_total / steps / 1000:>10.2f}"
        f"{event.cpu_time_total / whole:>8.1%}{event.device_time_total / steps / 1000:>10.2f}"
        for event in sorted(phases, key=lambda event: -event.cpu_time_total)
    ]
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return "\n".join([*lines, "", events.table(sort_by=order, row_limit=_OPERATIONS)])
