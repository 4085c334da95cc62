"""The most memory that this process has held."""

from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def forget_peak_memory() -> None:
    """Let what is held now be the most that was held so far."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not on Linux, or not allowed: the peak is that of the whole process then
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Bytes of device memory, or of main memory where there is no device."""
    if torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    if _STATUS.exists():  # getrusage would count what the parent held when it started this process
        return int(_STATUS.read_text().partition("VmHWM:")[2].split()[0]) * 1024.0
    import resource  # which Windows does not have

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS
