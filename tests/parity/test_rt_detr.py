"""RT-DETR and RT-DETRv2 against numbers from the published implementation, and against transformers."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.config import build_criterion, build_model, compose
from detr.errors import UserError
from detr.losses import Matched, SetCriterion
from detr.models.backbones.resnet_vd import ResNetVD
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.models.layers.convolutions import RepVGGBlock
from detr.models.layers.deformable import DeformableAttention
from detr.models.values import Memory
from detr.postprocess import postprocess
from detr.types import Category, ImageBatch, Predictions
from detr.weights import families, load_weights, to_published
from detr.weights.families import convert
from tests.helpers.published import as_noise, as_targets, load_fixture, weights_of

# Float32 differs from the same in float64 by half of these, as the fixture says; both sides are in float32 here.
LOGITS, BOXES = 2e-5, 2e-6
MAPS = 2e-5  # of features of about 5
# In training, norms over batches of 40 cells enlarge what rounding does: float32 differs from float64 by about half.
TRAINED_LOGITS, TRAINED_BOXES = 1e-3, 5e-5
FILES = ("base", "base_v2", "holdout", "holdout_v2")
CASES = ("discrete", "agnostic", "one2many")
RANKINGS = {"default": "best", "agnostic": "agnostic", "one2many": "pairs"}


@pytest.fixture(scope="module", params=FILES)
def published(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    name = f"rt_detr/{request.param}.pt"
    if not (shared / "fixtures" / name).exists():
        pytest.skip(f"{name} is kept elsewhere")
    return load_fixture(shared, name)


@pytest.fixture(scope="module")
def state(published: dict[str, Any], shared: Path) -> dict[str, Tensor]:
    return state_of(shared, published)


def state_of(shared: Path, case: dict[str, Any]) -> dict[str, Tensor]:
    return weights_of(shared, "rt_detr/base.pt", case)


@pytest.fixture(scope="module")
def model(published: dict[str, Any], state: dict[str, Tensor]) -> DETR:
    return build(published["config"], state)


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


def batch_of(images: Tensor) -> ImageBatch:
    return ImageBatch(images=images, mask=torch.zeros_like(images[:, 0], dtype=torch.bool))


def close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")


@torch.no_grad()
def test_every_stage_of_evaluation(published: dict[str, Any], model: DETR) -> None:
    batch, expected = batch_of(published["images"]), published["eval"]
    maps = model.backbone(batch.images, batch.mask)
    for index, level in enumerate(expected.get("backbone", [])):
        close(maps[index][:, :: maps[index].shape[1] // level.shape[1]], level, MAPS, f"map {index}")
    *finer, coarsest = model.neck(maps)
    attended = model.encoder.attend(coarsest, torch.zeros_like(coarsest[:, 0], dtype=torch.bool), padded=False)
    close(attended.flatten(2).transpose(1, 2), expected["aifi"], MAPS, "AIFI")
    for index, (found, level) in enumerate(
        zip(model.encoder.fuse([*finer, attended], None), expected["encoder"], strict=True)
    ):
        close(found, level, MAPS, f"fused map {index}")

    memory = model.encode(batch)
    close(memory.tokens, expected["memory"], LOGITS, "memory")
    cells, usable = model.queries._cells(memory)
    assert torch.equal(usable[0], expected["valid_mask"])
    close(cells[0], expected["anchors"], BOXES, "anchors")
    queries, proposals = model.queries(memory, model.proposal_head)
    close(proposals.logits[0], expected["proposal_logits"], LOGITS, "proposals")
    close(proposals.boxes[0], expected["proposal_boxes"], BOXES, "proposals")
    close(queries.content, expected["content"], LOGITS, "content")
    outputs, references = model.decoder(queries, memory, model._refine, look_forward_twice=True)
    close(outputs, expected["hs"], LOGITS, "layers")
    for index, reference in enumerate(references):
        close(reference, expected["references"][index], BOXES, f"reference {index}")
        close(model.queries.position(reference), expected["query_pos"][index], LOGITS, f"position {index}")

    predictions = model(batch)
    close(predictions.logits, expected["logits"], LOGITS, "logits")
    close(predictions.boxes, expected["boxes"], BOXES, "boxes")
    sizes = [tuple(map(int, found["original_size"]))[::-1] for found in expected["detections"]]
    names = [str(label) for label in range(published["config"]["num_classes"])]
    top = published["config"]["postprocessor"]["num_top_queries"]
    for found, wanted in zip(postprocess(predictions, sizes, names, top), expected["detections"], strict=True):
        close(found.scores, wanted["scores"], 1e-5, "scores")
        assert torch.equal(found.labels, wanted["labels"])
        close(found.boxes, wanted["boxes"], 1e-3, "boxes in pixels")


@torch.no_grad()
def test_deployed(published: dict[str, Any], model: DETR) -> None:
    expected, batch = published["eval"]["deploy"], batch_of(published["images"])
    plain = deployed(model)
    convolution = plain.encoder.top_down[0].blocks[0][0]
    close(convolution.weight[:4], expected["kernel"], 1e-6, "kernel")
    close(convolution.bias, expected["bias"], 1e-6, "bias")
    assert not any(isinstance(module, RepVGGBlock) for module in plain.modules())
    found = plain(batch)
    assert expected["same_selection"]
    close(found.logits[0], expected["logits"], LOGITS, "logits")
    close(found.boxes[0], expected["boxes"], BOXES, "boxes")
    assert any(isinstance(module, RepVGGBlock) for module in model.modules())  # a copy was converted


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cases_in_evaluation(published: dict[str, Any], shared: Path, case: str) -> None:
    if case not in published.get("cases", {}):
        pytest.skip("of the second version only")
    of_case = published["cases"][case]
    model = build(of_case["config"], state_of(shared, of_case))
    for name, images in (("eval", published["images"]), ("images_transposed", published["images"].transpose(2, 3))):
        if name not in of_case:
            continue
        expected = of_case[name]
        predictions = model(batch_of(images))
        _, proposals = model.queries(model.encode(batch_of(images)), model.proposal_head)
        close(proposals.logits[0], expected["proposal_logits"], LOGITS, "proposals")
        close(proposals.boxes[0], expected["proposal_boxes"], BOXES, "proposals")
        close(predictions.logits, expected["logits"], LOGITS, "logits")
        close(predictions.boxes, expected["boxes"], BOXES, "boxes")


# Training


TRAININGS = ("train", "train_equal", "train_one_empty", "train_no_objects")
OURS = {"vfl": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}


def train(model: DETR, images: Tensor, case: dict[str, Any]) -> Predictions:
    """What the model predicts in training, with denoising queries disturbed by the published draws."""
    assert model.denoising is not None
    drawn = as_noise(case["noise"])
    model.denoising.draw = lambda labels: drawn  # type: ignore[method-assign]
    return model.train()(batch_of(images), as_targets(case))


def as_published(predictions: Predictions, case: dict[str, Any]) -> Predictions:
    """With the published numbers in their place."""
    proposals, denoising = predictions.proposals, predictions.denoising
    assert proposals is not None and denoising is not None
    if case["denoising"]["pad_size"]:
        numbers = {name: case["denoising"][name].flatten(1, 2)[:, None] for name in ("logits", "boxes")}
        denoising = replace(denoising, predictions=replace(denoising.predictions, **numbers))
    return replace(
        predictions,
        logits=case["logits"],
        boxes=case["boxes"],
        proposals=replace(proposals, logits=case["proposal_logits"][None], boxes=case["proposal_boxes"][None]),
        denoising=denoising,
    )


def losses_of(
    criterion: SetCriterion, predictions: Predictions, case: dict[str, Any], second: bool
) -> tuple[dict[str, Tensor], dict[str, Matched]]:
    """Losses by their published names, and what was matched."""
    matched = criterion.matched(predictions, as_targets(case))
    layers = len(predictions.boxes)
    values = {name: criterion._losses(part) for name, part in matched.items()}
    found = {}
    for theirs, ours in OURS.items():
        for layer in range(layers):
            suffix = "" if layer == layers - 1 else f"_aux_{layer}"
            found[f"loss_{theirs}{suffix}"] = values["main"][ours][layer]
            found[f"loss_{theirs}_dn_{layer}"] = values["denoising"][ours][layer]
        found[f"loss_{theirs}_{'enc_0' if second else f'aux_{layers - 1}'}"] = values["proposals"][ours][0]
    return found, matched


def pairs_of(matched: Matched, layer: int) -> set[tuple[int, int, int]]:
    """Image, query and target in the image."""
    matches = matched.matches
    start = torch.tensor([0, *[len(target) for target in matched.targets]]).cumsum(0)
    target = matches.target[layer] - start[matches.image]
    return set(zip(matches.image.tolist(), matches.query[layer].tolist(), target.tolist(), strict=True))


def check_training(model: DETR, images: Tensor, case: dict[str, Any], *, second: bool, ties: bool = False) -> None:
    """ties: equal queries, which may be matched either way."""
    model = copy.deepcopy(model)
    criterion = build_criterion(compose(["model=rt_detr_r18"]).criterion, model.num_classes)
    predictions = train(model, images, case)
    published = as_published(predictions, case)
    for found, wanted in zip(predictions.everything(), published.everything(), strict=True):
        tolerance = TRAINED_BOXES if found.shape[-1] == 4 else TRAINED_LOGITS
        close(found, wanted, tolerance)

    losses, matched = losses_of(criterion, published, case, second)
    assert case["losses"].keys() <= losses.keys()
    for name, loss in losses.items():
        wanted = case["losses"].get(name, torch.tensor(0.0))  # no denoising without any object
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for name, (of_layer, layer) in {
        "proposals": (matched["proposals"], 0),
        **{f"layer{layer}": (matched["main"], layer) for layer in range(len(predictions.boxes))},
    }.items():
        pairs = {
            (image, query, target)
            for image, (queries, of_image) in enumerate(case["indices"][name])
            for query, target in zip(queries.tolist(), of_image.tolist(), strict=True)
        }
        assert ties or pairs_of(of_layer, layer) == pairs, name

    total = criterion(predictions, as_targets(case))["loss"]
    torch.testing.assert_close(total, case["total"], rtol=4e-6, atol=0)
    total.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len([*model.named_parameters()]) - len(trained) <= len(case["grad_none"])
    state = {name: trained.get(name, torch.zeros_like(tensor)) for name, tensor in model.state_dict().items()}
    gradients = to_published(state, families.RT_DETRV2 if second else families.RT_DETR)
    assert not any(gradients[name].any() for name in case["grad_none"])  # here it may be 0 in place of none
    for name, norm in case["grad_norms"].items():
        allowed = 1e-3 * (norm + 1e-4 * case["grad_norm_total"])
        assert abs(gradients[name].norm().item() - norm) <= allowed, name


@pytest.mark.parametrize("case", TRAININGS)
def test_training(published: dict[str, Any], model: DETR, case: str) -> None:
    second = "num_points" in published["config"]["decoder"]
    check_training(model, published["images"], published[case], second=second)


def test_layers_in_training(published: dict[str, Any], model: DETR) -> None:
    """The matched queries' features and references."""
    case = published["train"]
    seen: list[tuple[Tensor, list[Tensor]]] = []
    model = copy.deepcopy(model)
    handle = model.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    train(model, published["images"], case)
    handle.remove()
    ((outputs, references),) = seen
    places = case["denoising"]["pad_size"]
    close(outputs[:, :, places:], case["hs"], TRAINED_LOGITS, "layers")
    for index, reference in enumerate(references):
        close(reference[:, places:], case["references"][index], TRAINED_BOXES, f"reference {index}")


