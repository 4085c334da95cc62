"""Models and criteria of RT-DETR with the options of its fixtures."""

from pathlib import Path
from typing import Any

from torch import Tensor

from detr.config import build_model, compose
from detr.models.detr import DETR
from detr.weights.families import convert
from tests.helpers.published import weights_of

# Float32 differs from the same in float64 by half of these, as the fixture says; both sides are in float32 here.
LOGITS, BOXES = 2e-5, 2e-6
MAPS = 2e-5  # of features of about 5
CASES = ("discrete", "agnostic", "one2many")
RANKINGS = {"default": "best", "agnostic": "agnostic", "one2many": "pairs"}


def state_of(shared: Path, case: dict[str, Any]) -> dict[str, Tensor]:
    return weights_of(shared, "rt_detr/base.pt", case)


def options_of(config: dict[str, Any]) -> list[str]:
    """Of our configuration, for their options."""
    backbone, encoder, decoder = config["PResNet"], config["HybridEncoder"], config["decoder"]
    second = "num_points" in decoder
    options = {
        "model": f"rt_detr{'v2' if second else ''}_r{backbone['depth']}",
        "model.backbone.norm": "frozen" if backbone["freeze_norm"] else "batch",
        "model.backbone.freeze": "[stem]" if backbone["freeze_at"] == 0 else "[]",
        "model.num_queries": decoder["num_queries"],
        "model.encoder.d_model": decoder["hidden_dim"],
        "model.encoder.channels": encoder["hidden_dim"],
        "model.encoder.nhead": encoder["nhead"],
        "model.encoder.num_layers": encoder["num_encoder_layers"],
        "model.encoder.dim_feedforward": encoder["dim_feedforward"],
        "model.encoder.expansion": float(encoder["expansion"]),
        "model.encoder.depth": float(encoder["depth_mult"]),
        "model.encoder.position.transposed": True,  # images of the fixture are not square
        "model.decoder.nhead": decoder["nhead"],
        "model.decoder.num_layers": decoder["num_layers" if second else "num_decoder_layers"],
        "model.decoder.dim_feedforward": decoder["dim_feedforward"],
        "model.decoder.num_points": decoder["num_points"] if second else decoder["num_decoder_points"],
        "model.denoising.num_queries": decoder["num_denoising"],
        "model.denoising.label_noise": decoder["label_noise_ratio"] / 2,
        "model.denoising.box_noise": float(decoder["box_noise_scale"]),
    }
    if second:
        options["model.queries.ranking"] = RANKINGS[decoder["query_select_method"]]
        if decoder["cross_attn_method"] == "discrete":
            options["model.decoder.sampling"] = "discrete_square"
    return [f"{name}={str(value).replace(' ', '')}" for name, value in options.items()]


def build(config: dict[str, Any], state: dict[str, Tensor]) -> DETR:
    model = build_model(compose(options_of(config)).model, num_classes=config["num_classes"], pretrained=False)
    model.load_state_dict(convert(state).state)
    return model.eval()
