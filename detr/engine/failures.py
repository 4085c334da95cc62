"""What a failed step was made of, kept so that it can be looked into."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detr import distributed
from detr.contents import (
    FLOATS,
    Misfit,
    check_content,
    flag,
    items,
    maybe,
    number,
    plain,
    record,
    state_dict,
    tensor,
    text,
    whole,
)
from detr.engine.batches import Batch
from detr.errors import UserError
from detr.files import read_tensors, write_tensors
from detr.types import ImageBatch, Target

FORMAT = "detr-failure-4"

_IMAGES = record(
    images=tensor(torch.uint8, dims=4, least=0), mask=tensor(torch.bool, dims=3, least=0), padded=maybe(flag)
)
_TARGET = record(
    labels=tensor(torch.int64, dims=1, least=0),
    boxes=tensor(*FLOATS, dims=2),
    image_id=whole(-(2**63), 2**63 - 1),
    original_size=items(whole(1), count=2),
)


def _batch(value: Any, place: str) -> None:
    record(images=_IMAGES, targets=items(_TARGET))(value, place)
    images, mask = value["images"]["images"], value["images"]["mask"]
    if images.shape[1] != 3 or not images.numel() or mask.shape != (len(images), *images.shape[2:]):
        raise Misfit(f"{place}.images", "images (B, 3, H, W) with a mask (B, H, W)", images)
    if len(value["targets"]) != len(images):
        raise Misfit(f"{place}.targets", "a target for each image", value["targets"])
    for index, target in enumerate(value["targets"]):
        if target["boxes"].shape != (len(target["labels"]), 4):
            raise Misfit(f"{place}.targets[{index}].boxes", "a box for each label", target["boxes"])


def _config(value: Any, place: str) -> None:
    plain(value, place)
    record(model=plain, criterion=plain, trainer=record())(value, place)


_PARTS = record(
    model=state_dict,
    frozen=items(text),
    evaluated=items(text),
    batches=items(_batch),
    step=whole(),
    seed=whole(),
    process=whole(),
    first=whole(),
    scale=number(0, 1e38),
    config=_config,
    categories=items(record(id=whole(-(2**63), 2**63 - 1), name=text)),
)


def _content(value: Any, place: str) -> None:
    _PARTS(value, place)
    labels = [label for row in value["batches"] for target in row["targets"] for label in target["labels"].tolist()]
    if max(labels, default=-1) >= len(value["categories"]):
        raise Misfit("batches", f"labels below {len(value['categories'])}, the number of classes", max(labels))
    if not value["batches"]:
        raise Misfit("batches", "one batch at least", value["batches"])


def save(
    run_dir: Path,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    step: int,
    seed: int,
    place: tuple[int, int],
    scale: float,
    metadata: Mapping[str, Any],
) -> Path:
    """Write failures/step-N.pt, each process its own: the batches, the weights, what the randomness follows from.

    Parameters that do not train (`frozen`) and modules in evaluation mode (`evaluated`) are kept by name, because they
    may depend on the epoch. place: the process of the TrainingStep, and the number of its first batch.
    scale: of the loss, for fp16; 1 without.
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
        "process": place[0],
        "first": place[1],
        "scale": scale,
    }
    write_tensors(path, {**metadata, **content})
    return path


def load(path: str | Path) -> dict[str, Any]:
    """The content of a file that `save` wrote, with batches as the training had them; UserError for another file.

    What is in batches and weights may be NaN: that is what is looked for.
    """
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} holds no failed step that this version saved. Give a file of a run's failures folder.")
    check_content(content, _content, path)
    content["batches"] = [
        (ImageBatch(**row["images"]), [Target(**target) for target in row["targets"]]) for row in content["batches"]
    ]
    return content
