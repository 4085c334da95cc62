"""Models of D-FINE and DEIM with the options of their fixtures, and their training beside published numbers."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr.boxes import cxcywh_to_xyxy
from detr.config import build_criterion, build_model, compose
from detr.edges import between_bins, bin_distances, edge_distances
from detr.losses import Matched, SetCriterion
from detr.models.detr import DETR
from detr.types import Predictions, Target
from detr.weights import to_published
from detr.weights.families import convert
from tests.helpers.published import as_targets, close, pairs_of, published_pairs, train

# Float32 differs from the same in float64 by up to these, as the fixture says.
LOGITS, BOXES = 4e-5, 4e-6
MAPS, FUSED = 2e-4, 1e-4  # float64 differs by two thirds of these; features of up to 90, and 10
TRAININGS = ("train", "train_equal", "train_one_empty", "train_no_objects")
# In training, norms over batches of 48 cells enlarge what rounding does.
TRAINED_LOGITS, TRAINED_BOXES = 2e-3, 2e-4
OURS = {"vfl": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou", "fgl": "loss_fgl", "ddf": "loss_ddf"}


def options_of(config: dict[str, Any], kind: str = "d_fine") -> list[str]:
    """Of our configuration, for their options. kind: d_fine or deim."""
    backbone, encoder, decoder = config["HGNetv2"], config["HybridEncoder"], config["DFINETransformer"]
    used = decoder["eval_idx"] % decoder["num_layers"] + 1
    options = {
        "model": f"{kind}_{'n' if decoder['num_levels'] == 2 else 's'}",
        "model.backbone.name": f"hgnetv2_{backbone['name'].lower()}",
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
        "model.decoder.num_layers": decoder["num_layers"],
        "model.decoder.eval_layers": used,
        "model.decoder.dim_feedforward": decoder["dim_feedforward"],
        "model.decoder.num_points": decoder["num_points"],
        "model.decoder.reg_max": decoder["reg_max"],
        "model.decoder.reg_scale": float(decoder["reg_scale"]),
        "model.denoising.num_queries": decoder["num_denoising"],
        "model.denoising.label_noise": decoder["label_noise_ratio"] / 2,
    }
    return [f"{name}={str(value).replace(' ', '')}" for name, value in options.items()]


def build(config: dict[str, Any], state: dict[str, Tensor], kind: str = "d_fine") -> DETR:
    model = build_model(compose(options_of(config, kind)).model, num_classes=config["num_classes"], pretrained=False)
    left = model.load_state_dict(convert(state).state, strict=False)
    # Theirs count no batches where norms are frozen.
    assert not left.unexpected_keys and all(name.endswith("num_batches_tracked") for name in left.missing_keys)
    return model.eval()


def numbers_of(case: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """What was published of predictions, in the order of `Predictions.everything`."""
    noised = case["denoising"]
    numbers = {
        "": case,
        "pre_": {name: tensor[None] for name, tensor in case.items() if name.startswith("pre_")},
        "proposal_": {name: tensor[None] for name, tensor in case.items() if name.startswith("proposal_")},
    }
    found = [(f"{prefix}{name}", of[prefix + name]) for prefix, of in numbers.items() for name in ("logits", "boxes")]
    if noised["pad_size"]:
        in_a_row = {name: noised[name].flatten(1, 2)[:, None] for name in ("logits", "boxes")}
        in_a_row |= {name: noised[name].flatten(0, 1)[None, None] for name in ("pre_logits", "pre_boxes")}
        found += [(f"dn_{name}", tensor) for name, tensor in in_a_row.items()]
    return found


def losses_of(
    criterion: SetCriterion, predictions: Predictions, targets: list[Target]
) -> tuple[dict[str, Tensor], dict[str, tuple[Matched, int]]]:
    """Losses by their published names, and what was matched, with its layer, by the published names of outputs."""
    parts = criterion.matched(predictions, targets)
    layers, found = len(predictions.boxes), {}
    for part, matched in parts.items():
        values = criterion._losses(matched)
        for theirs, ours in OURS.items():
            for layer, value in enumerate(values.get(ours, ())):
                main = "" if layer == layers - 1 else f"_aux_{layer}"
                suffix = {
                    "main": main,
                    "preliminary": "_pre",
                    "proposals": "_enc_0",
                    "denoising": f"_dn_{layer}",
                    "denoising_preliminary": "_dn_pre",
                }[part]
                found[f"loss_{theirs}{suffix}"] = value
    outputs = {f"layer{layer}": (parts["main"], layer) for layer in range(layers)}
    return found, {**outputs, "pre": (parts["preliminary"], 0), "proposals": (parts["proposals"], 0)}


def as_published(predictions: Predictions, case: dict[str, Any]) -> Predictions:
    """With the published numbers in their place, as far as they are."""
    numbers = dict(numbers_of(case))

    def part(own: Predictions, prefix: str, corners: Tensor | None = None) -> Predictions:
        replaced = {name: numbers[prefix + name] for name in ("logits", "boxes") if prefix + name in numbers}
        if corners is not None:
            replaced["distributions"] = corners.unflatten(-1, (4, -1))
        return replace(own, **replaced)

    assert predictions.denoising is not None
    noised = predictions.denoising.predictions
    corners = case["denoising"].get("pred_corners")
    denoised = replace(
        part(noised, "dn_", None if corners is None else corners.flatten(1, 2)[:, None]),
        preliminary=part(noised.preliminary, "dn_pre_"),
    )
    return replace(
        part(predictions, "", case.get("pred_corners")),
        preliminary=part(predictions.preliminary, "pre_"),
        proposals=part(predictions.proposals, "proposal_"),
        denoising=replace(predictions.denoising, predictions=denoised),
    )


def check_targets(model: DETR, case: dict[str, Any]) -> None:
    """What FGL aims at, of the pairs in the order of the published union."""
    starts = torch.cat([case["ref_points"][i, queries] for i, (queries, _) in enumerate(case["indices_union"])])
    boxes = torch.cat([case["targets"][i]["boxes"][wanted] for i, (_, wanted) in enumerate(case["indices_union"])])
    scale = model.decoder.reg_scale.item()
    bins = bin_distances(model.decoder.reg_max, model.decoder.up[0], scale)
    left, right = between_bins(edge_distances(starts, cxcywh_to_xyxy(boxes), scale), bins)
    expected = case["fgl_targets"]
    assert torch.equal(left.flatten(), expected["left"].long())
    close(right.flatten(), expected["weight_right"], 1e-4, "weights")
    close(1 - right.flatten(), expected["weight_left"], 1e-4, "weights")


def check_training(model: DETR, name: str, images: Tensor, case: dict[str, Any]) -> None:
    """name: of the configuration that has the criterion."""
    scale = f"model.decoder.reg_scale={model.decoder.reg_scale.item()}"
    criterion = build_criterion(compose([f"model={name}", scale]).criterion, model.num_classes)
    trained, targets = copy.deepcopy(model), as_targets(case)
    predictions = train(trained, images, case)
    found = {
        prefix + name: tensor
        for prefix, part in {
            "": predictions,
            "pre_": predictions.preliminary,
            "proposal_": predictions.proposals,
            "dn_": predictions.denoising.predictions,
            "dn_pre_": predictions.denoising.predictions.preliminary,
        }.items()
        for name, tensor in part.tensors().items()
    }
    for output, wanted in numbers_of(case):
        close(found[output], wanted, TRAINED_BOXES if output.endswith("boxes") else TRAINED_LOGITS, output)
    if "pred_corners" in case:
        close(found["distributions"].flatten(-2), case["pred_corners"], TRAINED_LOGITS, "corners")

    losses, parts = losses_of(criterion, as_published(predictions, case), targets)
    for loss, wanted in case["losses"].items():
        value = losses[loss.replace("_mal", "_vfl")]
        # Distributions are published of one case only; those of the others are ours.
        exact = "pred_corners" in case or not any(term in loss for term in ("fgl", "ddf"))
        tolerance = 1e-5 if exact else 2e-3
        torch.testing.assert_close(
            value, wanted, rtol=tolerance, atol=1e-6, msg=lambda text, loss=loss: f"{loss}: {text}"
        )
    for output, (part, layer) in parts.items():
        assert pairs_of(part, layer) == published_pairs(case["indices"][output]), output
    union = parts["pre"][0].union
    assert union is not None and pairs_of(union, 0) == published_pairs(case["indices_union"])
    if "fgl_targets" in case:
        check_targets(model, case)

    total = criterion(predictions, targets)["loss"]
    torch.testing.assert_close(total, case["total"], rtol=6e-5, atol=0)
    total.backward()
    found = {name: parameter.grad for name, parameter in trained.named_parameters() if parameter.grad is not None}
    gradients = to_published({name: found.get(name, tensor * 0) for name, tensor in trained.state_dict().items()})
    for name, norm in case["grad_norms"].items():
        if ".lab." not in name:  # near zero by nature before a norm, as the fixture says
            allowed = 2e-3 * (norm + 1e-4 * case["grad_norm_total"])
            assert abs(gradients[name].norm().item() - norm) <= allowed, name
