"""What a failed step was made of, kept so that it can be looked into."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from detr import distributed
from detr.engine.batches import Batch
from detr.errors import UserError
from detr.files import read_tensors, write_tensors
from detr.types import ImageBatch, Target

FORMAT = "detr-failure-2"


def save(
    run_dir: Path, model: nn.Module, batches: Sequence[Batch], step: int, seed: int, metadata: Mapping[str, Any]
) -> Path:
    """Write failures/step-N.pt, each process its own: the batches, the weights, what the randomness follows from.

    Parameters that do not train (`frozen`) and modules in evaluation mode (`evaluated`) are kept by name, because they
    may depend on the epoch.
    """
    process = distributed.rank()
    name = f"step-{step}-process-{process}.pt" if distributed.world_size() > 1 else f"step-{step}.pt"
    path = run_dir / "failures" / name
    content = {
        "format": FORMAT,
        "model": model.state_dict(),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "evaluated": [name for name, module in model.named_modules() if not module.training],
        "batches": [
            {"images": vars(batch), "targets": [vars(target) for target in targets]} for batch, targets in batches
        ],
        "step": step,
        "seed": seed,
        "process": process,
    }
    write_tensors(path, {**metadata, **content})
    return path


def load(path: str | Path) -> dict[str, Any]:
    """The content of a file that `save` wrote, with batches as the training had them; UserError for another file."""
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} holds no failed step that this version saved. Give a file of a run's failures folder.")
    content["batches"] = [
        (ImageBatch(**row["images"]), [Target(**target) for target in row["targets"]]) for row in content["batches"]
    ]
    return content
