"""Criteria as configured, and models that follow what they say of no object."""

import pytest
from omegaconf import OmegaConf

from detr.config import build_criterion, build_model, check_config, compose
from detr.errors import UserError
from detr.losses import ClassificationLoss
from detr.losses.classification import (
    CrossEntropy,
    IoUAwareBCE,
    MatchabilityAware,
    PositionSupervised,
    SigmoidFocal,
    Varifocal,
)
from tests.helpers.commands import TINY_MODEL

CLASSES = 5
KINDS = {
    "set": CrossEntropy,
    "focal": SigmoidFocal,
    "varifocal": Varifocal,
    "iou_aware": IoUAwareBCE,
    "position_supervised": PositionSupervised,
    "matchability_aware": MatchabilityAware,
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_configurations_give_each_loss_its_defaults(name: str, kind: type[ClassificationLoss]) -> None:
    config = compose([f"criterion={name}"])
    check_config(config)
    criterion = build_criterion(config.criterion, num_classes=CLASSES)
    assert type(criterion.classification) is kind
    options = ("no_object_weight",) if kind is CrossEntropy else ("alpha", "gamma")
    assert all(getattr(criterion.classification, option) == getattr(kind(), option) for option in options)
    assert criterion.matcher.class_cost == (1.0 if name == "set" else 2.0)
    assert {name: term.weight for name, term in criterion.terms.items()} == {"bbox": 5.0, "giou": 2.0}


@pytest.mark.parametrize(
    ("model", "weight"),
    [("detr", 1.0), ("conditional_detr", 2.0), ("dab_detr", 1.0), ("dn_detr", 1.0), ("deformable_detr", 2.0),
     ("dino", 1.0), ("small", 2.0)],
)  # fmt: skip
def test_models_bring_their_criterion_to_every_command(model: str, weight: float) -> None:
    for command, options in (
        ("train", []),
        ("evaluate", ["checkpoint=x"]),
        ("predict", ["checkpoint=x", "source=y"]),
        ("export", ["checkpoint=x"]),
    ):
        criterion = compose([f"model={model}", *options], name=command).criterion
        assert criterion.classification.weight == weight


@pytest.mark.parametrize("model", ["detr", "conditional_detr"])
@pytest.mark.parametrize("criterion", KINDS)
def test_the_class_head_follows_the_criterion(model: str, criterion: str) -> None:
    node = compose([f"model={model}", *TINY_MODEL, f"criterion={criterion}"]).model
    outputs = CLASSES + (criterion == "set")
    alone = OmegaConf.to_container(node, resolve=True)  # as a checkpoint has it
    for config in (node, alone):
        built = build_model(config, CLASSES, pretrained=False)
        assert built.heads[0].class_head.out_features == outputs


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_without_its_kind_of_head_is_refused(name: str) -> None:
    wrong = str(name != "set").lower()
    with pytest.raises(UserError, match=r"criterion\.classification\.background: wanted (True|False), got"):
        compose([f"criterion={name}", f"criterion.classification.background={wrong}"])
