"""D-FINE against numbers from the published implementation, and against transformers."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.boxes import cxcywh_to_xyxy
from detr.config import build_criterion, build_model, compose
from detr.edges import between_bins, bin_distances, edge_distances
from detr.losses import Matched, SetCriterion
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.models.layers.convolutions import RepVGGBlock
from detr.postprocess import postprocess
from detr.types import Category, ImageBatch, Predictions, Target
from detr.weights import load_weights, to_published
from detr.weights.families import convert
from detr.weights.families.d_fine import D_FINE
from tests.helpers.published import as_noise, as_targets, load_fixture, weights_of

# Float32 differs from the same in float64 by up to these, as the fixture says.
LOGITS, BOXES = 4e-5, 4e-6
MAPS, FUSED = 2e-4, 1e-4  # float64 differs by two thirds of these; features of up to 90, and 10
FILES = ("base", "holdout")


@pytest.fixture(scope="module", params=FILES)
def published(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    name = f"d_fine/{request.param}.pt"
    if not (shared / "fixtures" / name).exists():
        pytest.skip(f"{name} is kept elsewhere")
    return load_fixture(shared, name)


@pytest.fixture(scope="module")
def state(published: dict[str, Any], shared: Path) -> dict[str, Tensor]:
    return weights_of(shared, "d_fine/base.pt", published)


@pytest.fixture(scope="module")
def model(published: dict[str, Any], state: dict[str, Tensor]) -> DETR:
    return build(published["config"], state)


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


def batch_of(images: Tensor) -> ImageBatch:
    return ImageBatch(images=images, mask=torch.zeros_like(images[:, 0], dtype=torch.bool))


def close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")


@torch.no_grad()
def test_every_stage_of_evaluation(published: dict[str, Any], model: DETR) -> None:
    batch, expected = batch_of(published["images"]), published["eval"]
    maps = model.backbone(batch.images, batch.mask)
    for index, level in enumerate(expected["backbone"]):
        close(maps[index][:, :: maps[index].shape[1] // level.shape[1]], level, MAPS, f"map {index}")
    *finer, coarsest = model.neck(maps)
    attended = model.encoder.attend(coarsest, torch.zeros_like(coarsest[:, 0], dtype=torch.bool), padded=False)
    close(attended.flatten(2).transpose(1, 2), expected["aifi"], MAPS, "AIFI")
    for index, (found, level) in enumerate(
        zip(model.encoder.fuse([*finer, attended], None), expected["encoder"], strict=True)
    ):
        close(found, level, FUSED, f"fused map {index}")

    memory = model.encode(batch)
    close(memory.tokens, expected["memory"], FUSED, "memory")
    cells, usable = model.queries._cells(memory)
    assert torch.equal(usable[0], expected["valid_mask"])
    close(cells[0][usable[0]], expected["anchors"][usable[0]], BOXES, "anchors")
    queries, proposals = model.queries(memory, model.proposal_head)
    close(proposals.logits[0], expected["proposal_logits"], LOGITS, "proposals")
    close(proposals.boxes[0], expected["proposal_boxes"], BOXES, "proposals")
    close(queries.content, expected["content"], FUSED, "content")

    used = len(model.decoder.used)
    outputs, refinements = model.decoder(queries, memory, model._refine)
    close(outputs, expected["hs"][:used], FUSED, "layers")
    references = [queries.anchors, *(refinement.boxes for refinement in refinements)]
    distances = bin_distances(model.decoder.reg_max, model.decoder.up[0], model.decoder.reg_scale[0])
    close(distances, expected["project"], BOXES, "weighting function")
    for index, refinement in enumerate(refinements):
        close(references[index], expected["references"][index], BOXES, f"reference {index}")
        close(model.queries.position(references[index]), expected["query_pos"][index], LOGITS, f"position {index}")
        close(refinement.start, expected["ref_points"][index], BOXES, f"start {index}")
        close(refinement.distributions.flatten(-2), expected["pred_corners"][index], FUSED, f"corners {index}")
        edges = refinement.distributions.softmax(-1) @ distances
        close(edges, expected["edges"][index], LOGITS, f"edges {index}")
        quality = model.heads[index].location_quality(refinement.distributions)
        close(quality, expected["lqe"][index], LOGITS, f"quality {index}")
        close(model.heads[index].class_head(outputs[index]), expected["raw_logits"][index], LOGITS, f"logits {index}")
    preliminary = model.heads[0].preliminary(outputs[0], refinements[0])
    close(preliminary["logits"], expected["pre_logits"], LOGITS, "preliminary")
    close(preliminary["boxes"], expected["pre_boxes"], BOXES, "preliminary")

    predictions = model(batch)
    close(predictions.logits, expected["logits"][:used], LOGITS, "logits")
    close(predictions.boxes, expected["boxes"][:used], BOXES, "boxes")
    sizes = [tuple(map(int, found["original_size"]))[::-1] for found in expected["detections"]]
    names = [str(label) for label in range(published["config"]["num_classes"])]
    top = published["config"]["postprocessor"]["num_top_queries"]
    for found, wanted in zip(postprocess(predictions, sizes, names, top), expected["detections"], strict=True):
        close(found.scores, wanted["scores"], 1e-5, "scores")
        assert torch.equal(found.labels, wanted["labels"])
        close(found.boxes, wanted["boxes"], 3e-3, "boxes in pixels")


@torch.no_grad()
def test_deployed(published: dict[str, Any], model: DETR) -> None:
    expected, plain = published["eval"]["deploy"], deployed(model)
    assert expected["same_selection"]
    assert not any(isinstance(module, RepVGGBlock) for module in plain.modules())
    assert sum(parameter.numel() for parameter in plain.parameters()) == expected["parameters"]
    found = plain(batch_of(published["images"]))
    close(found.logits[0], expected["logits"], LOGITS, "logits")
    close(found.boxes[0], expected["boxes"], BOXES, "boxes")


# Training


TRAININGS = ("train", "train_equal", "train_one_empty", "train_no_objects")
# In training, norms over batches of 48 cells enlarge what rounding does.
TRAINED_LOGITS, TRAINED_BOXES = 2e-3, 2e-4
OURS = {"vfl": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou", "fgl": "loss_fgl", "ddf": "loss_ddf"}


def train(model: DETR, images: Tensor, case: dict[str, Any]) -> Predictions:
    """What the model predicts in training, with denoising queries disturbed by the published draws."""
    assert model.denoising is not None
    drawn = as_noise(case["noise"])
    model.denoising.draw = lambda labels: drawn  # type: ignore[method-assign]
    return model.train()(batch_of(images), as_targets(case))


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


def pairs_of(matched: Matched, layer: int) -> set[tuple[int, int, int]]:
    """Image, query and target in the image."""
    matches = matched.matches
    start = torch.tensor([0, *[len(target) for target in matched.targets]]).cumsum(0)
    target = matches.target[layer] - start[matches.image]
    return set(zip(matches.image.tolist(), matches.query[layer].tolist(), target.tolist(), strict=True))


def published_pairs(indices: Any) -> set[tuple[int, int, int]]:
    return {
        (image, query, target)
        for image, (queries, targets) in enumerate(indices)
        for query, target in zip(queries.tolist(), targets.tolist(), strict=True)
    }


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
    pooled = parts["pre"][0].pooled
    assert pooled is not None and pairs_of(pooled, 0) == published_pairs(case["indices_union"])
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


@pytest.mark.parametrize("case", TRAININGS)
def test_training(published: dict[str, Any], model: DETR, case: str) -> None:
    check_training(model, "d_fine_s", published["images"], published[case])


@pytest.mark.parametrize("stages", ["[backbone]", "[neck]"])
@pytest.mark.parametrize(
    "block", ["se", "non_local", "criss_cross", "dual", "residual", "spatial_transformer", "hard", "self_attention"]
)
@torch.no_grad()
def test_attention_blocks_change_nothing_at_the_start(
    published: dict[str, Any], model: DETR, block: str, stages: str
) -> None:
    placement = [f"model/attention={block}", f"model.attention.{block}.stages={stages}"]
    config = compose([*options_of(published["config"]), *placement, f"model.attention.{block}.where=after"])
    extended = build_model(config.model, num_classes=model.num_classes, pretrained=False).eval()
    left = extended.load_state_dict(model.state_dict(), strict=False)
    assert left.missing_keys and not left.unexpected_keys
    expected, found = (one(batch_of(published["images"])) for one in (model, extended))
    close(found.logits, expected.logits, 1e-5, "logits")
    close(found.boxes, expected.boxes, 1e-5, "boxes")


# Weights


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
    path = tmp_path / "published.pth"
    others = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": others, "ema": {"module": state, "updates": 7}, "last_epoch": 3}, path)
    classes = published["config"]["num_classes"]
    fresh = build_model(compose(options_of(published["config"])).model, num_classes=classes, pretrained=False)
    report = load_weights(fresh, path, [Category(id=number, name=str(number)) for number in range(classes)])
    assert not (report.replaced or report.unused or report.adapted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


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
