"""Rank, world size and averages over processes; the only file that imports torch.distributed."""

import torch.distributed as dist
from torch import Tensor


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process, 0 in a run of one process."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if is_initialized() else 1


def mean(value: Tensor) -> Tensor:
    """Average of a tensor over all processes; the same tensor in a run of one process."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()
