"""Weights of D-FINE and DEIM, from their authors and from transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.config import build_model, compose
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.weights import to_published
from detr.weights.families import convert
from detr.weights.families.d_fine import D_FINE
from tests.helpers.d_fine import BOXES, LOGITS, options_of
from tests.helpers.published import batch_of, close, takes_averaged_weights


@pytest.mark.parametrize("size", ["n", "s", "m", "l", "x"])
@pytest.mark.parametrize("kind", ["dfine", "deim"])
def test_state_dicts_of_full_size(shared: Path, kind: str, size: str) -> None:
    path = shared / "fixtures" / {"dfine": "d_fine", "deim": "deim"}[kind] / f"state_dict_{kind}_{size}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is kept elsewhere")
    content = json.loads(path.read_text())
    converted = convert({key: torch.zeros(shape) for key, shape in content["keys"].items()})
    assert converted.family is D_FINE and converted.num_classes == 80
    assert converted.options == f"model=d_fine_{size}"
    assert set(converted.dropped.values()) == {"constants that are computed", "copies of other tensors"}
    with torch.device("meta"):
        model = build_model(
            compose([f"model={kind.replace('dfine', 'd_fine')}_{size}"]).model, num_classes=80, pretrained=False
        )
    counts = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    assert {key: tensor.shape for key, tensor in model.state_dict().items() if key not in counts} == {
        key: tensor.shape for key, tensor in converted.state.items() if key not in counts
    }
    parameters = [*model.parameters()]
    assert sum(p.numel() for p in parameters if p.requires_grad) == content["trained"]
    assert sum(p.numel() for p in parameters) == content["parameters"]
    assert sum(p.numel() for p in deployed(model).parameters()) == content["deploy_parameters"]
    back = to_published(converted.state)
    assert {key: [*tensor.shape] for key, tensor in back.items()} == content["keys"]


def test_published_names_and_back(state: dict[str, Tensor], model: DETR) -> None:
    back = to_published(model.state_dict())
    assert {name for name in back if name in state or "num_batches_tracked" not in name} == state.keys()
    for name, tensor in state.items():
        if name not in ("decoder.anchors", "decoder.valid_mask"):  # of images of 640 x 640 there
            assert torch.equal(back[name], tensor), name


def test_averaged_weights_are_taken_from_their_files(
    published: dict[str, Any], state: dict[str, Tensor], model: DETR, tmp_path: Path
) -> None:
    config = published["config"]
    fresh = build_model(compose(options_of(config)).model, num_classes=config["num_classes"], pretrained=False)
    takes_averaged_weights(fresh, tmp_path / "published.pth", state, model, config["num_classes"])


def test_transformers_on_square_images(published: dict[str, Any]) -> None:
    """With random weights of theirs, on images for which no published fault shows."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    config = published["config"]
    encoder, decoder = config["HybridEncoder"], config["DFINETransformer"]
    strides = decoder["feat_strides"]
    backbone = transformers.HGNetV2Config(
        hidden_sizes=[64, 256, 512, 1024],
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        use_learnable_affine_block=True,
        out_features=[f"stage{index}" for index in range(5 - len(strides), 5)],
    )
    torch.manual_seed(0)
    theirs = transformers.DFineForObjectDetection(
        transformers.DFineConfig(
            backbone_config=backbone,
            freeze_backbone_batch_norms=False,
            encoder_in_channels=encoder["in_channels"],
            encoder_hidden_dim=encoder["hidden_dim"],
            encoder_ffn_dim=encoder["dim_feedforward"],
            encoder_attention_heads=encoder["nhead"],
            hidden_expansion=encoder["expansion"],
            depth_mult=encoder["depth_mult"],
            feat_strides=strides,
            encode_proj_layers=[len(strides) - 1],
            num_feature_levels=len(strides),
            d_model=decoder["hidden_dim"],
            num_queries=decoder["num_queries"],
            decoder_in_channels=decoder["feat_channels"],
            decoder_ffn_dim=decoder["dim_feedforward"],
            decoder_layers=decoder["num_layers"],
            decoder_attention_heads=decoder["nhead"],
            decoder_n_points=decoder["num_points"],
            max_num_bins=decoder["reg_max"],
            reg_scale=decoder["reg_scale"],
            num_denoising=decoder["num_denoising"],
            num_labels=config["num_classes"],
        )
    ).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1 and not name.endswith(("up", "reg_scale")):
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        elif parameter.dim() > 1:  # theirs are so small that all tokens have nearly the same score
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    converted = convert(theirs.state_dict())
    assert converted.source == "transformers" and converted.family is D_FINE
    ours = build_model(
        compose(
            [*options_of(config), "model.encoder.position.transposed=false", "model.decoder.eval_layers=null"]
        ).model,
        num_classes=config["num_classes"],
        pretrained=False,
    ).eval()
    left = ours.load_state_dict(converted.state, strict=False)
    assert not left.unexpected_keys and all(name.endswith("num_batches_tracked") for name in left.missing_keys)
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        reference, found = theirs(pixel_values=images), ours(batch_of(images))
    close(found.logits[-1], reference.logits, LOGITS, "logits")
    close(found.boxes[-1], reference.pred_boxes, BOXES, "boxes")
    assert reference.pred_boxes.std() > 0.05
