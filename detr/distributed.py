"""The processes of one run; the only file that imports torch.distributed.

A run of one process needs none of this: every function here then does nothing, or hands back what it was given.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr.errors import UserError

T = TypeVar("T")
_ROLL_CALL = timedelta(seconds=20)  # for processes to answer, when one waited in vain
_LOST = re.compile(r"by peer|broken pipe|connection refused|gloo", re.IGNORECASE)  # what gloo says of one that is gone
_SHOWN = 5  # differences in a message
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def launched() -> bool:
    """Whether torchrun, submitit, or another launcher with torchrun's variables, started this as one of several."""
    if "SUBMITIT_EXECUTOR" in os.environ and "RANK" not in os.environ:
        # From here on as if torchrun had started it.
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return _number("WORLD_SIZE", 1, default=1) > 1


def rank() -> int:
    """Number of this process, from 0. Process 0 alone writes."""
    return dist.get_rank() if _running() else 0


def local_rank() -> int:
    """Number of this process among those of its machine: the index of its GPU."""
    return _number("LOCAL_RANK", 0, default=0) if launched() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if _running() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside it this process is the only one of its run: it shares nothing with the others, and waits for none."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def part(count: int, process: int | None = None) -> range:
    """The share of one process, this one unless given, of so many things in a row. Shares differ by one at most."""
    number, processes = rank() if process is None else process, world_size()
    return range(number * count // processes, (number + 1) * count // processes)


@contextmanager
def process_group(device: torch.device, timeout: float = 10.0) -> Iterator[None]:
    """Inside it the processes of a launched run know one another.

    timeout: minutes that one may wait for the others. Raises UserError where they do not find one another, where that
    is over, and where one of them is gone; it names those that do not answer.
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
    limit, place = timedelta(minutes=timeout), _meeting_point()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(_not_met(error, place, timeout)) from error
    try:
        yield
    except RuntimeError as error:
        raise _explained(error, limit) from error
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


def share(model: nn.Module) -> None:
    """Give all processes the weights and buffers that the model has in process 0."""
    if world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes. The order in which floats are added is up to their number and the network."""
    if world_size() == 1:
        return value
    result = value.clone()
    dist.all_reduce(result)
    return result


def mean(value: Tensor) -> Tensor:
    """Average of a tensor over all processes."""
    return total(value) / world_size()


def transposed(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """From some rows with all their columns to all rows with some of their columns.

    rows: (own rows, columns). counts: rows of each process. Returns (sum of counts, columns / processes), rows in the
    order of the processes. The columns are filled up with zeros where they cannot be divided evenly; `gather` joins
    what becomes of them.
    """
    if world_size() == 1:
        return rows
    width = -(-rows.shape[1] // world_size())
    filled = nn.functional.pad(rows, (0, width * world_size() - rows.shape[1]))
    sent = filled.view(len(rows), world_size(), width).transpose(0, 1).reshape(-1, width)
    received = rows.new_empty(sum(counts), width)
    dist.all_to_all_single(received, sent, [*counts], [len(rows)] * world_size())
    return received


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


def by_first(work: Callable[[], T]) -> T:
    """What `work` gives in process 0, which alone does it; a UserError of it is raised in all processes."""
    if world_size() == 1:
        return work()
    done: T | None = None
    failure: UserError | None = None
    if rank() == 0:
        try:
            done = work()
        except UserError as error:
            failure = error.with_traceback(None)
    done, failure = from_first((done, failure))
    if failure is not None:
        raise failure
    return cast(T, done)


def check_same(values: Mapping[str, str]) -> None:
    """Raise UserError, in all processes, where one of them has other values than process 0.

    values: by name; the message has those that differ, and where.
    """
    everyone = gather_objects((socket.gethostname(), dict(values)))
    if message := from_first(_differences(everyone)):
        raise UserError(message)


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
    return dist.is_available() and dist.is_initialized() and not _ALONE.get()


def _number(name: str, least: int, below: int | None = None, default: int | None = None) -> int:
    """A number from the environment. Raises UserError where it is missing, unless it has a default, or out of range."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is not None and re.fullmatch(r"\s*\d{1,9}\s*", text) and least <= int(text) < (below or int(text) + 1):
        return int(text)
    raise _launched_wrongly(name, f"a number of at least {least}{f' and below {below}' if below else ''}")


def _meeting_point() -> str:
    """Where the processes look for one another. Raises UserError where a launcher's variables are not complete."""
    _number("RANK", 0, _number("WORLD_SIZE", 1))
    address, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 1, 65536)
    if not re.fullmatch(r"[\w.:%-]+", address):
        raise _launched_wrongly("MASTER_ADDR", "the name or address of the first machine")
    return f"{address}:{port}"


def _launched_wrongly(name: str, wanted: str) -> UserError:
    got = f"is '{os.environ[name]}'" if name in os.environ else "is not set"
    return UserError(
        f"The environment variable {name} {got}, wanted {wanted}. Start several processes with torchrun, or give each "
        "of them RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset WORLD_SIZE for a training of one process."
    )


def _not_met(error: Exception, place: str, timeout: float) -> str:
    """Why the processes did not find one another."""
    number, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return (
            f"Process {number} of {count} cannot listen on {place}: the port is in use, by another training, or by a "
            "process that has RANK=0 too. Set another MASTER_PORT (torchrun: --master-port, or --rdzv-endpoint) for "
            "all of them."
        )
    return (
        f"Process {number} of {count} did not find the others at {place} within {timeout:g} minutes (trainer.timeout): "
        f"{_first_line(error)}. See to it that all {count} of them run, that they have different RANKs and the same "
        "MASTER_ADDR and MASTER_PORT, and that these can be reached."
    )


def _differences(everyone: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """A message about the values in which processes differ from process 0. everyone: host and values of each."""
    if not everyone:
        return None  # not in process 0
    host, first = everyone[0]
    found = [
        f"{name} is {own.get(name, 'absent')} in process {number} on {its_host}, {first.get(name, 'absent')} in "
        f"process 0 on {host}"
        for number, (its_host, own) in enumerate(everyone)
        for name in {**first, **own}
        if own.get(name) != first.get(name)
    ]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"The processes of this run differ: {'; '.join(found[:_SHOWN])}{more}. Start all of them with the same "
        "command, the same code and the same data."
        if found
        else None
    )


def _explained(error: RuntimeError, limit: timedelta) -> Exception:
    """What went wrong between the processes, with those that no longer answer."""
    timed_out = isinstance(error, dist.DistError) or "timed out" in str(error).lower()
    if not timed_out and not _LOST.search(str(error)):
        return error
    absent = _absent(min(limit, _ROLL_CALL if timed_out else _ROLL_CALL / 4))
    missing = (
        f" Of processes 0 to {world_size() - 1} these do not answer: {', '.join(map(str, absent))}." if absent else ""
    )
    what = "waited in vain for another one" if timed_out else "lost the connection to another one"
    return UserError(
        f"Process {rank()} of {world_size()} {what}: {_first_line(error)}.{missing} "
        "See that process's own messages; it may be out of memory, or its machine or network may be gone. Start all of "
        "them again with trainer.resume=auto."
    )


def _absent(wait: timedelta) -> list[int]:
    """Numbers of the processes that do not answer within some time; connections on which one waited are closed."""
    call, absent = f"roll call {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}, process ", [0]
    with suppress(RuntimeError):  # who keeps the list is gone
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        answers = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=wait)
        answers.set(f"{call}{rank()}", "here")
        until = time.monotonic() + wait.total_seconds()
        while absent and time.monotonic() < until:
            absent = [number for number in range(world_size()) if not answers.check([f"{call}{number}"])]
            time.sleep(0.1)
    return absent


def _first_line(error: Exception) -> str:
    """What torch says, without the place in its own sources and the rank before it."""
    return re.sub(r"^\[[^]]*\]:? ", "", str(error).splitlines()[0]).partition(". ")[0].rstrip(".")
