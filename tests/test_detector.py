"""Detection from Python: every kind of image, batches, published weights."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr import Detector, UserError
from detr.config import build_model, compose, plain
from detr.engine import checkpoint
from detr.models.detr import DETR
from detr.types import Category
from tests.conftest import TINY_MODEL


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint as train.py writes it, of an untrained model."""
    torch.manual_seed(0)
    overrides = [*TINY_MODEL, "data.size=64", "data.max_size=96", "model.backbone.weights=IMAGENET1K_V1"]
    config = compose(overrides)
    config.model.backbone.weights = None
    model = build_model(config.model, num_classes=3)
    config.model.backbone.weights = "IMAGENET1K_V1"  # must not be downloaded for a checkpoint
    categories = [asdict(Category(id, name)) for id, name in ((4, "cat"), (9, "dog"), (40, "gnu"))]
    checkpoint.save(
        tmp_path / "best.pt",
        {"config": plain(config), "categories": categories, "model": model.state_dict(), "training": {}},
    )
    return tmp_path / "best.pt"


def test_every_kind_of_image_gives_the_same(saved: Path, tmp_path: Path) -> None:
    detector = Detector.from_checkpoint(saved)
    assert [category.id for category in detector.categories] == [4, 9, 40]
    array = np.random.default_rng(0).integers(0, 256, (75, 110, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array, tensor, tensor / 255]
    expected = detector.predict(tmp_path / "a.png", threshold=0.0)[0]
    assert len(expected) == 7 and set(expected.names) <= {"cat", "dog", "gnu"}
    assert (expected.scores.diff() <= 0).all() and expected.boxes.max() <= 110 * 1.5
    for found in detector.predict(kinds, threshold=0.0, batch_size=4):
        torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-3, rtol=1e-4)
        assert found.names == expected.names
    threshold = float(expected.scores[2])
    assert len(detector.predict(array, threshold)[0]) == 3


def test_boxes_are_in_the_pixels_of_each_image(saved: Path) -> None:
    detector = Detector.from_checkpoint(saved)
    images = [np.zeros((64, 64, 3), np.uint8), np.zeros((640, 640, 3), np.uint8)]
    small, large = (detector.predict(image, threshold=0.0)[0] for image in images)
    torch.testing.assert_close(large.boxes, small.boxes * 10, rtol=1e-4, atol=1e-2)


def test_images_of_no_known_kind_are_refused(saved: Path) -> None:
    detector = Detector.from_checkpoint(saved)
    with pytest.raises(UserError, match=r"wanted an RGB array.*got Tensor of shape \(1, 5, 5\)"):
        detector.predict(torch.zeros(1, 5, 5, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"got floats from 0 to 255"):
        detector.predict(torch.linspace(0, 255, 75).reshape(3, 5, 5))
    with pytest.raises(UserError, match=r"got torch\.int64"):
        detector.predict(torch.zeros(3, 5, 5, dtype=torch.int64))
    with pytest.raises(UserError, match="does not exist"):
        detector.predict("no/such/file.jpg")


def test_published_weights_with_a_model_configuration(tmp_path: Path, tiny_detr: Callable[..., DETR]) -> None:
    published = build_model(compose([*TINY_MODEL]).model, num_classes=91)
    torch.save({"model": checkpoint.to_published(published.state_dict())}, tmp_path / "detr.pth")
    with pytest.raises(UserError, match="name the model too, as in model=detr"):
        Detector.from_checkpoint(tmp_path / "detr.pth")
    detector = Detector.from_checkpoint(tmp_path / "detr.pth", model=compose([*TINY_MODEL]).model)
    assert (detector.size, detector.max_size, len(detector.categories)) == (800, 1333, 91)
    assert detector.categories[90] == Category(90, "toothbrush") and detector.categories[1] == Category(1, "person")
    assert torch.equal(detector.model.heads[0].class_head.weight, published.heads[0].class_head.weight)


@pytest.mark.parametrize("target", ["os.system", "torch.hub.load", "builtins.eval"])
def test_a_checkpoints_configuration_builds_only_detectors(saved: Path, target: str) -> None:
    content = torch.load(saved, weights_only=True)
    content["config"]["model"]["position"] = {"_target_": target}
    torch.save(content, saved)
    with pytest.raises(UserError, match=rf"model\.position\._target_: '{target}' is refused"):
        Detector.from_checkpoint(saved)