@pytest.mark.parametrize("name", CASES)
def test_cases_in_training(published: dict[str, Any], shared: Path, name: str) -> None:
    if name not in published.get("cases", {}):
        pytest.skip("of the second version only")
    case = published["cases"][name]
    model = build(case["config"], state_of(shared, case))
    if "train" in case:
        check_training(model, published["images"], case["train"], second=True, ties=name == "one2many")
        return
    # Published training fails, since its proposals have one class; ours takes any object for that class.
    criterion = build_criterion(compose(["model=rt_detr_r18"]).criterion, model.num_classes)
    losses = criterion(train(model, published["images"], published["train"]), as_targets(published["train"]))
    losses["loss"].backward()
    assert losses["loss_ce_proposals"] > 0 and model.proposal_head.class_head.weight.grad.isfinite().all()


# Attention blocks


@pytest.mark.parametrize(
    "block", ["se", "non_local", "criss_cross", "dual", "residual", "spatial_transformer", "hard", "self_attention"]
)
@torch.no_grad()
def test_attention_blocks_change_nothing_at_the_start(shared: Path, block: str) -> None:
    published = load_fixture(shared, "rt_detr/base.pt")
    state = state_of(shared, published)
    model = build(published["config"], state)
    config = compose([*options_of(published["config"]), f"model/attention={block}"])
    extended = build_model(config.model, num_classes=model.num_classes, pretrained=False).eval()
    left = extended.load_state_dict(convert(state).state, strict=False)
    assert left.missing_keys and all("attention" in name for name in left.missing_keys)
    expected, found = (one(batch_of(published["images"])) for one in (model, extended))
    close(found.logits, expected.logits, 1e-5, "logits")
    close(found.boxes, expected.boxes, 1e-5, "boxes")


