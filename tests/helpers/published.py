"""Fixtures of numbers from published implementations: their weights, targets and draws."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr.models.denoising import Noise
from detr.types import Target
from tests.helpers import make_target


def load_fixture(shared: Path, name: str) -> dict[str, Any]:
    """name: below fixtures, such as dino/base.pt."""
    return torch.load(shared / "fixtures" / name, weights_only=True)


def weights_of(shared: Path, name: str, fixture: dict[str, Any]) -> dict[str, Tensor]:
    """The weights under their published names, which the rule beside the fixture makes of these names."""
    path = (shared / "fixtures" / name).with_name("weights.py")
    spec = importlib.util.spec_from_file_location(f"weights_of_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
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
