"""Which device a command uses."""

import re

import torch

from detr import distributed
from detr.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device that `device` names; cuda for `auto`, where there is one; of several processes each gets its own GPU.

    Raises UserError where it cannot be had.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"device: wanted auto, cpu, cuda, cuda:N or mps, got '{name}'.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps was asked for, but torch finds no Apple GPU here. Set device=cpu or device=auto.")
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count:
        raise UserError(
            f"device={name} was asked for, but torch finds {count or 'no'} CUDA devices. Set device=cpu or device=auto."
        )
    return _of_process(count) if name == "cuda" and distributed.launched() else torch.device(name)


def _of_process(count: int) -> torch.device:
    """The GPU of this one of several processes, which torch then takes for `cuda`."""
    index = distributed.local_rank()
    if index >= count:
        raise UserError(
            f"This machine has {count} CUDA devices, too few for its process {index}. Start one process for each with "
            "torchrun --nproc_per_node, or set device=cpu."
        )
    torch.cuda.set_device(index)
    return torch.device(f"cuda:{index}")
