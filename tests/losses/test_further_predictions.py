"""Proposals, groups of queries and denoising queries against a plain criterion that is called for each by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detr.errors import UserError
from detr.losses import ClassificationLoss, HungarianMatcher, SetCriterion
from detr.losses.boxes import L1, GIoU
from detr.losses.classification import (
    CrossEntropy,
    IoUAwareBCE,
    MatchabilityAware,
    PositionSupervised,
    SigmoidFocal,
    Varifocal,
)
from detr.types import DenoisingPredictions, Matches, Predictions, Target
from tests.helpers import make_target, random_targets

LAYERS, QUERIES, CLASSES, COUNTS = 2, 7, 5, [2, 0, 3]
LOSSES = (CrossEntropy, SigmoidFocal, Varifocal, IoUAwareBCE, PositionSupervised, MatchabilityAware)
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 3.0, "loss_giou": 0.5}
each_loss = pytest.mark.parametrize("kind", LOSSES)


def predictions_of(
    kind: type, layers: int = LAYERS, queries: int = QUERIES, classes: int = CLASSES, batch: int = 3
) -> Predictions:
    outputs = classes + kind().background
    logits = torch.randn(layers, batch, queries, outputs, requires_grad=True)
    return Predictions(logits=logits, boxes=(torch.rand(layers, batch, queries, 4) * 0.4 + 0.2).requires_grad_())


def criterion_of(kind: type[ClassificationLoss], **options: object) -> SetCriterion:
    return SetCriterion(
        **{
            "matcher": HungarianMatcher(class_cost=2.0),
            "num_classes": CLASSES,
            "classification": kind(weight=2.0),
            "terms": {"bbox": L1(weight=3.0), "giou": GIoU(weight=0.5)},
            **options,
        }
    )


def layers_of(predictions: Predictions, start: int, stop: int) -> Predictions:
    return Predictions(logits=predictions.logits[start:stop], boxes=predictions.boxes[start:stop])


def summed(losses: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return sum(value for key, value in losses.items() if key == name or key.removeprefix(name + "_").isdigit())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(8)


@each_loss
@pytest.mark.parametrize("classes", [CLASSES, 1])
def test_proposals_are_a_layer_of_their_own(kind: type[ClassificationLoss], classes: int) -> None:
    main, proposals, targets = (
        predictions_of(kind),
        predictions_of(kind, 1, 11, classes),
        random_targets(COUNTS, CLASSES),
    )
    criterion = criterion_of(kind)
    together, alone = criterion(replace(main, proposals=proposals), targets), criterion(main, targets)
    labels = targets if classes > 1 else [replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
    expected = criterion_of(kind, num_classes=classes)(proposals, labels)
    for name in WEIGHTS:
        torch.testing.assert_close(together[f"{name}_proposals"], expected[name])
    torch.testing.assert_close(together["loss"], alone["loss"] + expected["loss"])
    assert all(torch.equal(together[name], value) for name, value in alone.items() if name != "loss")


@each_loss
@pytest.mark.parametrize("repeats", [1, 3])
def test_groups_are_matched_each_on_its_own(kind: type[ClassificationLoss], repeats: int) -> None:
    number = 3
    main, groups, targets = predictions_of(kind), predictions_of(kind, number * LAYERS), random_targets(COUNTS, CLASSES)
    criterion = criterion_of(kind, group_repeats=repeats)
    together, alone = criterion(replace(main, groups=groups), targets), criterion(main, targets)
    repeated = [replace(t, labels=t.labels.repeat(repeats), boxes=t.boxes.repeat(repeats, 1)) for t in targets]
    each = [criterion(layers_of(groups, g * LAYERS, (g + 1) * LAYERS), repeated) for g in range(number)]
    for name in WEIGHTS:
        expected = sum(summed(losses, name) for losses in each) / number
        torch.testing.assert_close(together[f"{name}_groups"], expected)
    torch.testing.assert_close(together["loss"], alone["loss"] + sum(losses["loss"] for losses in each) / number)


def test_repeats_match_one_target_to_many_queries() -> None:
    """With every target there three times, the best three queries for it are positive, not the best one."""
    target = make_target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.51, 0.5, 0.2, 0.2], [0.5, 0.52, 0.2, 0.2]])
    groups = Predictions(logits=torch.zeros(1, 1, 4, CLASSES, requires_grad=True), boxes=boxes[None, None])
    main = replace(groups, logits=torch.zeros(1, 1, 4, CLASSES))
    criterion_of(SigmoidFocal, group_repeats=3)(replace(main, groups=groups), [target])["loss"].backward()
    assert (groups.logits.grad[0, 0, :, 1] < 0).tolist() == [True, False, True, True]


@each_loss
def test_denoising_takes_the_matches_it_is_given(kind: type[ClassificationLoss]) -> None:
    """Two copies of each target; matches chosen so that a plain criterion, asked for these alone, finds the same."""
    copies, width = 2, 4
    main, targets = predictions_of(kind), random_targets(COUNTS, CLASSES)
    noisy = predictions_of(kind, LAYERS, copies * width)
    starts = np.cumsum([0, *COUNTS])
    image, query, target = zip(
        *(
            (i, copy * width + n, starts[i] + n)
            for i, count in enumerate(COUNTS)
            for copy in range(copies)
            for n in range(count)
        ),
        strict=True,
    )
    matches = Matches(
        image=torch.tensor(image),
        query=torch.tensor(query).expand(LAYERS, -1),
        target=torch.tensor([int(t) for t in target]).expand(LAYERS, -1),
    )
    criterion = criterion_of(kind)
    denoising = DenoisingPredictions(predictions=noisy, matches=matches, copies=copies)
    together, alone = criterion(replace(main, denoising=denoising), targets), criterion(main, targets)

    class Given(HungarianMatcher):
        def __call__(self, *arguments: object) -> Matches:
            places = torch.tensor(
                [
                    copy * count + n + copies * start
                    for start, count in zip(starts, COUNTS, strict=False)
                    for copy in range(copies)
                    for n in range(count)
                ]
            )
            return replace(matches, target=places.expand(LAYERS, -1))

    copied = [replace(t, labels=t.labels.repeat(copies), boxes=t.boxes.repeat(copies, 1)) for t in targets]
    expected = criterion_of(kind, matcher=Given())(noisy, copied)
    for name in WEIGHTS:
        torch.testing.assert_close(together[f"{name}_denoising"], summed(expected, name))
    torch.testing.assert_close(together["loss"], alone["loss"] + expected["loss"])


def everything(kind: type[ClassificationLoss], targets: list[Target], queries: int, noisy: int) -> Predictions:
    batch, empty = len(targets), torch.zeros(LAYERS, 0, dtype=torch.int64)
    nothing = Matches(image=torch.zeros(0, dtype=torch.int64), query=empty, target=empty)
    return replace(
        predictions_of(kind, queries=queries, batch=batch),
        proposals=predictions_of(kind, 1, 11, 1, batch=batch),
        groups=predictions_of(kind, 3 * LAYERS, queries, batch=batch),
        denoising=DenoisingPredictions(predictions_of(kind, queries=noisy, batch=batch), nothing, copies=0),
    )


@each_loss
@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [100, 2], [QUERIES, 8]])
@pytest.mark.parametrize("noisy", [0, 3])
def test_any_number_of_targets_gives_every_prediction_a_gradient(
    kind: type[ClassificationLoss], counts: list[int], noisy: int
) -> None:
    targets = random_targets(counts, CLASSES)
    predictions = everything(kind, targets, QUERIES, noisy)
    losses = criterion_of(kind, group_repeats=2)(predictions, targets)
    assert all(value.isfinite() and value.shape == () for value in losses.values())
    total = sum(
        weight * value for name, weight in WEIGHTS.items() for key, value in losses.items() if key.startswith(name)
    )
    torch.testing.assert_close(losses["loss"], total)
    losses["loss"].backward()
    assert predictions.denoising is not None
    for part in (predictions, predictions.proposals, predictions.groups, predictions.denoising.predictions):
        assert part is not None
        for tensor in (part.logits, part.boxes):
            assert tensor.grad is not None and tensor.grad.isfinite().all()
        assert part.logits.grad.abs().sum() > 0 or not part.logits.numel()
    if not sum(counts):
        assert losses["loss_bbox_groups"] == 0 and predictions.boxes.grad.abs().sum() == 0


@pytest.mark.slow
@each_loss
def test_the_loss_learns_classes_and_boxes(kind: type[ClassificationLoss]) -> None:
    predictions, targets = predictions_of(kind), random_targets([2, 0, 3], CLASSES)
    raw = torch.logit(predictions.boxes.detach()).requires_grad_()
    optimizer, criterion = torch.optim.Adam([predictions.logits, raw], lr=0.05), criterion_of(kind)
    for _ in range(300):
        losses = criterion(replace(predictions, boxes=raw.sigmoid()), targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["loss_bbox"] < 0.1 and losses["class_error"] == 0 and losses["cardinality_error"] == 0


@each_loss
def test_matching_takes_the_cost_from_the_loss(kind: type[ClassificationLoss]) -> None:
    predictions, targets = predictions_of(kind), random_targets(COUNTS, CLASSES)
    loss, zeros = kind(), HungarianMatcher(class_cost=0.0)
    cost = HungarianMatcher(class_cost=3.0).costs(predictions, targets, loss) - zeros.costs(predictions, targets)
    image, labels = torch.tensor([0, 0, 2, 2, 2]), torch.cat([t.labels for t in targets])
    overlaps = -HungarianMatcher(class_cost=0.0, box_cost=0.0, giou_cost=1.0).costs(predictions, targets)
    for layer in range(LAYERS):
        expected = 3 * loss.cost(predictions.logits[layer], image, labels, overlaps[layer])
        torch.testing.assert_close(cost[layer], expected, rtol=1e-4, atol=1e-5)


def test_class_error_and_cardinality_of_sigmoid_losses() -> None:
    target = make_target(torch.tensor([1, 2]), torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]))
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]])[None, None]
    logits = torch.full((1, 1, 3, CLASSES), -2.0)
    logits[0, 0, 0, 1], logits[0, 0, 1, 3] = 2.0, -1.0  # the first is right, the second wrong and unsure
    losses = criterion_of(SigmoidFocal)(Predictions(logits=logits, boxes=boxes), [target])
    assert losses["class_error"] == 50 and losses["cardinality_error"] == 1


@pytest.mark.parametrize(
    ("kind", "outputs", "message"),
    [
        (
            SigmoidFocal,
            6,
            r"has 6 outputs, wanted 5 for 5 classes and a sigmoid loss: set the model's background=False",
        ),
        (CrossEntropy, 5, r"has 5 outputs, wanted 6 for 5 classes and a softmax loss: set the model's background=True"),
        (CrossEntropy, 92, r"has 92 outputs, wanted 6 for 5 classes.*num_classes=5"),
    ],
)
def test_heads_that_do_not_fit_are_refused(kind: type[ClassificationLoss], outputs: int, message: str) -> None:
    predictions = predictions_of(kind, classes=outputs - kind().background)
    with pytest.raises(UserError, match=message):
        criterion_of(kind)(predictions, random_targets(COUNTS, CLASSES))


def test_repeats_are_at_least_one() -> None:
    with pytest.raises(UserError, match=r"group_repeats: wanted at least 1, got 0"):
        criterion_of(CrossEntropy, group_repeats=0)
