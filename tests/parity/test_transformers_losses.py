"""Our losses and their matching against the independent ones in Hugging Face's transformers, on random predictions."""

from types import SimpleNamespace

import pytest
import torch

from detr.config import build_criterion, compose
from detr.types import Predictions
from tests.helpers import random_targets

pytest.importorskip("transformers", reason="needs the extra 'parity'")

LAYERS, QUERIES, CLASSES, COUNTS = 3, 23, 7, [5, 0, 11, 1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_focal_set_loss(seed: int) -> None:
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

    torch.manual_seed(seed)
    logits = 2 * torch.randn(LAYERS, len(COUNTS), QUERIES, CLASSES)
    boxes = torch.rand(LAYERS, len(COUNTS), QUERIES, 4) * 0.4 + 0.2
    targets = random_targets(COUNTS, CLASSES, seed)
    config = SimpleNamespace(
        class_cost=2, bbox_cost=5, giou_cost=2, num_labels=CLASSES, focal_alpha=0.25, auxiliary_loss=True,
        bbox_loss_coefficient=5, giou_loss_coefficient=2, decoder_layers=LAYERS,
    )  # fmt: skip
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    total, expected, _ = DeformableDetrForObjectDetectionLoss(
        logits[-1], labels, torch.device("cpu"), boxes[-1], config, outputs_class=logits, outputs_coord=boxes
    )
    # Theirs weighs the class by 1, like DINO.
    criterion = build_criterion(
        compose(["criterion=focal", "criterion.classification.weight=1.0"]).criterion, num_classes=CLASSES
    )
    found = criterion(Predictions(logits=logits, boxes=boxes), targets)
    assert set(found) - set(expected) == {"loss", "class_error"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)
    torch.testing.assert_close(found["loss"], total, rtol=1e-6, atol=0)
