"""Checkpoints of version 1 give the numbers that the code of then gave.

version1/*.json hold what the last commit of version 1 made: configuration, names and shapes of the tensors, and the
last layer's logits and boxes, where each tensor is filled by its name (`filled`).
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr import Detector
from detr.config import build_model
from detr.errors import UserError
from detr.types import Category, ImageBatch
from detr.weights import load_weights, read_checkpoint
from detr.weights.version1 import upgraded_model
from tests.helpers import make_batch

RECORDED = sorted(Path(__file__).with_name("version1").glob("*.json"))
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 7, "name": "gnu"}]


def filled(name: str, shape: list[int]) -> Tensor:
    """Weights of norms and variances near 1, as a trained model has them."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    spread = torch.rand(shape, generator=generator) * 0.4 - 0.2
    return 1 + spread if name.endswith((".weight", "running_var")) else spread


def batch() -> ImageBatch:
    generator = torch.Generator().manual_seed(5)
    return make_batch([torch.randn(3, *size, generator=generator) for size in ((96, 131), (117, 89))])


@pytest.fixture(params=RECORDED, ids=lambda path: path.stem)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


@pytest.fixture
def saved(recorded: dict[str, Any], tmp_path: Path) -> Path:
    """The recorded model as a file of then."""
    content = {
        "format": "detr-checkpoint-1",
        "model": {name: filled(name, shape) for name, shape in recorded["tensors"].items()},
        "config": {"model": recorded["config"], "data": {"size": 96, "max_size": 128}},
        "categories": CATEGORIES,
        "training": {"step": 7},
    }
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_training_state_is_left_out(saved: Path, recorded: dict[str, Any]) -> None:
    checkpoint = read_checkpoint(saved)
    assert checkpoint.training is None
    assert checkpoint.categories == [Category(**row) for row in CATEGORIES]
    assert len(checkpoint.state) == len(recorded["tensors"])
    assert not any(name.startswith(("transformer.", "position.")) for name in checkpoint.state)


@torch.inference_mode()
def test_numbers_are_those_of_version_1(saved: Path, recorded: dict[str, Any]) -> None:
    checkpoint = read_checkpoint(saved)
    model = build_model(checkpoint.config["model"], num_classes=3, pretrained=False).eval()
    report = load_weights(model, saved, checkpoint.categories)
    assert len(report.loaded) == len(recorded["tensors"]) and not report.fresh and not report.skipped
    for built in (model, Detector.from_checkpoint(saved).model):
        predictions = built(batch())
        torch.testing.assert_close(predictions.logits[-1], torch.tensor(recorded["logits"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(predictions.boxes[-1], torch.tensor(recorded["boxes"]), atol=1e-5, rtol=0)


def test_models_that_cannot_be_built_any_more_are_refused() -> None:
    model = json.loads(RECORDED[0].read_text())["config"]
    options = {"encoder_attention": "standard", "cross_attention": "deformable", "num_levels": 1}
    with pytest.raises(UserError, match=r"last\.pt is of version 1 with a standard encoder and a deformable decoder"):
        upgraded_model({**model, "transformer": {**model["transformer"], **options}}, "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is of version 1 with a transformer of your own"):
        upgraded_model({**model, "transformer": {"_target_": "mine.Transformer"}}, "last.pt")


def test_options_that_a_configuration_lacks_are_those_of_then() -> None:
    model = upgraded_model(
        {"transformer": {"modulate": True, "cross_attention": "conditional"}, "position": {}}, "last.pt"
    )
    assert model["encoder"]["scale_positions"] and model["decoder"]["modulate_sizes"]
    assert (model["encoder"]["num_layers"], model["encoder"]["dim_feedforward"]) == (6, 2048)
    assert (model["decoder"]["num_layers"], model["decoder"]["final_norm"]) == (6, True)
