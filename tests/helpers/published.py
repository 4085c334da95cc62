"""Fixtures of numbers from published implementations: their weights, targets and draws."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.losses import Matched
from detr.models.denoising import Noise
from detr.models.detr import DETR
from detr.types import Category, ImageBatch, Predictions, Target
from detr.weights import load_weights
from tests.helpers import make_target


def load_fixture(shared: Path, name: str) -> dict[str, Any]:
    """name: below fixtures, such as dino/base.pt."""
    return torch.load(shared / "fixtures" / name, weights_only=True)


def fixture_or_skip(shared: Path, name: str) -> dict[str, Any]:
    """As `load_fixture`; skips the test where the file is kept elsewhere."""
    if not (shared / "fixtures" / name).exists():
        pytest.skip(f"{name} is kept elsewhere")
    return load_fixture(shared, name)


def rule_of(path: Path) -> ModuleType:
    """The module that fills tensors from their published names."""
    spec = importlib.util.spec_from_file_location(f"weights_of_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    return rule


def weights_of(shared: Path, name: str, fixture: dict[str, Any]) -> dict[str, Tensor]:
    """The weights under their published names, which the rule beside the fixture makes of these names."""
    rule = rule_of((shared / "fixtures" / name).with_name("weights.py"))
    constants = (fixture["constants"],) if "constants" in fixture else ()
    return rule.state(fixture["state_keys"], fixture["salt"], *constants)


def as_targets(case: dict[str, Any]) -> list[Target]:
    return [make_target(target["labels"], target["boxes"], i) for i, target in enumerate(case["targets"])]


def as_noise(drawn: dict[str, Tensor]) -> Noise:
    """Published draws; without signs those are drawn between -1 and 1 in one."""
    part, sign = drawn["part"], drawn.get("sign")
    if sign is None:
        part = 2 * part - 1
        part, sign = part.abs(), part.sign()
    return Noise(redraw=drawn["p"], label=drawn["label"], part=part, sign=sign)


def batch_of(images: Tensor) -> ImageBatch:
    """Images without padding."""
    return ImageBatch(images=images, mask=torch.zeros_like(images[:, 0], dtype=torch.bool))


def train(model: DETR, images: Tensor, case: dict[str, Any]) -> Predictions:
    """What the model predicts in training, with denoising queries disturbed by the published draws."""
    assert model.denoising is not None
    drawn = as_noise(case["noise"])
    model.denoising.draw = lambda labels: drawn  # type: ignore[method-assign]
    return model.train()(batch_of(images), as_targets(case))


def pairs_of(matched: Matched, layer: int) -> set[tuple[int, int, int]]:
    """Image, query and target in the image."""
    matches = matched.matches
    start = torch.tensor([0, *[len(target) for target in matched.targets]]).cumsum(0)
    target = matches.target[layer] - start[matches.image]
    return set(zip(matches.image.tolist(), matches.query[layer].tolist(), target.tolist(), strict=True))


def published_pairs(indices: Any) -> set[tuple[int, int, int]]:
    """The same, of what was published for each image: indices of queries and of targets."""
    return {
        (image, query, target)
        for image, (queries, targets) in enumerate(indices)
        for query, target in zip(queries.tolist(), targets.tolist(), strict=True)
    }


def close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")


def takes_averaged_weights(
    fresh: nn.Module, path: Path, state: dict[str, Tensor], model: nn.Module, num_classes: int
) -> None:
    """Of a file that holds others beside them, a fresh model takes the averaged weights, which `model` has.

    path: of the file, which is written. state: the averaged weights under published names.
    """
    others = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": others, "ema": {"module": state, "updates": 7}, "last_epoch": 3}, path)
    report = load_weights(fresh, path, [Category(id=number, name=str(number)) for number in range(num_classes)])
    assert not (report.fresh or report.mapped) and "no place in the model" not in report.skipped.values()
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
