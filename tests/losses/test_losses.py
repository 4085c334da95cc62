"""Matcher and set loss against brute force and against their definition, written out image by image."""

from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.ops

from detr.errors import NonFiniteError
from detr.losses import HungarianMatcher, SetCriterion
from detr.losses.classification import CrossEntropy
from detr.types import Predictions
from tests.helpers import random_targets

LAYERS, QUERIES, CLASSES = 3, 5, 7


def random_predictions(batch: int, queries: int = QUERIES) -> Predictions:
    torch.manual_seed(3)
    return Predictions(
        logits=torch.randn(LAYERS, batch, queries, CLASSES + 1), boxes=torch.rand(LAYERS, batch, queries, 4) * 0.4 + 0.2
    )


def pair_costs(predictions: Predictions, layer: int, image: int, target: object) -> np.ndarray:
    """Queries x targets, by the formula of the paper with torchvision's box functions."""
    probability = predictions.logits[layer, image].softmax(-1)[:, target.labels]
    boxes = predictions.boxes[layer, image]
    distance = torch.cdist(boxes, target.boxes, p=1)
    convert = torchvision.ops.box_convert
    overlap = torchvision.ops.generalized_box_iou(
        convert(boxes, "cxcywh", "xyxy"), convert(target.boxes, "cxcywh", "xyxy")
    )
    return (-probability + 5 * distance - 2 * overlap).numpy()


@pytest.mark.parametrize("counts", [[2, 3], [0, 4], [1, 0, 5], [7, 2]])
def test_assignment_is_the_cheapest_of_all(counts: list[int]) -> None:
    predictions, targets = random_predictions(len(counts)), random_targets(counts, CLASSES)
    matches = HungarianMatcher()(predictions, targets)
    starts = np.cumsum([0, *counts])
    for layer in range(LAYERS):
        for image, target in enumerate(targets):
            pairs = matches.image == image
            queries = matches.query[layer, pairs].numpy()
            chosen = matches.target[layer, pairs].numpy() - starts[image]
            cost = pair_costs(predictions, layer, image, target)
            count = min(len(target), QUERIES)
            assert len(set(queries)) == len(set(chosen)) == count
            if len(target) <= QUERIES:
                best = min(sum(cost[q, t] for t, q in enumerate(p)) for p in permutations(range(QUERIES), count))
            else:
                best = min(sum(cost[q, t] for q, t in enumerate(p)) for p in permutations(range(len(target)), count))
            assert cost[queries, chosen].sum() == pytest.approx(best, abs=1e-5)


def test_all_layers_at_once_equal_each_alone() -> None:
    counts = [3, 0, 4]
    predictions, targets = random_predictions(3), random_targets(counts, CLASSES)
    criterion = SetCriterion(matcher=HungarianMatcher(), num_classes=CLASSES)
    together = criterion(predictions, targets)
    for layer in range(LAYERS):
        alone = criterion(
            Predictions(logits=predictions.logits[layer : layer + 1], boxes=predictions.boxes[layer : layer + 1]),
            targets,
        )
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(together[name + suffix], alone[name])


def test_losses_by_definition() -> None:
    predictions, targets = random_predictions(2), random_targets([2, 4], CLASSES)
    criterion = SetCriterion(
        matcher=HungarianMatcher(), num_classes=CLASSES, classification=CrossEntropy(no_object_weight=0.3)
    )
    matches, losses = criterion.matcher(predictions, targets), criterion(predictions, targets)
    boxes = torch.cat([target.boxes for target in targets])
    labels = torch.cat([target.labels for target in targets])
    wanted = torch.full((2, QUERIES), CLASSES)
    wanted[matches.image, matches.query[-1]] = labels[matches.target[-1]]
    weight = torch.ones(CLASSES + 1)
    weight[-1] = 0.3
    expected = torch.nn.functional.cross_entropy(predictions.logits[-1].transpose(1, 2), wanted, weight)
    torch.testing.assert_close(losses["loss_ce"], expected)
    found = predictions.boxes[-1][matches.image, matches.query[-1]]
    torch.testing.assert_close(losses["loss_bbox"], (found - boxes[matches.target[-1]]).abs().sum() / 6)


def test_loss_of_empty_batches_has_a_gradient() -> None:
    predictions, targets = random_predictions(2), random_targets([0, 0], CLASSES)
    predictions.logits.requires_grad_()
    losses = SetCriterion(matcher=HungarianMatcher(), num_classes=CLASSES)(predictions, targets)
    losses["loss"].backward()
    assert predictions.logits.grad is not None and predictions.logits.grad.abs().sum() > 0
    assert losses["loss_bbox"] == 0 and losses["class_error"] == 100


@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_predictions_name_the_image(part: str, value: float) -> None:
    predictions, targets = random_predictions(3), random_targets([2, 1, 0], CLASSES)
    getattr(predictions, part)[1, 2, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"image ids \[102\].*lower optimizer\.lr"):
        HungarianMatcher()(predictions, targets)
