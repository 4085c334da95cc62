"""World size and averages over processes; the only file that imports torch.distributed."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean(value: Tensor) -> Tensor:
    """Average of a tensor over all processes; the same tensor in a run of one process."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()
