"""Our DETR against the independent implementation in Hugging Face's transformers, with random weights."""

from typing import Any

import pytest
import torch

from detr.losses import HungarianMatcher, SetCriterion
from detr.models.backbones.resnet import ResNet
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.positions import SinePosition
from detr.weights.families import convert
from tests.helpers import make_batch, random_targets

transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(1)
    backbone = transformers.ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_labels=5,
        num_queries=11,
        d_model=32,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        auxiliary_loss=False,  # with it, their decoder hands on normalized outputs, unlike the published one
    )
    model = transformers.DetrForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and unit norms would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def ours() -> DETR:
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 48}
    return DETR(
        backbone=ResNet(name="resnet18", norm="batch"),
        encoder=TransformerEncoder(position=SinePosition(d_model=32), num_layers=1, **sizes),
        decoder=TransformerDecoder(num_layers=3, **sizes),
        num_classes=5,
        num_queries=11,
    ).eval()


def test_outputs_and_losses(theirs: Any, ours: DETR) -> None:
    state = convert(theirs.state_dict()).state
    counts = {name: t for name, t in ours.state_dict().items() if name.endswith("num_batches_tracked")}
    ours.load_state_dict({**state, **counts})
    assert sum(p.numel() for p in state.values()) == sum(p.numel() for p in theirs.state_dict().values())

    batch = make_batch([torch.randn(3, 96, 131), torch.randn(3, 117, 89)])
    targets = random_targets([3, 0], num_classes=5)
    predictions = ours(batch)
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    reference = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long(), labels=labels)
    torch.testing.assert_close(predictions.logits[-1], reference.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(predictions.boxes[-1], reference.pred_boxes, atol=1e-5, rtol=0)

    criterion = SetCriterion(matcher=HungarianMatcher(), num_classes=5)
    losses = criterion(predictions, targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
        torch.testing.assert_close(losses[name], reference.loss_dict[name], rtol=1e-4, atol=1e-6, msg=name)


def test_no_padding_equals_an_empty_mask(theirs: Any, ours: DETR) -> None:
    state = convert(theirs.state_dict()).state
    ours.load_state_dict({**ours.state_dict(), **state})
    batch = make_batch([torch.randn(3, 64, 96)] * 2)
    assert not batch.padded
    reference = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    torch.testing.assert_close(ours(batch).logits[-1], reference.logits, atol=1e-4, rtol=0)
