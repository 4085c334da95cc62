"""Classification losses and their costs against the papers' formulas, one query and class at a time in float64."""

import math
from collections.abc import Callable

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
from detr.types import Matches

LAYERS, BATCH, QUERIES, CLASSES = 2, 3, 7, 5
SIGMOID = (SigmoidFocal, Varifocal, IoUAwareBCE, PositionSupervised, MatchabilityAware)
Inputs = tuple[torch.Tensor, Matches, torch.Tensor, torch.Tensor]


@pytest.fixture
def inputs() -> Inputs:
    """Two, none and three pairs in the three images, others in each layer; one pair without any overlap."""
    torch.manual_seed(5)
    image = torch.tensor([0, 0, 2, 2, 2])
    query = torch.stack([torch.cat([torch.randperm(QUERIES)[:2], torch.randperm(QUERIES)[:3]]) for _ in range(LAYERS)])
    target = torch.stack([torch.cat([torch.randperm(2), 2 + torch.randperm(3)]) for _ in range(LAYERS)])
    overlaps = torch.rand(LAYERS, 5, dtype=torch.float64)
    overlaps[0, 1] = 0
    logits = 3 * torch.randn(LAYERS, BATCH, QUERIES, CLASSES, dtype=torch.float64)
    matches = Matches(image=image, query=query, target=target)
    return logits, matches, torch.randint(CLASSES, (LAYERS, 5)), overlaps


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
def test_losses_by_formula(kind: type[ClassificationLoss], inputs: Inputs) -> None:
    logits, matches, labels, overlaps = inputs
    negative, positive = FORMULAS[kind]
    for layer, found in enumerate(kind()(*inputs)):
        pairs = list(
            zip(
                matches.image.tolist(),
                matches.query[layer].tolist(),
                labels[layer].tolist(),
                overlaps[layer].tolist(),
                strict=True,
            )
        )
        iou_of = {(image, query, label): iou for image, query, label, iou in pairs}
        expected = 0.0
        for image in range(BATCH):
            best = max((iou for at, *_, iou in pairs if at == image), default=0.0)
            for query in range(QUERIES):
                for label in range(CLASSES):
                    p = 1 / (1 + math.exp(-float(logits[layer, image, query, label])))
                    iou = iou_of.get((image, query, label))
                    expected += negative(p) if iou is None else positive(p, iou, best)
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_cross_entropy_by_formula(inputs: Inputs) -> None:
    logits, matches, labels, overlaps = inputs
    labels = labels % (CLASSES - 1)  # the last output is no object
    loss = CrossEntropy(no_object_weight=0.3)
    pairs, queries = torch.tensor([len(matches.image), BATCH * QUERIES], dtype=torch.float64)
    divisor = loss.divisor(torch.tensor(math.nan), pairs, queries)
    for layer, found in enumerate(loss(logits, matches, labels, overlaps) / divisor):
        label_of = dict(
            zip(
                zip(matches.image.tolist(), matches.query[layer].tolist(), strict=True),
                labels[layer].tolist(),
                strict=True,
            )
        )
        total = weights = 0.0
        for image in range(BATCH):
            for query in range(QUERIES):
                label = label_of.get((image, query), CLASSES - 1)
                weight = 0.3 if label == CLASSES - 1 else 1.0
                exponentials = [math.exp(x) for x in logits[layer, image, query].tolist()]
                total -= weight * math.log(exponentials[label] / sum(exponentials))
                weights += weight
        assert float(found) == pytest.approx(total / weights, rel=1e-9)


def test_focal_equals_torchvision(inputs: Inputs) -> None:
    logits, matches, labels, _ = inputs
    wanted = torch.zeros_like(logits)
    wanted[torch.arange(LAYERS)[:, None], matches.image, matches.query, labels] = 1
    for alpha, gamma in ((0.25, 2.0), (0.6, 1.0)):
        found = SigmoidFocal(alpha=alpha, gamma=gamma)(*inputs)
        expected = torchvision.ops.sigmoid_focal_loss(logits, wanted, alpha=alpha, gamma=gamma).sum((1, 2, 3))
        torch.testing.assert_close(found, expected)


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
def test_gradients_point_to_the_target(kind: type[ClassificationLoss], inputs: Inputs) -> None:
    logits, matches, labels, _ = inputs
    labels = labels % (CLASSES - 1)
    overlaps = torch.ones(labels.shape, dtype=torch.float64)
    matched = torch.arange(LAYERS)[:, None], matches.image, matches.query, labels
    logits.requires_grad_()
    kind()(logits, matches, labels, overlaps).sum().backward()
    assert logits.grad is not None and (logits.grad[matched] < 0).all()
    logits.grad[matched] = 1
    if kind is not CrossEntropy:
        assert (logits.grad > 0).all()


@pytest.mark.parametrize("kind", [Varifocal, MatchabilityAware])
def test_weights_that_are_constants(kind: type[ClassificationLoss], inputs: Inputs) -> None:
    """The gradient of w * log(1 + e^x) for a constant weight w is w * sigmoid(x)."""
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    loss = kind()
    (gradient,) = torch.autograd.grad(loss.negative(x).sum(), x)
    torch.testing.assert_close(gradient, loss.alpha * x.detach().sigmoid() ** (loss.gamma + 1))


@pytest.mark.parametrize("kind", SIGMOID)
def test_extreme_logits_stay_finite(kind: type[ClassificationLoss], inputs: Inputs) -> None:
    _, matches, labels, overlaps = inputs
    logits = (100 * torch.randn(LAYERS, BATCH, QUERIES, CLASSES)).requires_grad_()
    kind()(logits, matches, labels, overlaps.float()).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    cost = kind().cost(logits.detach()[0], matches.image, labels[0], torch.rand(5, QUERIES) * 2 - 1)
    assert cost.isfinite().all()


@pytest.mark.parametrize("kind", [CrossEntropy, *SIGMOID])
def test_which_queries_claim_an_object(kind: type[ClassificationLoss]) -> None:
    logits = torch.tensor([[3.0, -1.0, 1.0], [-2.0, -0.1, -0.1], [-1.0, -2.0, 1.0]])
    expected = [True, True, False] if kind is CrossEntropy else [True, False, True]
    assert kind().finds(logits).tolist() == expected
