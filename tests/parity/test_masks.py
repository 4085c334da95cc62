"""DETR with masks against numbers from the published implementation, and against transformers."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from detr.config import build_model, compose
from detr.losses import HungarianMatcher, SetCriterion
from detr.losses.boxes import L1, GIoU
from detr.losses.masks import Dice, MaskFocal
from detr.models.backbones.resnet import ResNet
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.positions import SinePosition
from detr.models.mask_heads import DETRMaskHead
from detr.postprocess import postprocess
from detr.types import Predictions, Target
from detr.weights import from_published, load_state, to_published
from detr.weights.families import DETR_WITH_MASKS, convert, recognize
from tests.helpers import make_batch
from tests.helpers.published import close, load_fixture, rule_of

PANOPTIC = ("model=detr", "model/masks=detr", "model.backbone.weights=null", "data.root=DATA")


@pytest.fixture(scope="module")
def fixture(shared: Path) -> dict[str, Any]:
    return load_fixture(shared, "detr/segmentation.pt")


@pytest.fixture(scope="module")
def rule(shared: Path) -> ModuleType:
    return rule_of(shared / "fixtures" / "detr" / "weights.py")


def with_masks(**options: Any) -> DETR:
    sizes = {name: options[name] for name in ("d_model", "nhead", "dim_feedforward")}
    position = SinePosition(d_model=options["d_model"])
    return DETR(
        backbone=ResNet(name=options["backbone"], norm=options["norm"], detail=4),
        encoder=TransformerEncoder(position=position, num_layers=options["layers"], **sizes),
        decoder=TransformerDecoder(num_layers=options["layers"], **sizes),
        num_classes=options["num_classes"],
        num_queries=options["num_queries"],
        masks=DETRMaskHead,
    ).eval()


@pytest.fixture
def model(fixture: dict[str, Any], rule: ModuleType) -> DETR:
    config = fixture["config"]
    model = with_masks(
        d_model=config["hidden_dim"],
        nhead=config["nheads"],
        dim_feedforward=config["dim_feedforward"],
        backbone=config["backbone"],
        norm="frozen",
        layers=config["enc_layers"],
        num_classes=config["num_classes"],
        num_queries=config["num_queries"],
    )
    load_state(model, from_published(rule.full_state(fixture)), "fixture")
    return model


@pytest.fixture
def criterion(fixture: dict[str, Any]) -> SetCriterion:
    terms = {"bbox": L1(weight=5.0), "giou": GIoU(weight=2.0), "mask": MaskFocal(), "dice": Dice()}
    return SetCriterion(matcher=HungarianMatcher(), num_classes=fixture["config"]["num_classes"], terms=terms)


def targets_of(case: dict[str, Any]) -> list[Target]:
    return [
        Target(labels=one["labels"], boxes=one["boxes"], masks=one["masks"].bool(), image_id=i, original_size=(1, 1))
        for i, one in enumerate(case["targets"])
    ]


def predictions_of(outputs: dict[str, Any], size: tuple[int, int]) -> Predictions:
    layers = [*outputs.get("aux_outputs", []), outputs]
    return Predictions(
        logits=torch.stack([layer["pred_logits"] for layer in layers]),
        boxes=torch.stack([layer["pred_boxes"] for layer in layers]),
        masks=outputs["pred_masks"][None],
        mask_size=size,
    )


def padded_size(fixture: dict[str, Any]) -> tuple[int, int]:
    height, width = (max(image.shape[dim] for image in fixture["images"]) for dim in (1, 2))
    return height, width


def test_masks(fixture: dict[str, Any], model: DETR) -> None:
    batch = make_batch(fixture["images"])
    found, expected = model(batch), predictions_of(fixture["outputs"], padded_size(fixture))
    assert found.masks is not None and expected.masks is not None
    close(found.masks.detach(), expected.masks, 1e-5)
    close(found.boxes.detach(), expected.boxes, 1e-5)
    with torch.no_grad():  # a few queries at a time
        close(model(batch).masks, expected.masks, 1e-5)


def test_losses(fixture: dict[str, Any], criterion: SetCriterion) -> None:
    case = fixture["loss"]
    losses = criterion(predictions_of(fixture["outputs"], padded_size(fixture)), targets_of(case))
    assert set(losses) == {*case["loss_dict"], "loss"}
    for name, value in case["loss_dict"].items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(losses["loss"], case["total"], rtol=1e-5, atol=0)


def test_losses_of_pixels(fixture: dict[str, Any]) -> None:
    case = fixture["mask_losses"]
    for term, name in ((MaskFocal(), "focal"), (Dice(), "dice")):
        found = term.loss(case["inputs"], case["targets"]).sum() / case["num_boxes"]
        torch.testing.assert_close(found, case[name], rtol=1e-5, atol=0)


def test_gradients(fixture: dict[str, Any], model: DETR, criterion: SetCriterion) -> None:
    case = fixture["loss"]
    criterion(model(make_batch(fixture["images"])), targets_of(case))["loss"].backward()
    gradients = to_published({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients) == set(case["grad_norms"])
    for name, norm in case["grad_norms"].items():
        # Those of attention that sees zeros, and of a bias before a norm, are zero but for rounding.
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-7 * case["total_grad_norm"]), name


def test_instance_masks(fixture: dict[str, Any]) -> None:
    case = fixture["postprocess_segm"]
    sizes, originals = ([tuple(size) for size in case[name].tolist()] for name in ("sizes", "orig_sizes"))
    predictions = predictions_of(fixture["outputs"], padded_size(fixture))
    names = [str(number) for number in range(fixture["config"]["num_classes"])]
    found = postprocess(predictions, originals, names, sizes=sizes)
    for detections, masks, scores, labels in zip(found, case["masks"], case["scores"], case["labels"], strict=True):
        order = detections.queries
        assert detections.masks is not None
        assert torch.equal(detections.masks.decode(), masks[order, 0].bool())
        close(detections.scores, scores[order], 1e-6)
        assert torch.equal(detections.labels, labels[order])


def test_published_names(shared: Path) -> None:
    listed = json.loads((shared / "fixtures" / "detr" / "state_dict_detr_resnet50_panoptic.json").read_text())
    shapes = {name: tuple(shape) for name, shape in listed}
    with torch.device("meta"):
        model = build_model(compose(PANOPTIC).model, num_classes=250, pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == 42_899_288
    state = to_published(model.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert recognize(state) is DETR_WITH_MASKS
    back = convert(state)
    assert {name: t.shape for name, t in back.state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert back.num_classes == 250


def _shapes(listed: Any) -> list[tuple[str, list[int]]]:
    return list(listed.items()) if isinstance(listed, dict) else [(row[0], row[1]) for row in listed]


def test_against_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    backbone = transformers.ResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    torch.manual_seed(0)
    theirs = transformers.DetrForSegmentation(
        transformers.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            num_labels=5,
            num_queries=11,
            d_model=128,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        )
    ).eval()
    ours = with_masks(
        d_model=128,
        nhead=8,
        dim_feedforward=48,
        backbone="resnet18",
        norm="batch",
        layers=1,
        num_classes=5,
        num_queries=11,
    )
    converted = convert(theirs.state_dict())
    assert converted.family is DETR_WITH_MASKS
    load_state(ours, converted.state, "transformers")
    batch = make_batch([torch.rand(3, 97, 131), torch.rand(3, 64, 101)])
    with torch.no_grad():
        wanted = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
        found = ours(batch)
    close(found.logits[-1], wanted.logits, 1e-4)
    close(found.masks[0], wanted.pred_masks, 1e-4)
