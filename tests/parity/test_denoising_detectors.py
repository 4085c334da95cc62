"""DINO and DN-DETR against numbers from the published implementations: outputs, losses, gradients, names of weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr.config import build_criterion, build_model, compose
from detr.losses import SetCriterion
from detr.models.detr import DETR
from detr.postprocess import postprocess
from detr.types import ImageBatch, Matches, Predictions
from detr.weights import from_published, load_state, to_published
from detr.weights.families import DINO, DN_DETR, Family, convert
from tests.helpers import make_batch
from tests.helpers.published import as_noise, as_targets, load_fixture, weights_of

FIXTURES = {"dino/base.pt": DINO, "dn_detr/base.pt": DN_DETR}
CASES = ["train", "train_equal", "train_one_empty", "train_no_objects"]


def options_of(config: dict[str, Any], family: Family) -> list[str]:
    """The options of a published configuration, as overrides of ours."""
    options = [
        *family.options.split(),
        f"model/backbone={config['backbone']}",
        f"model.num_queries={config['num_queries']}",
        f"model.encoder.d_model={config['hidden_dim']}",
        f"model.encoder.nhead={config['nheads']}",
        f"model.encoder.num_layers={config['enc_layers']}",
        f"model.decoder.num_layers={config['dec_layers']}",
        f"model.encoder.dim_feedforward={config['dim_feedforward']}",
    ]
    if family is DN_DETR:
        return [
            *options,
            f"model.denoising.num_copies={config['scalar']}",
            f"model.denoising.label_noise={config['label_noise_scale']}",
            f"model.denoising.box_noise={config['box_noise_scale']}",
        ]
    strides = [4 * 2**stage for stage in config["return_interm_indices"]]
    return [
        *options,
        f"model.backbone.features={strides}",
        f"model.neck.num_levels={config['num_feature_levels']}",
        f"model.encoder.num_points={config['enc_n_points']}",
        f"model.decoder.num_points={config['dec_n_points']}",
        f"model.denoising.num_queries={config['dn_number']}",
        f"model.denoising.label_noise={config['dn_label_noise_ratio'] / 2}",
        f"model.denoising.box_noise={config['dn_box_noise_scale']}",
    ]


def built(shared: Path, name: str) -> tuple[dict[str, Any], DETR, SetCriterion]:
    fixture, family = load_fixture(shared, name), DINO if name.startswith("dino") else DN_DETR
    config, classes = compose(options_of(fixture["config"], family)), fixture["config"]["num_classes"]
    model = build_model(config.model, num_classes=classes, pretrained=False)
    load_state(model, from_published(weights_of(shared, name, fixture)), "fixture")
    return fixture, model, build_criterion(config.criterion, classes)


def batch_of(fixture: dict[str, Any]) -> ImageBatch:
    images = [
        image[:, :height, :width] for image, (height, width) in zip(fixture["images"], fixture["sizes"], strict=True)
    ]
    batch = make_batch(images)
    assert torch.equal(batch.images, fixture["images"]) and torch.equal(batch.mask, fixture["mask"])
    return batch


@pytest.fixture(scope="module", params=FIXTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def parts(shared: Path, name: str) -> tuple[dict[str, Any], DETR, SetCriterion]:
    return built(shared, name)


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    print(f"{what}: {(found - wanted).abs().max().item() if wanted.numel() else 0.0:.1e}")
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-5)


@torch.no_grad()
def test_evaluation(parts: tuple[dict[str, Any], DETR, SetCriterion]) -> None:
    fixture, model, _ = parts
    expected, batch = fixture["eval"], batch_of(fixture)
    model.eval()
    layers: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, tokens: layers.append(tokens)) for layer in model.encoder.layers]
    memory = model.encode(batch)
    for hook in hooks:
        hook.remove()
    close(torch.stack(layers), expected["encoder_layers"], 1e-4, "encoder")
    close(memory.tokens, expected["memory"], 1e-4, "memory")
    queries, proposals = model.queries(memory, model.proposal_head)
    if proposals is not None:
        close(proposals.logits[0], expected["proposal_logits"], 1e-4, "logits of proposals")
        close(proposals.boxes[0], expected["proposal_boxes"], 1e-5, "boxes of proposals")
    outputs, references = model.decoder(queries, memory, model._refine, look_forward_twice=True)
    close(outputs, expected["hs"], 1e-4, "decoder")
    close(torch.stack(references), expected["references"][: len(references)], 1e-5, "references")
    embedded = torch.stack([queries.position(reference) for reference in references])
    close(embedded, expected["query_pos"], 1e-4, "positions of queries")
    predictions = model(batch)
    close(predictions.logits, expected["logits"], 1e-4, "logits")
    close(predictions.boxes, expected["boxes"], 1e-5, "boxes")

    sizes = [tuple(map(int, image["original_size"])) for image in expected["detections"]]
    names = [str(label) for label in range(model.num_classes)]
    found = postprocess(predictions, sizes, names, max_dets=fixture["config"]["num_select"])
    for detections, wanted in zip(found, expected["detections"], strict=True):
        close(detections.scores, wanted["scores"], 1e-5, "scores")
        assert detections.labels.tolist() == wanted["labels"].tolist()
        close(detections.boxes, wanted["boxes"], 1e-2, "detections")


@torch.no_grad()
def test_evaluation_of_each_image_alone(parts: tuple[dict[str, Any], DETR, SetCriterion]) -> None:
    fixture, model, _ = parts
    model.eval()
    for image, (height, width), expected in zip(
        fixture["images"], fixture["sizes"], fixture["eval_alone"], strict=True
    ):
        batch = make_batch([image[:, :height, :width]])
        close(model.encode(batch).tokens, expected["memory"], 1e-4, "memory")
        predictions = model(batch)
        close(predictions.logits, expected["logits"], 1e-4, "logits")
        close(predictions.boxes, expected["boxes"], 1e-5, "boxes")


@torch.no_grad()
def test_cells_that_propose_nothing_can_be_selected(shared: Path) -> None:
    fixture, model, _ = built(shared, "dino/unusable.pt")
    expected, memory = fixture["eval"], model.eval().encode(batch_of(fixture))
    close(memory.tokens, expected["memory"], 1e-4, "memory")
    _, proposals = model.queries(memory, model.proposal_head)
    assert proposals is not None and (expected["proposal_boxes"] == 1).all(-1).any()
    close(proposals.logits[0], expected["proposal_logits"], 1e-4, "logits of proposals")
    close(proposals.boxes[0], expected["proposal_boxes"], 1e-5, "boxes of proposals")
    predictions = model.decode(memory)
    close(predictions.logits, expected["logits"], 1e-4, "logits")
    close(predictions.boxes, expected["boxes"], 1e-5, "boxes")


def trained(
    parts: tuple[dict[str, Any], DETR, SetCriterion], case: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], Predictions]:
    """What the published numbers are, and our predictions with the same noise."""
    fixture, model, _ = parts
    if case not in fixture:
        pytest.skip("the published code needs an object")
    drawn = as_noise(fixture[case]["noise"])
    monkeypatch.setattr(model.denoising, "draw", lambda labels: drawn, raising=False)
    model.train().zero_grad(set_to_none=True)
    return fixture[case], model(batch_of(fixture), as_targets(fixture[case]))


def pairs_of(matches: Matches, layer: int, counts: list[int]) -> list[set[tuple[int, int]]]:
    """Pairs of query and target of each image, as it numbers its targets."""
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    found: list[set[tuple[int, int]]] = [set() for _ in counts]
    rows = zip(matches.image.tolist(), matches.query[layer].tolist(), matches.target[layer].tolist(), strict=True)
    for image, query, target in rows:
        found[image].add((query, target - starts[image]))
    return found


def indices_of(published: list[list[Tensor]]) -> list[set[tuple[int, int]]]:
    return [set(zip(*(side.tolist() for side in image), strict=True)) for image in published]


@pytest.mark.parametrize("case", CASES)
def test_training(parts: tuple[dict[str, Any], DETR, SetCriterion], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, predictions = trained(parts, case, monkeypatch)
    _, model, criterion = parts
    targets, wanted = as_targets(expected), expected["denoising"]
    counts = [len(target) for target in targets]
    close(predictions.logits, expected["logits"], 1e-4, "logits")
    close(predictions.boxes, expected["boxes"], 1e-5, "boxes")
    assert predictions.denoising is not None and model.denoising is not None
    noisy = predictions.denoising.predictions
    if wanted["pad_size"]:
        used = (wanted["labels"] >= 0) | model.denoising.contrastive
        close(noisy.logits[:, 0], wanted["logits"][:, used], 1e-4, "logits of denoising")
        close(noisy.boxes[:, 0], wanted["boxes"][:, used], 1e-5, "boxes of denoising")
        assert predictions.denoising.copies == wanted["groups"]
    if predictions.proposals is not None:
        close(predictions.proposals.logits[0], expected["proposal_logits"], 1e-4, "logits of proposals")
        close(predictions.proposals.boxes[0], expected["proposal_boxes"], 1e-5, "boxes of proposals")
        matches = criterion.match(predictions.proposals, targets)
        assert pairs_of(matches, 0, counts) == indices_of(expected["indices"]["proposals"])
    matches = criterion.match(predictions, targets)
    for layer in range(len(predictions.logits)):
        assert pairs_of(matches, layer, counts) == indices_of(expected["indices"][f"layer{layer}"])

    losses = criterion(predictions, targets)
    losses["loss"].backward()
    found = published_losses(criterion, predictions, targets, losses)
    for key in (*expected["weights"], "class_error"):
        torch.testing.assert_close(found[key], expected["losses"][key], rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(losses["loss"].detach(), expected["total"], rtol=1e-5, atol=0)

    gradients = to_published({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    total = expected["grad_norm_total"]
    for key, norm in expected["grad_norms"].items():
        assert float(gradients[key].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6 * total), key
    everything = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(everything) == pytest.approx(total, rel=1e-3)


def published_losses(
    criterion: SetCriterion, predictions: Predictions, targets: list[Any], losses: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Ours by their names. Those of denoising and proposals, which we add up over layers, layer by layer."""
    found = {name: value.detach() for name, value in losses.items()}
    found |= {name.replace("_proposals", "_interm"): value for name, value in found.items() if "_proposals" in name}
    denoising, last = predictions.denoising, len(predictions.logits) - 1
    assert denoising is not None
    for layer in range(last + 1):
        chosen = slice(layer, layer + 1)
        matches = replace(
            denoising.matches, query=denoising.matches.query[chosen], target=denoising.matches.target[chosen]
        )
        alone = replace(denoising, predictions=denoising.predictions.layers(chosen), matches=matches)
        parts = criterion(replace(predictions, proposals=None, denoising=alone), targets)
        suffix = "" if layer == last else f"_{layer}"
        for name in ("loss_ce", "loss_bbox", "loss_giou"):
            value = parts[f"{name}_denoising"].detach()
            found[f"{name}_dn{suffix}"] = found[f"tgt_{name}{suffix}"] = value
    return found


