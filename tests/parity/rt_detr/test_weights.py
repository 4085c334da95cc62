"""Weights of RT-DETR and RT-DETRv2, from their authors and from transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.config import build_model, compose
from detr.errors import UserError
from detr.models.backbones.resnet_vd import ResNetVD
from detr.models.detr import DETR
from detr.weights import families, to_published
from detr.weights.families import convert
from tests.helpers.published import batch_of, close, takes_averaged_weights
from tests.helpers.rt_detr import BOXES, LOGITS, options_of


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("rt_detr/state_dict_rtdetr_r18vd", families.RT_DETR, "model=rt_detr_r18"),
        ("rt_detr/state_dict_rtdetr_r50vd", families.RT_DETR, "model=rt_detr_r50"),
        ("rt_detr/state_dict_rtdetrv2_r18vd", families.RT_DETRV2, "model=rt_detrv2_r18"),
        ("rt_detr/state_dict_rtdetrv2_r50vd", families.RT_DETRV2, "model=rt_detrv2_r50"),
        ("deim/state_dict_deim_r18vd", families.DEIM_RT_DETRV2, "model=deim_rt_detrv2_r18"),
    ],
)
def test_state_dicts_of_full_size(shared: Path, name: str, family: families.Family, options: str) -> None:
    content = json.loads((shared / "fixtures" / f"{name}.json").read_text())
    converted = convert({key: torch.zeros(shape) for key, shape in content["keys"].items()})
    assert converted.family is family and converted.options == options and converted.num_classes == 80
    assert set(converted.dropped.values()) <= {"constants that are computed"}
    with torch.device("meta"):
        model = build_model(compose(converted.options.split()).model, num_classes=80, pretrained=False)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in converted.state.items()
    }
    parameters = [*model.parameters()]
    assert sum(p.numel() for p in parameters) == content["parameters"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == content["trained"]
    back = to_published(converted.state, family)
    assert {key: [*tensor.shape] for key, tensor in back.items()} == content["keys"]


@pytest.mark.parametrize("size", ["r18", "r34", "r50_m", "r50", "r101"])
def test_every_size_of_deim_is_recognized(size: str) -> None:
    with torch.device("meta"):
        model = build_model(compose([f"model=deim_rt_detrv2_{size}"]).model, num_classes=3, pretrained=False)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    assert convert(to_published(state)).options == f"model=deim_rt_detrv2_{size}"


def test_published_names_and_back(published: dict[str, Any], state: dict[str, Tensor], model: DETR) -> None:
    family = convert(state).family
    back = to_published(model.state_dict(), family)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        if name not in ("decoder.anchors", "decoder.valid_mask"):  # of images of 640 x 640 there
            assert torch.equal(back[name], tensor), name


def test_averaged_weights_are_taken_from_their_files(
    published: dict[str, Any], state: dict[str, Tensor], model: DETR, tmp_path: Path
) -> None:
    config = published["config"]
    fresh = build_model(compose(options_of(config)).model, num_classes=config["num_classes"], pretrained=False)
    takes_averaged_weights(fresh, tmp_path / "published.pth", state, model, config["num_classes"])


def test_pretrained_backbones_under_their_published_names(
    published: dict[str, Any], state: dict[str, Tensor], model: DETR, tmp_path: Path
) -> None:
    depth = published["config"]["PResNet"]["depth"]
    file = {n.removeprefix("backbone."): tensor for n, tensor in state.items() if n.startswith("backbone.")}
    torch.save(file, tmp_path / "resnet.pth")
    norm = "frozen" if published["config"]["PResNet"]["freeze_norm"] else "batch"
    backbone = ResNetVD(name=f"resnet{depth}", weights=str(tmp_path / "resnet.pth"), norm=norm)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor), name
    file["res_layers.0.blocks.0.branch2a.conv.weight"] = torch.ones(1)
    torch.save(file, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"are not of a resnet.*such as layer1\.0\.conv1\.weight"):
        ResNetVD(name=f"resnet{depth}", weights=str(tmp_path / "resnet.pth"), norm=norm)


def their_model(published: dict[str, Any]) -> Any:
    """transformers' model with the fixture's options, and the published layout of AIFI's positions."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    config = published["config"]
    encoder, decoder, depth = config["HybridEncoder"], config["decoder"], config["PResNet"]["depth"]
    second = "num_points" in decoder
    resnet = transformers.RTDetrResNetConfig(
        layer_type="bottleneck" if depth >= 50 else "basic",
        depths={18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth],
        hidden_sizes=[64 * 2**stage * (4 if depth >= 50 else 1) for stage in range(4)],
        out_features=["stage2", "stage3", "stage4"],
    )
    options = {
        "backbone_config": resnet,
        "freeze_backbone_batch_norms": config["PResNet"]["freeze_norm"],
        "encoder_in_channels": encoder["in_channels"],
        "encoder_hidden_dim": encoder["hidden_dim"],
        "encoder_layers": encoder["num_encoder_layers"],
        "encoder_ffn_dim": encoder["dim_feedforward"],
        "encoder_attention_heads": encoder["nhead"],
        "hidden_expansion": encoder["expansion"],
        "d_model": decoder["hidden_dim"],
        "num_queries": decoder["num_queries"],
        "decoder_in_channels": decoder["feat_channels"],
        "decoder_ffn_dim": decoder["dim_feedforward"],
        "decoder_layers": decoder["num_layers" if second else "num_decoder_layers"],
        "decoder_attention_heads": decoder["nhead"],
        "num_denoising": decoder["num_denoising"],
        "num_labels": config["num_classes"],
        "anchor_image_size": None,
    }
    if second:
        return transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**options)).eval()
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**options)).eval()


@torch.no_grad()
def test_transformers_on_square_images(published: dict[str, Any]) -> None:
    """With random weights of theirs, on images for which no published fault shows."""
    if published["config"]["HybridEncoder"]["depth_mult"] != 1:
        pytest.skip("theirs has no depth_mult")
    torch.manual_seed(0)
    theirs = their_model(published)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for layer in theirs.model.decoder.layers:
        nn.init.normal_(layer.encoder_attn.sampling_offsets.weight, std=0.1)
        nn.init.normal_(layer.encoder_attn.attention_weights.weight, std=0.3)
    for head in (*theirs.model.decoder.bbox_embed, theirs.model.enc_bbox_head):
        nn.init.normal_(head.layers[-1].weight, std=0.1)
    converted = convert(theirs.state_dict())
    assert converted.source == "transformers"
    ours = build_model(
        compose([*options_of(published["config"]), "model.encoder.position.transposed=false"]).model,
        num_classes=published["config"]["num_classes"],
        pretrained=False,
    ).eval()
    left = ours.load_state_dict(converted.state, strict=False)
    assert not left.unexpected_keys and all(name.endswith("num_batches_tracked") for name in left.missing_keys)
    images = torch.rand(2, 3, 160, 160)
    reference, found = theirs(pixel_values=images), ours(batch_of(images))
    close(found.logits.transpose(0, 1), reference.intermediate_logits, LOGITS, "logits")
    close(found.boxes[-1], reference.pred_boxes, BOXES, "boxes")
    assert reference.pred_boxes.std() > 0.05
