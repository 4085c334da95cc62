"""Published weights by their names alone. Whole models are compared in tests/parity."""

import pytest
import torch

from detr.config import build_model, compose
from detr.errors import UserError
from detr.weights import to_published
from detr.weights.families import DAB_DETR, convert, recognize


def test_backbones_of_timm_inside_transformers() -> None:
    prefix = "model.backbone.conv_encoder.model"
    names = (f"{prefix}.layer1.0.bn1.weight", f"{prefix}._backbone.conv1.weight", f"{prefix}.bn1.num_batches_tracked")
    found = convert({name: torch.ones(3) for name in names}, DAB_DETR)
    assert list(found.state) == ["backbone.body.layer1.0.bn1.weight", "backbone.body.conv1.weight"]
    assert list(found.dropped) == [names[2]]


def test_copies_that_differ_are_refused() -> None:
    state = {f"{name}bbox_embed.layers.0.bias": torch.ones(3) for name in ("", "transformer.decoder.")}
    assert list(convert(state, DAB_DETR).state) == ["heads.0.box_head.layers.0.bias"]
    state["bbox_embed.layers.0.bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"transformer\.decoder\.bbox_embed\.layers\.0\.bias is not the copy"):
        convert(state, DAB_DETR)


def test_weights_of_other_relatives_are_refused() -> None:
    names = ("class_embed.0.weight", "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight")
    for further in ("label_enc.weight", "tgt_embed.weight"):
        with pytest.raises(UserError, match="DAB-Deformable-DETR or DN-Deformable-DETR from elsewhere cannot be"):
            recognize({name: torch.ones(3) for name in (*names, further)})


def test_models_without_published_names_are_refused() -> None:
    with torch.device("meta"):
        model = build_model(compose(["model=small", "~model/denoising"]).model, num_classes=3, pretrained=False)
    with pytest.raises(UserError, match=r"Wanted our weights of .*DINO, DN-DETR, .*, DETR, got tensors such as"):
        to_published(model.state_dict())
