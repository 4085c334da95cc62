"""The processes of one run; the only file that imports torch.distributed.

A run of one process needs none of this: every function here then does nothing, or hands back what it was given.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr.errors import UserError

T = TypeVar("T")
_ROLL_CALL = timedelta(seconds=20)  # for processes to answer, when one waited in vain


def launched() -> bool:
    """Whether torchrun, submitit, or another launcher with torchrun's variables, started this as one of several."""
    if "SUBMITIT_EXECUTOR" in os.environ and "RANK" not in os.environ:
        # From here on as if torchrun had started it.
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Number of this process, from 0. Process 0 alone writes."""
    return dist.get_rank() if _running() else 0


def local_rank() -> int:
    """Number of this process among those of its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if _running() else 1


@contextmanager
def process_group(device: torch.device, timeout: float = 10.0) -> Iterator[None]:
    """Inside it the processes of a launched run know one another.

    timeout: minutes that one may wait for the others. Raises UserError, which names those that did not come, where that
    is over.
    """
    if not launched():
        yield
        return
    started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if started_again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # They would look for one another where those before them were, and wait for ever.
        raise UserError(
            "torchrun starts its processes again only where each start has a meeting point of its own. Set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun --max_restarts=..., and start again with "
            "trainer.resume=auto."
        )
    limit = timedelta(minutes=timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit)
    # Of its own: a connection on which one waited in vain is closed. The others but the first wait as long as it says.
    roll_call = dist.new_group(backend="gloo", timeout=min(limit, _ROLL_CALL))
    try:
        yield
    except RuntimeError as error:
        raise _explained(error, limit, roll_call) from error
    finally:
        if sys.exc_info()[0] is None:  # after an error the others may be gone: waiting for them would hide it
            dist.destroy_process_group()


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over the processes; the same model in a run of one."""
    if world_size() == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def without_sharing(model: nn.Module) -> AbstractContextManager[None]:
    """Inside it gradients of what `parallel` returned stay in their process, to be shared with those that follow."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def mean(value: Tensor) -> Tensor:
    """Average of a tensor over all processes."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    if world_size() == 1:
        return flag
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def gather(value: Tensor) -> Tensor:
    """Tensors of the same shape, of all processes, one after the other along the first dimension."""
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)


def gather_objects(value: T) -> list[T]:
    """Any value of each process, in their order, in process 0; empty elsewhere."""
    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, parts or None)
    return parts


def from_first(value: T) -> T:
    """The value that process 0 has."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Inside it the first process of each machine goes before the others, which then find the work done."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _explained(error: RuntimeError, limit: timedelta, roll_call: Any) -> Exception:
    """What went wrong between the processes, with the ranks that no longer answer."""
    if not isinstance(error, dist.DistError) and "timed out" not in str(error).lower():
        return error
    missing = ""
    try:
        dist.monitored_barrier(roll_call, timeout=min(limit, _ROLL_CALL), wait_all_ranks=True)
    except RuntimeError as answer:
        missing = f" {_first_line(answer)}."
    return UserError(
        f"Process {rank()} of {world_size()} waited in vain for another one: {_first_line(error)}.{missing} "
        "See that process's own messages; it may be out of memory, or its machine or network may be gone. Start all of "
        "them again with trainer.resume=auto."
    )


def _first_line(error: Exception) -> str:
    """What torch says, without the place in its own sources and the rank before it."""
    return re.sub(r"^\[[^]]*\]:? ", "", str(error).splitlines()[0]).rstrip(".")
