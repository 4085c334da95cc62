"""Classification losses and their costs against the papers' formulas, one query and class at a time in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision.ops

from detr.losses.classification import (
    ClassificationLoss,
    CrossEntropy,
    IoUAwareBCE,
    MatchabilityAware,
    PositionSupervised,
    SigmoidFocal,
    Varifocal,
)
from detr.losses.terms import Matched
from detr.types import Matches, Predictions
from tests.helpers import make_target

LAYERS, BATCH, QUERIES, CLASSES = 2, 3, 7, 5
SIGMOID = (SigmoidFocal, Varifocal, IoUAwareBCE, PositionSupervised, MatchabilityAware)
NUM_BOXES = 7


@pytest.fixture
def matched() -> Matched:
    """Two, none and three pairs in the three images, others in each layer; one pair without any overlap."""
    torch.manual_seed(5)
    image = torch.tensor([0, 0, 2, 2, 2])
    query = torch.stack([torch.cat([torch.randperm(QUERIES)[:2], torch.randperm(QUERIES)[:3]]) for _ in range(LAYERS)])
    target = torch.stack([torch.cat([torch.randperm(2), 2 + torch.randperm(3)]) for _ in range(LAYERS)])
    boxes = 0.4 + 0.2 * torch.rand(LAYERS, BATCH, QUERIES, 4, dtype=torch.float64)
    boxes[0, 0, query[0, 1]] = 0.05
    return Matched(
        predictions=Predictions(logits=3 * torch.randn((*boxes.shape[:3], CLASSES), dtype=torch.float64), boxes=boxes),
        # The last output of a softmax loss is no object.
        targets=[
            make_target(torch.randint(CLASSES - 1, (count,)), 0.4 + 0.2 * torch.rand(count, 4, dtype=torch.float64))
            for count in (2, 0, 3)
        ],
        matches=Matches(image=image, query=query, target=target),
        num_boxes=torch.tensor(NUM_BOXES, dtype=torch.float64),
    )


def pairs_of(matched: Matched, layer: int) -> list[tuple[int, int, int, float]]:
    """Image, query, label and IoU of each pair."""
    matches, pairs = matched.matches, []
    labels, boxes = (torch.cat([getattr(t, name) for t in matched.targets]) for name in ("labels", "boxes"))
    for image, query, target in zip(matches.image, matches.query[layer], matches.target[layer], strict=True):
        both = torch.stack([matched.predictions.boxes[layer, image, query], boxes[target]])
        corners = torchvision.ops.box_convert(both, "cxcywh", "xyxy")
        iou = torchvision.ops.box_iou(corners[:1], corners[1:])
        pairs.append((int(image), int(query), int(labels[target]), float(iou)))
    return pairs


def bce(p: float, wanted: float) -> float:
    return -wanted * math.log(p) - (1 - wanted) * math.log(1 - p)


# For each loss what a negative of probability p is charged, and a positive with its IoU and the best of its image.
FORMULAS: dict[type, tuple[Callable[[float], float], Callable[[float, float, float], float]]] = {
    SigmoidFocal: (lambda p: 0.75 * p**2 * bce(p, 0), lambda p, iou, best: 0.25 * (1 - p) ** 2 * bce(p, 1)),
    Varifocal: (lambda p: 0.75 * p**2 * bce(p, 0), lambda p, iou, best: iou * bce(p, iou)),
    IoUAwareBCE: (lambda p: p**2 * bce(p, 0), lambda p, iou, best: bce(p, max(p**0.25 * iou**0.75, 0.01))),
    PositionSupervised: (
        lambda p: 0.75 * p**2 * bce(p, 0),
        lambda p, iou, best: 0.25 * ((iou / best) ** 2 - p) ** 2 * bce(p, (iou / best) ** 2),
    ),
    MatchabilityAware: (lambda p: p**1.5 * bce(p, 0), lambda p, iou, best: bce(p, iou**1.5)),
}


@pytest.mark.parametrize("kind", SIGMOID)
def test_losses_by_formula(kind: type[ClassificationLoss], matched: Matched) -> None:
    negative, positive = FORMULAS[kind]
    for layer, found in enumerate(kind()(matched)):
        pairs = pairs_of(matched, layer)
        iou_of = {(image, query, label): iou for image, query, label, iou in pairs}
        expected = 0.0
        for image in range(BATCH):
            best = max((iou for at, *_, iou in pairs if at == image), default=0.0)
            for query in range(QUERIES):
                for label in range(CLASSES):
                    p = 1 / (1 + math.exp(-float(matched.predictions.logits[layer, image, query, label])))
                    iou = iou_of.get((image, query, label))
                    expected += negative(p) if iou is None else positive(p, iou, best)
        assert float(found) == pytest.approx(expected / NUM_BOXES, rel=1e-9)


@pytest.mark.parametrize("counts", [None, [2, 0, 3], [2, 0, 3, 1, 11]])
def test_cross_entropy_by_formula(matched: Matched, counts: list[int] | None) -> None:
    """counts: of objects in the images of the step; those beyond the third are in other batches."""
    matched = replace(matched, counts=None if counts is None else torch.tensor(counts))
    pairs = sum(min(count, QUERIES) for count in counts or [2, 0, 3])
    weights = pairs + 0.3 * (len(counts or [2, 0, 3]) * QUERIES - pairs)
    for layer, found in enumerate(CrossEntropy(no_object_weight=0.3)(matched)):
        label_of = {(image, query): label for image, query, label, _ in pairs_of(matched, layer)}
        total = 0.0
        for image in range(BATCH):
            for query in range(QUERIES):
                label = label_of.get((image, query), CLASSES - 1)
                exponentials = [math.exp(x) for x in matched.predictions.logits[layer, image, query].tolist()]
                weight = 0.3 if label == CLASSES - 1 else 1.0
                total -= weight * math.log(exponentials[label] / sum(exponentials))
        assert float(found) == pytest.approx(total / weights, rel=1e-9)


def test_focal_equals_torchvision(matched: Matched) -> None:
    logits = matched.predictions.logits
    wanted = torch.zeros_like(logits)
    for layer in range(LAYERS):
        for image, query, label, _ in pairs_of(matched, layer):
            wanted[layer, image, query, label] = 1
    for alpha, gamma in ((0.25, 2.0), (0.6, 1.0)):
        found = SigmoidFocal(alpha=alpha, gamma=gamma)(matched)
        expected = torchvision.ops.sigmoid_focal_loss(logits, wanted, alpha=alpha, gamma=gamma).sum((1, 2, 3))
        torch.testing.assert_close(found, expected / NUM_BOXES)


@pytest.mark.parametrize("kind", [CrossEntropy, *SIGMOID])
def test_costs_by_formula(kind: type[ClassificationLoss]) -> None:
    torch.manual_seed(2)
    logits = torch.randn(BATCH, QUERIES, CLASSES, dtype=torch.float64)
    image, labels = torch.tensor([0, 0, 2]), torch.tensor([3, 1, 3])
    overlaps = torch.rand(3, QUERIES, dtype=torch.float64) * 2 - 1
    cost = kind().cost(logits, image, labels, overlaps)
    for target in range(3):
        for query in range(QUERIES):
            row = logits[image[target], query]
            p = float(row.sigmoid()[labels[target]])
            if kind is PositionSupervised:
                p *= math.sqrt((float(overlaps[target, query]) + 1) / 2)
            positive = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8)
            negative = -0.75 * p**2 * math.log(1 - p + 1e-8)
            expected = -float(row.softmax(-1)[labels[target]]) if kind is CrossEntropy else positive - negative
            assert float(cost[target, query]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [CrossEntropy, *SIGMOID])
def test_gradients_point_to_the_target(kind: type[ClassificationLoss], matched: Matched) -> None:
    boxes, logits = matched.predictions.boxes.clone(), matched.predictions.logits.requires_grad_()
    boxes[matched.places] = matched.wanted_boxes
    kind()(replace(matched, predictions=Predictions(logits=logits, boxes=boxes))).sum().backward()
    positives = *matched.places, matched.labels
    assert logits.grad is not None and (logits.grad[positives] < 0).all()
    logits.grad[positives] = 1
    if kind is not CrossEntropy:
        assert (logits.grad > 0).all()


@pytest.mark.parametrize("kind", [Varifocal, MatchabilityAware])
def test_weights_that_are_constants(kind: type[ClassificationLoss]) -> None:
    """The gradient of w * log(1 + e^x) for a constant weight w is w * sigmoid(x)."""
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    loss = kind()
    (gradient,) = torch.autograd.grad(loss.negative(x).sum(), x)
    torch.testing.assert_close(gradient, loss.alpha * x.detach().sigmoid() ** (loss.gamma + 1))


@pytest.mark.parametrize("kind", SIGMOID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(kind: type[ClassificationLoss], matched: Matched, dtype: torch.dtype) -> None:
    logits = (100 * torch.randn(LAYERS, BATCH, QUERIES, CLASSES)).to(dtype).requires_grad_()
    predictions = Predictions(logits=logits, boxes=matched.predictions.boxes.to(dtype))
    targets = [target.map(lambda t: t.float() if t.is_floating_point() else t) for target in matched.targets]
    loss = kind()(replace(matched, predictions=predictions, targets=targets, num_boxes=torch.tensor(7.0)))
    assert loss.dtype == torch.float32  # whatever the precision of the training
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    labels, image = matched.labels[0], matched.matches.image
    cost = kind().cost(logits.detach().float()[0], image, labels, torch.rand(5, QUERIES) * 2 - 1)
    assert cost.isfinite().all()


@pytest.mark.parametrize("kind", [CrossEntropy, *SIGMOID])
def test_which_queries_claim_an_object(kind: type[ClassificationLoss]) -> None:
    logits = torch.tensor([[3.0, -1.0, 1.0], [-2.0, -0.1, -0.1], [-1.0, -2.0, 1.0]])
    expected = [True, True, False] if kind is CrossEntropy else [True, False, True]
    assert kind().finds(logits).tolist() == expected
