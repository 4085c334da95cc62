"""DEIM's criterion and training against numbers from the published implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr.config import build_criterion, compose
from detr.losses import SetCriterion
from detr.types import DenoisingPredictions, Matches, Predictions
from tests.helpers.d_fine import TRAININGS, build, check_training, losses_of
from tests.helpers.published import as_targets, fixture_or_skip, pairs_of, published_pairs, weights_of

FILES = ("base", "holdout")
OPTIONS: dict[str, list[str]] = {
    "deim": [],
    "deim_alpha": ["criterion.classification.alpha=0.5"],
    "no_union": ["criterion.union=false"],
    "deimv2_tiny": ["criterion.union=false", "criterion.terms.fgl=null", "criterion.terms.ddf=null"],
    "vfl": ["criterion=fine"],
    "gamma2": ["criterion.classification.gamma=2.0"],
}


@pytest.fixture(scope="module", params=FILES)
def published(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    return fixture_or_skip(shared, f"deim/{request.param}.pt")


@pytest.fixture(scope="module", params=FILES)
def published_model(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    return fixture_or_skip(shared, f"deim/{request.param}_model.pt")


def criterion_of(published: dict[str, Any], option: str) -> SetCriterion:
    scale = f"model.decoder.reg_scale={published['reg_scale'].item()}"
    config = compose(["model=deim_s", scale, f"model.decoder.up={published['up'].item()}", *OPTIONS[option]])
    return build_criterion(config.criterion, published["num_classes"])


def predictions_of(published: dict[str, Any], case: dict[str, Any]) -> tuple[Predictions, dict[str, Tensor]]:
    """What the published criterion was given, and its tensors by their published names, which have gradients."""
    given = published["cases"]["train"]["predictions"]
    given = {name: value for name, value in given.items() if case["groups"] or not name.startswith(("dn_", "positive"))}
    given |= case.get("predictions_changed", {})
    positive = given.pop("positive", None)
    given = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}

    def part(prefix: str) -> dict[str, Tensor]:
        tensors = {name: given[prefix + name] for name in ("logits", "boxes")}
        if prefix + "pred_corners" in given:
            tensors["distributions"] = given[prefix + "pred_corners"].unflatten(-1, (4, -1))
        return tensors

    def layer(prefix: str) -> Predictions:
        return Predictions.stack([part(prefix)])

    denoising = None
    if positive is not None:
        in_a_row = Predictions(**part("dn_"), preliminary=layer("dn_pre_")).map(lambda x: x.flatten(1, 2)[:, None])
        layers, _, places, _ = given["dn_logits"].shape
        counts = [len(target["labels"]) for target in case["targets"]]
        query = torch.cat([torch.tensor(of_image) + i * places for i, of_image in enumerate(positive)])
        target = torch.cat([one.repeat(case["groups"]) for one in torch.arange(sum(counts)).split(counts)])
        matches = Matches(
            image=torch.zeros_like(query), query=query.expand(layers, -1), target=target.expand(layers, -1)
        )
        denoising = DenoisingPredictions(predictions=in_a_row, matches=matches, copies=case["groups"])
    main = part("")
    if "times 20" in case["note"]:
        main["logits"] = main["logits"] * 20
    predictions = Predictions(**main, preliminary=layer("pre_"), proposals=layer("proposal_"), denoising=denoising)
    return predictions, given


CASES = (
    "train", "one_empty", "all_empty", "more_targets_than_queries", "exact", "no_overlap", "saturated", "duplicates",
)  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_criterion(published: dict[str, Any], name: str, option: str) -> None:
    case = published["cases"][name]
    if option not in case["results"]:
        pytest.skip("not published")
    expected = case["results"][option]
    criterion, targets = criterion_of(published, option), as_targets(case)
    predictions, given = predictions_of(published, case)
    found, parts = losses_of(criterion, predictions, targets)
    # Without the union, theirs has the distances of the last layer's pairs for those of all layers.
    mixed = option == "no_union" and any(len(target) for target in targets)
    for loss, wanted in expected["losses"].items():
        if mixed and loss.startswith("loss_fgl_aux"):
            continue
        value = found[loss.replace("_mal", "_vfl")]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, loss=loss: f"{loss}: {text}")
    if name not in ("duplicates", "no_overlap"):  # of equal costs any may be matched
        for output, (part, layer) in parts.items():
            assert pairs_of(part, layer) == published_pairs(expected["indices"][output]), output
        if criterion.union:
            union = parts["pre"][0].union
            assert union is not None and pairs_of(union, 0) == published_pairs(expected["indices_union"])

    if mixed:
        return
    total = criterion(predictions, targets)["loss"]
    torch.testing.assert_close(total, expected["total"], rtol=4e-6, atol=1e-6)
    total.backward()
    for tensor, norm in expected["grad_norms"].items():
        gradient = given[tensor].grad
        assert gradient is not None
        if "times 20" in case["note"] and tensor == "logits":
            gradient = gradient / 20  # theirs is that of the saturated logits
        assert abs(gradient.norm().item() - norm) <= 1e-4 * (norm + 1e-3), tensor
    if "grad_logits" in expected and "times 20" not in case["note"]:
        torch.testing.assert_close(given["logits"].grad, expected["grad_logits"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", TRAININGS)
def test_training(published_model: dict[str, Any], shared: Path, case: str) -> None:
    state = weights_of(shared, "deim/base.pt", published_model)
    if case not in published_model:
        pytest.skip("not published")
    model = build(published_model["config"], state, "deim")
    check_training(model, "deim_s", published_model["images"], published_model[case])