# What is right where the published code is not


def attend(sampling: str, shapes: tuple[tuple[int, int], ...], ratios: Tensor | None = None) -> Tensor:
    """The cell of a single map whose value an attention with one point takes, for anchors all over the map."""
    ((height, width),) = shapes
    attention = DeformableAttention(d_model=2, nhead=1, num_levels=1, num_points=1, sampling=sampling)
    for projection in (attention.value_proj, attention.output_proj):
        nn.init.eye_(projection.weight)
    nn.init.zeros_(attention.sampling_offsets.bias)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    tokens = torch.stack((x, y), dim=-1).flatten(0, 1).float()[None]
    memory = Memory(
        tokens=tokens,
        position=tokens,
        mask=None,
        shapes=shapes,
        sizes=torch.tensor([(width, height)]),
        valid_ratios=torch.ones(1, 1, 2) if ratios is None else ratios,
        centers=tokens,
    )
    points = torch.tensor([[-0.4, 0.5], [0.02, 0.02], [0.98, 0.5], [0.5, 0.98], [1.7, 1.7]])
    return attention.attend(torch.zeros(1, 5, 2), points[None], memory)[0]


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_discrete_sampling_stays_within_maps_that_are_not_square(shape: tuple[int, int]) -> None:
    height, width = shape
    right, bottom, row, column = width - 1, height - 1, int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    expected = torch.tensor([[0, row], [0, 0], [right, row], [column, bottom], [right, bottom]])
    assert torch.equal(attend("discrete", (shape,)), expected.float())
    if height <= width:
        limited = torch.stack((expected[:, 0].clamp(max=bottom), expected[:, 1]), dim=-1)
        assert torch.equal(attend("discrete_square", (shape,)), limited.float())


