"""Conditional, DAB and Deformable DETR against the independent implementations in Hugging Face's transformers, with
random weights; deformable attention against a loop; weights under the names of their authors."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr import Detector
from detr.config import build_criterion, build_model, compose
from detr.models.detr import DETR
from detr.models.layers.deformable import DeformableAttention
from detr.models.values import Memory
from detr.published import PUBLISHED
from detr.types import Category, Predictions
from detr.weights import families, load_weights, to_published
from detr.weights.families import Converted, convert
from tests.helpers import make_batch, random_targets

NUM_CLASSES, QUERIES, D_MODEL, ENCODER_LAYERS, DECODER_LAYERS = 5, 11, 64, 2, 3
SIZES = (
    f"model.num_queries={QUERIES}",
    f"model.encoder.d_model={D_MODEL}",
    "model.encoder.nhead=4",
    f"model.encoder.num_layers={ENCODER_LAYERS}",
    f"model.decoder.num_layers={DECODER_LAYERS}",
    "model.encoder.dim_feedforward=48",
)
FAMILIES = {
    "conditional": families.CONDITIONAL_DETR,
    "dab": families.DAB_DETR,
    "deformable": families.DEFORMABLE_DETR,
    "refined": families.REFINED_DEFORMABLE_DETR,
    "two_stage": families.TWO_STAGE_DEFORMABLE_DETR,
}
CATEGORIES = [Category(id=number, name=str(number)) for number in range(NUM_CLASSES)]


def build(options: str, *more: str, num_classes: int = NUM_CLASSES) -> DETR:
    config = compose([*options.split(), *more])
    return build_model(config.model, num_classes=num_classes, pretrained=False).eval()


# Theirs


def their_config(kind: str, **options: Any) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    common = {"use_timm_backbone": False, "use_pretrained_backbone": False, "class_cost": 2, **options}
    if kind == "conditional":
        # With auxiliary_loss, their decoder hands on normalized outputs, unlike the published one.
        config = transformers.ConditionalDetrConfig(backbone=None, auxiliary_loss=False, **common)
        return config, transformers.ConditionalDetrForObjectDetection
    if kind == "dab":
        common["hidden_size"] = common.pop("d_model")
        return transformers.DabDetrConfig(auxiliary_loss=True, **common), transformers.DabDetrForObjectDetection
    config = transformers.DeformableDetrConfig(
        backbone=None,
        auxiliary_loss=True,
        with_box_refine=kind != "deformable",
        two_stage=kind == "two_stage",
        two_stage_num_proposals=common["num_queries"],
        **common,
    )
    return config, transformers.DeformableDetrForObjectDetection


def build_theirs(kind: str, *, resnet: dict[str, Any], **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    several = kind in ("deformable", "refined", "two_stage") and options.get("num_feature_levels") != 1
    resnet["out_features"] = ["stage2", "stage3", "stage4"] if several else ["stage4"]
    config, model = their_config(kind, backbone_config=transformers.ResNetConfig(**resnet), **options)
    theirs = model(config)
    if kind in ("refined", "two_stage"):  # heads of their own for all layers, which the decoder has too
        theirs.bbox_embed = theirs.model.decoder.bbox_embed = copies(theirs.bbox_embed)
    if kind == "two_stage":
        theirs.class_embed = theirs.model.decoder.class_embed = copies(theirs.class_embed)
    elif kind == "refined":
        theirs.class_embed = copies(theirs.class_embed)
    return theirs


def copies(modules: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(module) for module in modules)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Zero biases, zero boxes and unit norms would hide mistakes."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("normalization.weight") or name.endswith("running_var"):
            buffer.copy_(0.8 + 0.4 * torch.rand_like(buffer))
        elif name.endswith(("normalization.bias", "running_mean")):
            buffer.copy_(0.2 * torch.randn_like(buffer))


@torch.no_grad()
def hide_unusable_tokens(theirs: Any) -> None:
    """Theirs lets tokens in the padding and at the edge propose boxes, at infinity; ours never does. All of them have
    the same features: let these score low, so that none is chosen."""
    features = theirs.model.enc_output_norm(theirs.model.enc_output.bias)
    theirs.class_embed[-1].weight[0].sub_(features)


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def build_small(kind: str, **options: Any) -> Any:
    torch.manual_seed(2)
    model = build_theirs(
        kind,
        resnet={"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
        num_labels=NUM_CLASSES,
        num_queries=QUERIES,
        d_model=D_MODEL,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        **options,
    ).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def theirs(kind: str) -> Any:
    model = build_small(kind)
    if kind == "two_stage":
        hide_unusable_tokens(model)
    return model


@pytest.fixture(scope="module")
def converted(theirs: Any) -> Converted:
    return convert(theirs.state_dict())


@pytest.fixture(scope="module")
def ours(converted: Converted) -> DETR:
    model = build(converted.options, *SIZES)
    model.load_state_dict(converted.state)
    return model


def their_layers(theirs: Any, reference: Any, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and boxes of all layers; of Conditional DETR, which does not hand them out, from the layers' outputs."""
    if reference.auxiliary_outputs is not None:
        layers = [*reference.auxiliary_outputs, {"logits": reference.logits, "pred_boxes": reference.pred_boxes}]
        return torch.stack([layer["logits"] for layer in layers]), torch.stack(
            [layer["pred_boxes"] for layer in layers]
        )
    x = theirs.model.decoder.layernorm(torch.stack(outputs))
    points = theirs.model.decoder.ref_point_head(theirs.model.query_position_embeddings.weight)
    offsets = theirs.bbox_predictor(x)
    boxes = torch.cat((offsets[..., :2] + points, offsets[..., 2:]), dim=-1).sigmoid()
    return theirs.class_labels_classifier(x), boxes