@pytest.mark.parametrize(
    ("file", "options", "total"),
    [
        ("dino/state_dict_dino_4scale_r50.json", "model=dino", 46_893_182),
        (
            "dino/state_dict_dino_5scale_r50.json",
            "model=dino model.backbone.features=[4,8,16,32] model.neck.num_levels=5",
            47_255_806,
        ),
        ("dn_detr/state_dict_dn_detr_r50.json", "model=dn_detr", 43_694_977),
    ],
)
def test_every_published_key_converts_both_ways(shared: Path, file: str, options: str, total: int) -> None:
    published = json.loads((shared / "fixtures" / file).read_text())
    shared_by = {name: names[0] for names in published["copies"] for name in names}
    tensors: dict[str, Tensor] = {}
    for name, shape in published["keys"].items():
        tensors.setdefault(shared_by.get(name, name), torch.randn(shape))
    state = {name: tensors[shared_by.get(name, name)] for name in published["keys"]}
    found = convert(state)
    assert (
        found.options == options
        and found.num_classes == 91
        and set(found.dropped.values()) <= {"copies of other tensors"}
    )
    assert len(found.dropped) == sum(len(names) - 1 for names in published["copies"])
    with torch.device("meta"):
        model = build_model(compose(options.split()).model, num_classes=91, pretrained=False)
    assert {name: tensor.shape for name, tensor in found.state.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert sum(p.numel() for p in model.parameters()) == published["parameters"] == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published["trained"]
    back = to_published(found.state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