def test_discrete_sampling_stays_out_of_the_padding() -> None:
    found = attend("discrete", ((6, 9),), ratios=torch.tensor([[[5 / 9, 4 / 6]]]))
    assert found[:, 0].max() == 4 and found[:, 1].max() == 3


# Weights


@pytest.mark.parametrize("name", ["rtdetr_r18vd", "rtdetr_r50vd", "rtdetrv2_r18vd", "rtdetrv2_r50vd"])
def test_state_dicts_of_full_size(shared: Path, name: str) -> None:
    content = json.loads((shared / "fixtures" / "rt_detr" / f"state_dict_{name}.json").read_text())
    family = families.RT_DETRV2 if "v2" in name else families.RT_DETR
    converted = convert({key: torch.zeros(shape) for key, shape in content["keys"].items()})
    assert converted.family is family and converted.num_classes == 80
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
    path = tmp_path / "published.pth"
    others = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": others, "ema": {"module": state, "updates": 7}, "last_epoch": 3}, path)
    classes = published["config"]["num_classes"]
    fresh = build_model(compose(options_of(published["config"])).model, num_classes=classes, pretrained=False)
    report = load_weights(fresh, path, [Category(id=number, name=str(number)) for number in range(classes)])
    assert not (report.replaced or report.unused or report.adapted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


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