@torch.no_grad()
def test_outputs_and_losses(kind: str, theirs: Any, ours: DETR) -> None:
    batch = make_batch([torch.randn(3, 96, 131), torch.randn(3, 117, 89)])
    targets = random_targets([3, 2], num_classes=NUM_CLASSES)
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    outputs: list[Tensor] = []
    if kind == "conditional":
        for layer in theirs.model.decoder.layers:
            layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    reference = theirs(
        pixel_values=batch.images, pixel_mask=(~batch.mask).long(), labels=labels, output_hidden_states=True
    )
    logits, boxes = their_layers(theirs, reference, outputs)
    torch.testing.assert_close(logits[-1], reference.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(boxes[-1], reference.pred_boxes, atol=1e-6, rtol=0)
    assert logits.shape == (DECODER_LAYERS, 2, QUERIES, NUM_CLASSES) and boxes.std() > 0.05

    memory = ours.encode(batch)
    assert memory.mask is not None
    torch.testing.assert_close(
        memory.tokens[~memory.mask], reference.encoder_last_hidden_state[~memory.mask], atol=1e-5, rtol=0
    )
    predictions = ours(batch)
    torch.testing.assert_close(predictions.logits, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(predictions.boxes, boxes, atol=1e-5, rtol=0)

    # Theirs weighs the class by 1, computes no loss of proposals, and of Conditional DETR here only the last layer's.
    last = slice(-1, None) if kind == "conditional" else slice(None)
    criterion = build_criterion(
        compose(["criterion=focal", "criterion.classification.weight=1.0"]).criterion, NUM_CLASSES
    )
    losses = criterion(Predictions(logits=predictions.logits[last], boxes=predictions.boxes[last]), targets)
    for name, value in reference.loss_dict.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(losses["loss"], reference.loss, rtol=1e-5, atol=0)


@torch.no_grad()
def test_deformable_detr_on_one_map() -> None:
    theirs = build_small("deformable", num_feature_levels=1)
    single_scale = PUBLISHED["deformable_detr_r50_single_scale"].options
    ours = build(single_scale, "model/backbone=resnet18", *SIZES)
    ours.load_state_dict(convert(theirs.state_dict()).state)
    batch = make_batch([torch.randn(3, 96, 131), torch.randn(3, 117, 89)])
    reference = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    predictions = ours(batch)
    torch.testing.assert_close(predictions.logits[-1], reference.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(predictions.boxes[-1], reference.pred_boxes, atol=1e-5, rtol=0)


def test_every_tensor_is_known(kind: str, theirs: Any, converted: Converted) -> None:
    assert converted.family is FAMILIES[kind] and converted.source == "transformers"
    state = theirs.state_dict()
    assert set(converted.dropped.values()) <= {"copies of other tensors"}
    kept = sum(tensor.numel() for name, tensor in state.items() if name not in converted.dropped)
    unused = (NUM_CLASSES - 1) * (D_MODEL + 1) if kind == "two_stage" else 0  # proposals only use the first class
    assert sum(tensor.numel() for tensor in converted.state.values()) == kept - unused


def test_their_files(theirs: Any, ours: DETR, tmp_path: Path, converted: Converted) -> None:
    theirs.save_pretrained(tmp_path)
    model = build(converted.options, *SIZES)
    report = load_weights(model, tmp_path / "model.safetensors", CATEGORIES)
    assert not report.fresh and not report.skipped
    for name, tensor in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("name", "millions"),
    [("conditional", 43.4), ("dab", 43.7), ("deformable", 40.1), ("refined", 40.8), ("two_stage", 41.2)],
)
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        ours = build(FAMILIES[name].options, num_classes=91)
        theirs = build_theirs(name, resnet={}, num_labels=91, num_queries=300, d_model=256)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert round(count / 1e6, 1) == millions
    unused = 90 * 257 if name == "two_stage" else 0  # proposals only use the first class
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count + unused


# Deformable attention


def bilinear(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A sample of an image (height, width, features) at a point in pixels, whose centers are whole numbers."""
    total = image.new_zeros(image.shape[-1])
    for row, column in itertools.product((0, 1), (0, 1)):
        i, j = math.floor(y) + row, math.floor(x) + column
        if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
            total = total + (1 - (y - i).abs()) * (1 - (x - j).abs()) * image[i, j]
    return total


def attend_by_loops(attention: DeformableAttention, query: Tensor, anchors: Tensor, memory: Memory) -> Tensor:
    """The equations of the paper, and its appendix A.4 for boxes, one sample at a time."""
    heads, levels, points = attention.nhead, attention.num_levels, attention.points[0]
    outputs = []
    for b, q in itertools.product(range(query.shape[0]), range(query.shape[1])):
        value = attention.value_proj(memory.tokens[b])
        assert memory.mask is not None
        value = torch.where(memory.mask[b, :, None], torch.zeros_like(value), value)
        maps = value.unflatten(-1, (heads, -1)).split([height * width for height, width in memory.shapes])
        offsets = attention.sampling_offsets(query[b, q]).reshape(heads, levels, points, 2)
        weights = attention.attention_weights(query[b, q]).reshape(heads, -1).softmax(-1)
        weights = weights.reshape(heads, levels, points)
        head_outputs = []
        for head in range(heads):
            total = query.new_zeros(query.shape[-1] // heads)
            for level, point in itertools.product(range(levels), range(points)):
                height, width = memory.shapes[level]
                (ratio_x, ratio_y), (dx, dy) = memory.valid_ratios[b, level], offsets[head, level, point]
                x, y = anchors[b, q, 0] * ratio_x * width, anchors[b, q, 1] * ratio_y * height
                if anchors.shape[-1] == 4:
                    dx = dx / points * anchors[b, q, 2] * ratio_x * width / 2
                    dy = dy / points * anchors[b, q, 3] * ratio_y * height / 2
                image = maps[level][:, head].unflatten(0, (height, width))
                total = total + weights[head, level, point] * bilinear(image, x + dx - 0.5, y + dy - 0.5)
            head_outputs.append(total)
        outputs.append(attention.output_proj(torch.cat(head_outputs)))
    return torch.stack(outputs).unflatten(0, query.shape[:2])


@pytest.mark.parametrize("dims", [2, 4])
def test_deformable_attention_equals_loops(dims: int) -> None:
    torch.manual_seed(dims)
    shapes = ((5, 7), (3, 4))
    attention = DeformableAttention(d_model=6, nhead=2, num_levels=2, num_points=3).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 47, 6, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    anchors = torch.rand(2, 5, dims, dtype=torch.float64, requires_grad=True)
    masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in shapes]
    masks[0][1, :, 4:], masks[1][1, :, 3:] = True, True
    memory = Memory(
        tokens=tokens,
        position=torch.zeros_like(tokens),
        mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
        shapes=shapes,
        sizes=torch.tensor([(width, height) for height, width in shapes]),
        centers=torch.zeros(2, tokens.shape[1], 2, dtype=torch.float64),  # for the encoder only
        valid_ratios=torch.tensor([[[1, 1], [1, 1]], [[4 / 7, 1], [3 / 4, 1]]], dtype=torch.float64),
    )
    found = attention.attend(query, anchors, memory)
    expected = attend_by_loops(attention, query, anchors, memory)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)

    offsets = attention.sampling_offsets(query).unflatten(-1, (-1, 2)) / torch.tensor([7, 5])
    assert dims == 4 or ((anchors[:, :, None] + offsets).detach() > 1.2).any()  # samples outside of the maps
    inputs = [tokens, query, anchors, *attention.parameters()]
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


# Names of the authors


def numbered(text: str, count: int) -> list[str]:
    return [text.replace("#", str(number)) for number in range(count)]


ENCODER = numbered("transformer.encoder.layers.#.", ENCODER_LAYERS)
DECODER = numbered("transformer.decoder.layers.#.", DECODER_LAYERS)
FFN = ["linear1", "linear2", "norm1", "norm2"]
CONDITIONAL_LAYER = [
    *("sa_qcontent_proj", "sa_qpos_proj", "sa_kcontent_proj", "sa_kpos_proj", "sa_v_proj", "self_attn.out_proj"),
    *("ca_qcontent_proj", "ca_kcontent_proj", "ca_kpos_proj", "ca_v_proj", "ca_qpos_sine_proj", "cross_attn.out_proj"),
    *(*FFN, "norm3"),
]
SAMPLING = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
DEFORMABLE_ENCODER_LAYER = [*FFN, *(f"self_attn.{part}" for part in SAMPLING)]
DEFORMABLE_DECODER_LAYER = [*FFN, "norm3", "self_attn.out_proj", *(f"cross_attn.{part}" for part in SAMPLING)]


def perceptron(name: str, layers: int) -> list[str]:
    return numbered(f"{name}.layers.#", layers)


def their_names(kind: str) -> set[str]:
    """The tensors in a file of the authors, but for those of the backbone."""
    if kind in ("conditional", "dab"):
        pairs = ["input_proj", "class_embed", *perceptron("bbox_embed", 3), "transformer.decoder.norm"]
        pairs += [layer + part for layer in ENCODER for part in (*FFN, "self_attn.out_proj")]
        pairs += [layer + part for layer in DECODER for part in CONDITIONAL_LAYER]
        pairs += [DECODER[0] + "ca_qpos_proj"]
        pairs += perceptron("transformer.decoder.query_scale", 2) + perceptron("transformer.decoder.ref_point_head", 2)
        single = [layer + f"self_attn.in_proj_{part}" for layer in ENCODER for part in ("weight", "bias")]
        if kind == "conditional":
            single += ["query_embed.weight"]
        else:
            single += ["refpoint_embed.weight", *(f"{layer}activation.weight" for layer in (*ENCODER, *DECODER))]
            pairs += perceptron("transformer.encoder.query_scale", 2)
            pairs += perceptron("transformer.decoder.ref_anchor_head", 2)
            pairs += perceptron("transformer.decoder.bbox_embed", 3)
    else:
        heads = DECODER_LAYERS + (kind == "two_stage")
        boxes = [name for head in numbered("bbox_embed.#", heads) for name in perceptron(head, 3)]
        pairs = [*numbered("input_proj.#.0", 4), *numbered("input_proj.#.1", 4), *numbered("class_embed.#", heads)]
        pairs += [*boxes, *(layer + part for layer in ENCODER for part in DEFORMABLE_ENCODER_LAYER)]
        pairs += [layer + part for layer in DECODER for part in DEFORMABLE_DECODER_LAYER]
        single = ["transformer.level_embed"]
        single += [layer + f"self_attn.in_proj_{part}" for layer in DECODER for part in ("weight", "bias")]
        if kind != "deformable":
            pairs += [f"transformer.decoder.{name}" for name in boxes]
        if kind == "two_stage":
            pairs += [
                f"transformer.{name}" for name in ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
            ]
            pairs += numbered("transformer.decoder.class_embed.#", heads)
        else:
            pairs, single = [*pairs, "transformer.reference_points"], [*single, "query_embed.weight"]
    return {*(f"{name}.{part}" for name in pairs for part in ("weight", "bias")), *single}


def test_files_of_the_authors(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]
    options = f"{family.options} model/backbone=resnet18"
    trained = build(options, *SIZES)
    for tensor in (*trained.parameters(), *trained.buffers()):
        nn.init.normal_(tensor)
    file = to_published(trained.state_dict())
    assert {name for name in file if not name.startswith("backbone.0.body.")} == their_names(kind)

    path = tmp_path / "checkpoint.pth"
    torch.save({"model": file, "epoch": 49}, path)
    found = convert(file)
    assert (found.family, found.source, found.num_classes) == (family, "its authors", NUM_CLASSES)
    assert found.options == options
    model = build(found.options, *SIZES)
    report = load_weights(model, path, CATEGORIES)
    assert not report.fresh and set(report.skipped.values()) <= {"copies of other tensors"}
    assert len(report.loaded) == len(trained.state_dict())
    detector = Detector.from_checkpoint(path, model=compose([*found.options.split(), *SIZES]).model)
    assert detector.categories == CATEGORIES
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(detector.model.state_dict()[name], tensor), name


def test_norms_of_deformable_decoders_are_numbered_by_definition() -> None:
    prefix = "transformer.decoder.layers.4.norm"
    names = {1: "after cross-attention", 2: "after self-attention", 3: "after the feed-forward network"}
    state = {f"{prefix}{number}.weight": torch.tensor([float(number)]) for number in names}
    found = convert(state, families.DEFORMABLE_DETR).state
    assert [int(found[f"decoder.layers.4.norm{number}.weight"]) for number in names] == [2, 1, 3]
