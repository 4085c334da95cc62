"""Box terms against torchvision; what a term is given; terms that somebody else wrote."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision.ops

from detr.config import build_criterion, check_config, compose
from detr.errors import UserError
from detr.losses import HungarianMatcher, Matched, SetCriterion
from detr.losses.boxes import L1, GIoU
from detr.types import Predictions
from tests.helpers import random_targets

LAYERS, QUERIES, CLASSES, COUNTS = 3, 7, 5, [2, 0, 3]

OWN_TERMS = """
from detr.losses import Term
from detr.losses.classification import SigmoidLoss
import torch.nn.functional as F

class Center(Term):
    def __init__(self, *, weight: float = 1.0, axis: int = 0) -> None:
        super().__init__(weight=weight)
        self.axis = axis

    def forward(self, matched):
        if len(matched.boxes) == 1:
            return matched.boxes.new_zeros(0)
        distance = matched.found("boxes") - matched.wanted("boxes")
        return distance[-1:, :, self.axis].square().sum(1) / matched.num_boxes

class BinaryCrossEntropy(SigmoidLoss):
    def negative(self, logits):
        return F.softplus(logits)

    def positive(self, logits, matched):
        return F.softplus(-logits)
"""


@pytest.fixture
def own_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_terms.py").write_text(OWN_TERMS)
    monkeypatch.syspath_prepend(tmp_path)


def predictions_of(outputs: int, layers: int = LAYERS) -> Predictions:
    torch.manual_seed(11)
    return Predictions(
        logits=torch.randn(layers, len(COUNTS), QUERIES, outputs),
        boxes=torch.rand(layers, len(COUNTS), QUERIES, 4) * 0.4 + 0.2,
    )


def matched_of(predictions: Predictions, num_boxes: float = 13.0) -> Matched:
    targets = random_targets(COUNTS, CLASSES)
    matches = HungarianMatcher()(predictions, targets)
    return Matched(predictions=predictions, targets=targets, matches=matches, num_boxes=torch.tensor(num_boxes))


def test_any_field_is_gathered_for_the_pairs() -> None:
    matched = matched_of(predictions_of(CLASSES + 1))
    matches, targets = matched.matches, matched.targets
    starts = [0, 2, 2]
    for layer in range(LAYERS):
        for pair, image in enumerate(matches.image.tolist()):
            query, target = int(matches.query[layer, pair]), int(matches.target[layer, pair]) - starts[image]
            assert torch.equal(matched.found("boxes")[layer, pair], matched.predictions.boxes[layer, image, query])
            assert torch.equal(matched.found("logits")[layer, pair], matched.predictions.logits[layer, image, query])
            assert torch.equal(matched.wanted("boxes")[layer, pair], targets[image].boxes[target])
            assert matched.wanted("labels")[layer, pair] == targets[image].labels[target]


def test_box_terms_equal_torchvision() -> None:
    matched = matched_of(predictions_of(CLASSES + 1), num_boxes=13.0)
    found, wanted = matched.found("boxes"), matched.wanted("boxes")
    corners = [torchvision.ops.box_convert(boxes, "cxcywh", "xyxy") for boxes in (found, wanted)]
    giou = torchvision.ops.generalized_box_iou_loss(*corners)
    torch.testing.assert_close(GIoU()(matched), giou.sum(1) / 13)
    torch.testing.assert_close(
        L1()(matched), torch.nn.functional.l1_loss(found, wanted, reduction="none").sum((1, 2)) / 13
    )


def test_overlaps_are_computed_once_and_only_if_asked_for() -> None:
    matched = matched_of(predictions_of(CLASSES + 1))
    L1()(matched)
    assert "overlaps" not in vars(matched) and "corners" not in vars(matched)
    assert matched.overlaps is matched.overlaps


@pytest.mark.usefixtures("own_terms")
def test_a_term_of_ones_own_takes_one_entry() -> None:
    entry = "+criterion.terms.center={_target_: own_terms.Center, weight: 3.0, axis: 1}"
    config = compose([entry, "allow_targets=[own_terms]"])
    check_config(config)
    own, published = (build_criterion(node, CLASSES) for node in (config.criterion, compose().criterion))
    predictions, targets = predictions_of(CLASSES + 1), random_targets(COUNTS, CLASSES)
    predictions = replace(
        predictions, proposals=predictions_of(CLASSES + 1, 1), groups=predictions_of(CLASSES + 1, 2 * LAYERS)
    )
    losses, without = own(predictions, targets), published(predictions, targets)
    assert losses.keys() - without.keys() == {"loss_center", "loss_center_groups"}
    assert all(torch.equal(losses[name], value) for name, value in without.items() if name != "loss")
    added = losses["loss_center"] + losses["loss_center_groups"]
    torch.testing.assert_close(losses["loss"], without["loss"] + 3 * added)

    matches, boxes = own.match(predictions, targets), torch.cat([target.boxes for target in targets])
    distance = predictions.boxes[-1, matches.image, matches.query[-1], 1] - boxes[matches.target[-1], 1]
    torch.testing.assert_close(losses["loss_center"], distance.square().sum() / 5)


@pytest.mark.usefixtures("own_terms")
def test_the_loss_of_an_image_has_all_terms() -> None:
    options = ["+criterion.terms.center={_target_: own_terms.Center}", "allow_targets=[own_terms]"]
    predictions, targets = predictions_of(CLASSES + 1), random_targets(COUNTS, CLASSES)
    criterion = build_criterion(compose(options).criterion, CLASSES)
    for index, loss in enumerate(criterion.per_image(predictions, targets)):
        alone = predictions.layers(slice(-1, None)).select(images=slice(index, index + 1))
        torch.testing.assert_close(loss, criterion(alone, targets[index : index + 1])["loss"])


@pytest.mark.usefixtures("own_terms")
def test_a_classification_loss_of_ones_own_takes_its_target() -> None:
    options = ["criterion.classification._target_=own_terms.BinaryCrossEntropy", "allow_targets=[own_terms]"]
    config = compose(["criterion=focal", *options])
    check_config(config)
    criterion = build_criterion(config.criterion, CLASSES)
    predictions, targets = predictions_of(CLASSES), random_targets(COUNTS, CLASSES)
    losses, matches = criterion(predictions, targets), criterion.match(predictions, targets)
    wanted = torch.zeros(len(COUNTS), QUERIES, CLASSES)
    labels = torch.cat([target.labels for target in targets])
    wanted[matches.image, matches.query[-1], labels[matches.target[-1]]] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(predictions.logits[-1], wanted, reduction="sum")
    torch.testing.assert_close(losses["loss_ce"], expected / 5)


def test_terms_can_be_left_out() -> None:
    criterion = build_criterion(compose(["~criterion.terms.giou"]).criterion, CLASSES)
    losses = criterion(predictions_of(CLASSES + 1), random_targets(COUNTS, CLASSES))
    assert "loss_bbox" in losses and "loss_giou" not in losses


@pytest.mark.parametrize("name", ["ce", "type"])
def test_names_that_are_taken_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"terms: the name {name} is taken"):
        SetCriterion(matcher=HungarianMatcher(), num_classes=CLASSES, terms={name: L1()})
