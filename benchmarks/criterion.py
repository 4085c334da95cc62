"""The set loss with its matching, on 6 decoder layers and a batch of 16 images with 617 objects."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.published import load
from benchmarks.results import Row
from detr.config import build_criterion, compose
from detr.types import Predictions, Target
from tools.timing import medians

LAYERS, BATCH, OBJECTS, CLASSES = 6, 16, 617, 91
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
# Queries: largest milliseconds wanted of the forward pass, and those of the published code on another machine.
FIGURES = {300: (80.0, 513.0), 100: (40.0, 213.0)}


def run(*, checkout: Path | None, device: str, repeats: int) -> Iterator[Row]:
    for queries, (target, elsewhere) in FIGURES.items():
        predictions, targets = _inputs(queries, device)
        losses = {"ours": _our_loss(predictions, targets, device)}
        if checkout is not None:
            losses["published"] = _published_loss(checkout, predictions, targets, device)
            torch.testing.assert_close(losses["published"](), losses["ours"](), rtol=1e-4, atol=0.0)

        both = {name: partial(_with_backward, loss, predictions) for name, loss in losses.items()}
        forward, backward = medians(losses, repeats), medians(both, repeats)
        case = f"{queries} queries"
        wanted = {"target": target, "elsewhere": elsewhere} if device == "cpu" else {}
        yield _row(case, "forward", forward, **wanted)
        yield _row(case, "forward and backward", backward)


def _row(case: str, quantity: str, seconds: dict[str, float], **figures: float) -> Row:
    milliseconds = {side: 1000 * value for side, value in seconds.items()}
    return Row(case, quantity, "ms", milliseconds["ours"], published=milliseconds.get("published"), **figures)


def _inputs(queries: int, device: str) -> tuple[Predictions, list[Target]]:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(LAYERS, BATCH, queries, CLASSES + 1))
    predictions = Predictions(
        logits=torch.tensor(logits, dtype=torch.float32, device=device, requires_grad=True),
        boxes=_boxes(generator, (LAYERS, BATCH, queries)).to(device).requires_grad_(),
    )
    counts = generator.multinomial(OBJECTS, generator.dirichlet(np.full(BATCH, 2.0)))
    targets = [
        Target(
            labels=torch.from_numpy(generator.integers(CLASSES, size=count)),
            boxes=_boxes(generator, (count,)),
            image_id=image,
            original_size=(480, 640),
        ).to(device)
        for image, count in enumerate(counts)
    ]
    return predictions, targets


def _boxes(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Inside the image, and as in photographs mostly small: half have sides below a sixth of it."""
    sides = 0.02 + 0.6 * generator.random((*shape, 2)) ** 2
    centers = sides / 2 + (1 - sides) * generator.random((*shape, 2))
    return torch.from_numpy(np.concatenate((centers, sides), axis=-1)).float()


def _with_backward(loss: Callable[[], Tensor], predictions: Predictions) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), (predictions.logits, predictions.boxes))


def _our_loss(predictions: Predictions, targets: list[Target], device: str) -> Callable[[], Tensor]:
    criterion = build_criterion(compose().criterion, num_classes=CLASSES).to(device)
    return lambda: criterion(predictions, targets)["loss"]


def _published_loss(
    checkout: Path, predictions: Predictions, targets: list[Target], device: str
) -> Callable[[], Tensor]:
    detr, matching = load(checkout, "models.detr", "models.matcher")
    matcher = matching.HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2)
    suffixes = ["", *(f"_{layer}" for layer in range(LAYERS - 1))]
    weights = {f"{name}{suffix}": weight for name, weight in WEIGHTS.items() for suffix in suffixes}
    criterion = detr.SetCriterion(CLASSES, matcher, weights, eos_coef=0.1, losses=["labels", "boxes", "cardinality"])
    criterion = criterion.to(device)
    objects = [{"labels": target.labels, "boxes": target.boxes} for target in targets]

    def loss() -> Tensor:
        *earlier, last = (
            {"pred_logits": logits, "pred_boxes": boxes}
            for logits, boxes in zip(predictions.logits, predictions.boxes, strict=True)
        )
        outputs: dict[str, Any] = {**last, "aux_outputs": earlier}
        losses = criterion(outputs, objects)
        return sum(losses[name] * weight for name, weight in weights.items())

    return loss
