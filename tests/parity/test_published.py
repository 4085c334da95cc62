"""Our DETR against numbers from the published implementation, and its state-dict names."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from detr.engine.optim import adamw
from detr.losses import HungarianMatcher, SetCriterion
from detr.models.backbones.resnet import ResNet
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.positions import LearnedPosition, SinePosition
from detr.postprocess import postprocess
from detr.types import Predictions, Target
from detr.weights import from_published, load_state, to_published
from tests.helpers import make_batch, make_target
from tests.helpers.published import rule_of

VARIANTS = ["base", "learned", "pre_norm", "dc5", "no_aux"]
LOSSES = ["loss", "loss_one_empty", "loss_all_empty", "loss_many"]


@pytest.fixture(scope="module")
def fixtures(shared: Path) -> dict[str, Any]:
    folder = shared / "fixtures" / "detr"
    base = torch.load(folder / "base.pt", weights_only=True)
    variants = torch.load(folder / "variants.pt", weights_only=True)
    return {"base": base, **variants}


@pytest.fixture(scope="module")
def recipe(shared: Path) -> ModuleType:
    """The rule that fills every tensor from its published name."""
    return rule_of(shared / "fixtures" / "detr" / "weights.py")


def build(config: dict[str, Any]) -> DETR:
    d_model = config["hidden_dim"]
    learned = config["position_embedding"] == "learned"
    options = {
        "d_model": d_model,
        "nhead": config["nheads"],
        "dim_feedforward": config["dim_feedforward"],
        "norm_first": config["pre_norm"],
    }
    position = LearnedPosition(d_model=d_model) if learned else SinePosition(d_model=d_model)
    return DETR(
        backbone=ResNet(name=config["backbone"], dilation=config["dilation"]),
        encoder=TransformerEncoder(position=position, num_layers=config["enc_layers"], **options),
        decoder=TransformerDecoder(num_layers=config["dec_layers"], **options),
        num_classes=config["num_classes"],
        num_queries=config["num_queries"],
        aux_loss=config["aux_loss"],
    ).eval()


def loaded(fixture: dict[str, Any], recipe: ModuleType) -> DETR:
    model = build(fixture["config"])
    load_state(model, from_published(recipe.full_state(fixture)), "fixture")
    return model


def published_predictions(outputs: dict[str, Any]) -> Predictions:
    layers = [*outputs.get("aux_outputs", []), outputs]
    return Predictions(
        logits=torch.stack([layer["pred_logits"] for layer in layers]),
        boxes=torch.stack([layer["pred_boxes"] for layer in layers]),
    )


def as_targets(loss: dict[str, Any]) -> list[Target]:
    return [make_target(target["labels"], target["boxes"], i) for i, target in enumerate(loss["targets"])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs(fixtures: dict[str, Any], recipe: ModuleType, variant: str) -> None:
    predictions = loaded(fixtures[variant], recipe)(make_batch(fixtures["base"]["images"]))
    expected = published_predictions(fixtures[variant]["outputs"])
    torch.testing.assert_close(predictions.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(predictions.boxes, expected.boxes, atol=1e-5, rtol=0)


def test_intermediate_values(fixtures: dict[str, Any], recipe: ModuleType) -> None:
    model, expected = loaded(fixtures["base"], recipe), fixtures["base"]["intermediates"]
    batch = make_batch(fixtures["base"]["images"])
    (features,) = model.backbone(batch.images)
    torch.testing.assert_close(batch.mask, expected["pad_mask"])
    torch.testing.assert_close(features, expected["feat"], atol=1e-4, rtol=1e-5)
    position = model.encoder.position(expected["feat_mask"])
    torch.testing.assert_close(position, expected["pos"], atol=1e-5, rtol=0)
    memory = model.encoder(model.neck([features]), [expected["feat_mask"]])
    decoded, _ = model.decoder(model.queries(memory)[0], memory)
    torch.testing.assert_close(decoded, expected["hs"], atol=1e-4, rtol=0)
    torch.testing.assert_close(memory.tokens, expected["memory"].flatten(2).transpose(1, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_matches(fixtures: dict[str, Any], case: str) -> None:
    base = fixtures["base"]
    expected, targets = base[case], as_targets(base[case])
    predictions = published_predictions(base["outputs"])
    criterion = SetCriterion(matcher=HungarianMatcher(), num_classes=base["config"]["num_classes"])
    losses = criterion(predictions, targets)
    assert set(losses) == {*expected["loss_dict"], "loss"}
    for name, value in expected["loss_dict"].items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(losses["loss"], expected["total"], rtol=1e-5, atol=0)

    matches = criterion.matcher(predictions, targets)
    starts = torch.tensor([0, *[len(target) for target in targets]]).cumsum(0)
    for layer, indices in enumerate([*expected["indices_aux"], expected["indices_last"]]):
        for image, (queries, wanted) in enumerate(indices):
            of_image = matches.image == image
            found = zip(matches.query[layer, of_image], matches.target[layer, of_image] - starts[image], strict=True)
            assert sorted((int(q), int(t)) for q, t in found) == sorted(
                zip(queries.tolist(), wanted.tolist(), strict=True)
            )


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "no_aux"])
def test_gradients_and_optimizer_step(fixtures: dict[str, Any], recipe: ModuleType, variant: str) -> None:
    fixture, expected = fixtures[variant], fixtures[variant]["loss"]
    model = loaded(fixture, recipe)
    trainable = to_published({name: torch.tensor(p.requires_grad) for name, p in model.named_parameters()})
    assert {name: bool(value) for name, value in trainable.items()} == expected["requires_grad"]

    optimizer = adamw(model, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4)
    criterion = SetCriterion(matcher=HungarianMatcher(), num_classes=fixture["config"]["num_classes"])
    predictions = model(make_batch(fixtures["base"]["images"]))
    criterion(predictions, as_targets(expected))["loss"].backward()
    gradients = to_published({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients) == set(expected["grad_norms"])
    total = expected["total_grad_norm"]
    for name, norm in expected["grad_norms"].items():
        # The decoder's first self-attention sees zeros: the gradient of its queries and keys is zero but for rounding.
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-7 * total), name
    for name, gradient in expected.get("grads_full", {}).items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-3, atol=1e-5 * max(float(gradient.abs().max()), 1)
        )

    assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)) == pytest.approx(total, rel=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    steps = to_published({name: dict(model.named_parameters())[name].detach() - old for name, old in before.items()})
    for name, norm in expected["adamw_step_delta_norm"].items():
        if name == "transformer.decoder.layers.0.self_attn.in_proj_weight" and norm < 1e-4:
            continue  # its gradient is rounding only (above), which Adam's first step blows up
        assert float(steps[name].norm()) == pytest.approx(norm, rel=1e-3), name


def test_postprocessing(fixtures: dict[str, Any]) -> None:
    expected = fixtures["base"]["postprocess"]
    predictions = published_predictions(fixtures["base"]["outputs"])
    sizes = [(int(h), int(w)) for h, w in expected["orig_sizes"]]
    for found, wanted in zip(
        postprocess(predictions, sizes, [str(i) for i in range(8)]), expected["results"], strict=True
    ):
        scores, order = wanted["scores"].sort(descending=True, stable=True)
        torch.testing.assert_close(found.scores, scores, atol=1e-6, rtol=0)
        assert found.labels.tolist() == wanted["labels"][order].tolist()
        torch.testing.assert_close(found.boxes, wanted["boxes"][order], atol=1e-3, rtol=1e-5)


def test_positions(shared: Path) -> None:
    expected = torch.load(shared / "fixtures" / "detr" / "position.pt", weights_only=True)
    mask = expected["mask"]
    for features, normalize in ((32, True), (128, True), (32, False)):
        position = SinePosition(d_model=2 * features, normalize=normalize)
        wanted = expected[f"sine_{features}_norm{normalize}"]
        torch.testing.assert_close(position(mask), wanted, atol=2e-6, rtol=1e-6)
    learned = LearnedPosition(d_model=64)
    learned.load_state_dict(expected["learned_32_state"])
    torch.testing.assert_close(learned(mask), expected["learned_32"])


@pytest.mark.parametrize(
    ("name", "dilation", "parameters", "trainable", "keys"),
    [
        ("resnet50", False, 41_524_768, 41_302_368, 458),
        ("resnet50", True, 41_524_768, 41_302_368, 458),
        ("resnet101", False, 60_464_672, 60_242_272, 713),
    ],
)
def test_parameter_counts(name: str, dilation: bool, parameters: int, trainable: int, keys: int) -> None:
    with torch.device("meta"):
        model = DETR(
            backbone=ResNet(name=name, dilation=dilation),
            encoder=TransformerEncoder(position=SinePosition(d_model=256)),
            decoder=TransformerDecoder(),
            num_classes=91,
        )
    # The published count takes the affine parameters of frozen batch norms for buffers, as we do.
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert len(model.state_dict()) == keys


def test_every_published_key_converts_both_ways(shared: Path) -> None:
    keys = json.loads((shared / "fixtures" / "detr" / "state_dict_detr_resnet50.json").read_text())
    published = {name: torch.empty(shape, device="meta") for name, shape in keys}
    with torch.device("meta"):
        encoder = TransformerEncoder(position=SinePosition(d_model=256))
        model = DETR(backbone=ResNet(), encoder=encoder, decoder=TransformerDecoder(), num_classes=91)
    ours = from_published(published)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in model.state_dict().items()}
    assert list(to_published(ours)) == list(published)
