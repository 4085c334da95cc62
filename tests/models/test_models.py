"""The detector's parts where the published numbers do not reach: bad options, batches, norms, offline weights."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from detr.errors import UserError
from detr.models.attention import Placement, SqueezeExcitation
from detr.models.backbones.resnet import ResNet
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.multihead import MultiHeadAttention
from detr.models.layers.positions import LearnedPosition, SinePosition, anchor_embedding
from detr.models.layers.transformer import FeedForward
from detr.models.neck import ChannelMapper
from tests.helpers import make_batch


def test_attention_equals_torch_multihead_attention() -> None:
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(d_model=12, nhead=3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.in_proj.weight,
            "in_proj_bias": torch.randn(36),
            "out_proj.weight": ours.out_proj.weight,
            "out_proj.bias": ours.out_proj.bias,
        }
    )
    ours.in_proj.bias.data.copy_(theirs.in_proj_bias)
    query, key, value = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    expected, _ = theirs(query, key, value, key_padding_mask=padding)
    torch.testing.assert_close(ours.attend(query, key, value, ~padding[:, None, None]), expected)
    expected, _ = theirs(key, key, value)
    torch.testing.assert_close(ours.attend(key, key, value), expected)


def decode(model: DETR, maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    memory = model.encoder([maps], [mask], padded=bool(mask.any()))
    return model.decoder(model.queries(memory)[0], memory)[0]


def test_one_feature_map_alone_equals_the_same_map_in_a_padded_batch(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr().eval()
    small = torch.randn(1, 32, 3, 5)
    padded, mask = torch.randn(2, 32, 7, 11), torch.zeros(2, 7, 11, dtype=torch.bool)
    padded[:1, :, :3, :5] = small
    mask[0, 3:], mask[0, :, 5:] = True, True
    alone, together = decode(model, small, mask[:1, :3, :5]), decode(model, padded, mask)
    torch.testing.assert_close(together[:, :1], alone, atol=1e-5, rtol=0)


def test_content_of_padding_does_not_matter(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr().eval()
    batch = make_batch([torch.randn(3, 64, 96), torch.randn(3, 128, 160)])
    (features,) = model.neck(model.backbone(batch.images))
    mask = torch.zeros(2, *features.shape[-2:], dtype=torch.bool)
    mask[0, 2:], mask[0, :, 3:] = True, True
    disturbed = torch.where(mask[:, None], torch.randn_like(features) * 9, features)
    torch.testing.assert_close(decode(model, disturbed, mask), decode(model, features, mask), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_backbone_norms(norm: str, channels_last: bool) -> None:
    backbone = ResNet(name="resnet18", norm=norm, freeze=["stem", "layer1"])
    if channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)
    (features,) = backbone(torch.randn(2, 3, 65, 97))
    assert features.shape == (2, 512, 3, 4)
    features.sum().backward()
    frozen = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert all(name.startswith(("body.conv1", "body.bn1", "body.layer1")) for name in frozen)
    assert "body.conv1.weight" in frozen and "body.layer2.0.conv1.weight" not in frozen
    norms = {name for name, _ in backbone.named_parameters() if ".bn" in name}
    assert bool(norms) == (norm != "frozen")


def test_frozen_stages_keep_their_statistics_in_training() -> None:
    backbone = ResNet(name="resnet18", norm="batch", freeze=["stem", "layer1"]).train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    changed = {name for name, buffer in backbone.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed and all(name.startswith(("body.layer2", "body.layer3", "body.layer4")) for name in changed)


def test_depths_follow_the_stages_and_leave_attention_blocks_out() -> None:
    backbone = ResNet(name="resnet18", norm="batch", freeze=[], features=["layer2"])
    backbone.plug({"se": Placement(block=SqueezeExcitation, stages=["backbone"], where="standard")})
    depths = backbone.depths()
    assert (depths["body.conv1.weight"], depths["body.bn1.bias"], depths["body.layer2.1.conv2.weight"]) == (0, 0, 2)
    assert depths.keys() == ResNet(name="resnet18", norm="batch", features=["layer2"]).depths().keys()
    assert len(depths) == sum("attention" not in name for name, _ in backbone.named_parameters())


def test_frozen_norm_equals_torchvision(tmp_path: Path) -> None:
    reference = torchvision.ops.FrozenBatchNorm2d(6)
    for buffer in reference.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    ours = ResNet(name="resnet18").body.bn1.__class__(6)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(ours(x), reference(x))


def test_dilation_halves_the_stride() -> None:
    assert ResNet(name="resnet50", dilation=True)(torch.randn(1, 3, 64, 96))[0].shape == (1, 2048, 4, 6)
    with pytest.raises(UserError, match=r"needs resnet50 or larger.*dilation=false"):
        ResNet(name="resnet18", dilation=True)


def test_weights_of_torchvision_load_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = torchvision.models.resnet18(weights=None)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    backbone = ResNet(name="resnet18", weights=str(tmp_path / "resnet18.pth"), norm="frozen")
    torch.testing.assert_close(backbone.body.layer4[1].conv2.weight, reference.layer4[1].conv2.weight)
    torch.testing.assert_close(backbone.body.bn1.running_var, reference.bn1.running_var)
    with pytest.raises(UserError, match="are not of a resnet34"):
        ResNet(name="resnet34", weights=str(tmp_path / "resnet18.pth"))


def test_pretrained_weights_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", refuse)
    with pytest.raises(
        UserError, match=r"could not download https://.*no route to host.*set model.backbone.weights=PATH"
    ):
        ResNet(name="resnet18", weights="IMAGENET1K_V1")
    with pytest.raises(UserError, match="neither a file nor one of torchvision's weights for resnet18: IMAGENET1K_V1"):
        ResNet(name="resnet18", weights="IMAGENET22K")


def test_bad_options_are_named() -> None:
    with pytest.raises(UserError, match="wanted d_model as a multiple of nhead, got 10 and 3"):
        TransformerDecoder(d_model=10, nhead=3)
    with pytest.raises(UserError, match="multiple of 4, got 6"):
        SinePosition(d_model=6)
    with pytest.raises(UserError, match=r"at most 5 x 5 cells, got 3 x 7.*model/encoder/position=sine"):
        LearnedPosition(d_model=8, size=5)(torch.zeros(1, 3, 7, dtype=torch.bool))


@pytest.mark.parametrize("activation", ["relu", "gelu", "glu"])
def test_feed_forward_activations(activation: str) -> None:
    ffn = FeedForward(d_model=6, dim_feedforward=10, dropout=0.0, activation=activation)
    x = torch.randn(3, 6)
    hidden = ffn.linear1(x)
    expected = {
        "relu": lambda: hidden.clamp(min=0),
        "gelu": lambda: hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)),
        "glu": lambda: hidden[:, :10] * hidden[:, 10:].sigmoid(),
    }[activation]()
    torch.testing.assert_close(ffn(x), ffn.linear2(expected))


def test_every_layer_starts_with_its_own_values() -> None:
    encoder = TransformerEncoder(position=SinePosition(d_model=16), d_model=16, nhead=2, dim_feedforward=16)
    assert not torch.equal(encoder.layers[0].ffn.linear1.weight, encoder.layers[1].ffn.linear1.weight)


def test_backbone_gives_several_maps_and_builds_no_more() -> None:
    backbone = ResNet(name="resnet50", features=["layer2", "layer3"])
    maps = backbone(torch.randn(1, 3, 65, 97))
    assert [tuple(level.shape) for level in maps] == [(1, 512, 9, 13), (1, 1024, 5, 7)]
    assert backbone.channels == [512, 1024] and not hasattr(backbone.body, "layer4")


def test_truncated_backbone_loads_whole_weights(tmp_path: Path) -> None:
    reference = torchvision.models.resnet18(weights=None)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    backbone = ResNet(name="resnet18", weights=str(tmp_path / "resnet18.pth"), features=["layer2"])
    torch.testing.assert_close(backbone.body.layer2[1].conv2.weight, reference.layer2[1].conv2.weight)


def test_channel_mapper_makes_smaller_maps_of_the_last_one() -> None:
    neck = ChannelMapper(in_channels=[3, 5], d_model=32, num_levels=4, norm=True)
    maps = neck([torch.randn(2, 3, 13, 17), torch.randn(2, 5, 7, 9)])
    assert [tuple(level.shape) for level in maps] == [(2, 32, 13, 17), (2, 32, 7, 9), (2, 32, 4, 5), (2, 32, 2, 3)]
    for level in maps:  # group norm: nothing but the affine start, which is none
        groups = level.unflatten(1, (32, 1)).flatten(2)
        torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 32), atol=1e-5, rtol=0)


def test_sine_position_counts_valid_cells_only_and_from_their_middle() -> None:
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[:, 3:], mask[:, :, 4:] = True, True
    edge, middle = SinePosition(d_model=8), SinePosition(d_model=8, center=True)
    for row, column in ((0, 0), (2, 3), (1, 2)):
        for encoding, offset in ((edge, 1.0), (middle, 0.5)):
            y, x = ((at + offset) / count * 2 * math.pi for at, count in ((row, 3), (column, 4)))
            expected = [f(angle) for axis in (y, x) for angle in (axis, axis / 100) for f in (math.sin, math.cos)]
            torch.testing.assert_close(encoding(mask)[0, :, row, column], torch.tensor(expected), atol=1e-5, rtol=0)


def test_anchors_are_embedded_like_cells() -> None:
    """A point at the far edge of a cell has that cell's encoding, so that the two can be compared by attention."""
    cells = SinePosition(d_model=8)(torch.zeros(1, 5, 7, dtype=torch.bool))
    anchors = torch.tensor([[(3 + 1) / 7, (2 + 1) / 5]])
    torch.testing.assert_close(anchor_embedding(anchors, 4)[0], cells[0, :, 2, 3], atol=1e-5, rtol=0)
