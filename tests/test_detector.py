"""Detection from Python: every kind of image, batches, published weights."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr import Detector, UserError
from detr import boxes as box_ops
from detr.config import build_model, compose, plain
from detr.images import pad_to_batch
from detr.models.detr import DETR
from detr.reporting.attention import overlay
from detr.types import Category, ImageBatch, Predictions
from detr.weights import save, to_published
from tests.helpers.commands import TINY_MODEL

CATEGORIES = [Category(id, name) for id, name in ((4, "cat"), (9, "dog"), (40, "gnu"))]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint as train.py writes it, of an untrained model."""
    torch.manual_seed(0)
    overrides = [*TINY_MODEL, "data.size=64", "data.max_size=96", "model.backbone.weights=IMAGENET1K_V1"]
    config = compose(overrides)
    config.model.backbone.weights = None
    model = build_model(config.model, num_classes=3)
    config.model.backbone.weights = "IMAGENET1K_V1"  # must not be downloaded for a checkpoint
    categories = [asdict(category) for category in CATEGORIES]
    save(
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


BLOCKS = "se,non_local,criss_cross,dual,residual,spatial_transformer,hard,self_attention"


@pytest.mark.parametrize("kind", ["small", "detr", "conditional_detr", "dab_detr", "deformable_detr"])
def test_attention_of_every_kind_of_model(kind: str) -> None:
    torch.manual_seed(0)
    options = [option for option in TINY_MODEL if kind != "small" or not option.startswith("model/backbone")]
    config = compose([f"model={kind}", *options, f"model/attention=[{BLOCKS}]"])
    detector = Detector(model=build_model(config.model, 3), categories=CATEGORIES, size=64, max_size=96)
    image = np.random.default_rng(0).integers(0, 256, (75, 110, 3), dtype=np.uint8)
    expected = detector.predict(image, threshold=0.0)[0]
    threshold = float(expected.scores[3])
    maps = detector.attention(image, (0.9, 0.2), threshold)
    assert torch.equal(maps.detections.boxes, expected.boxes[:4]) and maps.detections.names == expected.names[:4]
    deformable = kind in ("small", "deformable_detr")
    cells = (8, 12) if deformable else (2, 3)  # stride 8 or 32
    assert maps.decoder.shape == (4, *cells) and maps.encoder.shape == cells
    for weights in (*maps.decoder, maps.encoder):
        total = float(weights.sum())
        assert (weights >= 0).all() and total > 0.2
        assert total < 1.05 if deformable else total == pytest.approx(1, abs=1e-4)
    shown = {name.rpartition(".")[2] for name in maps.blocks}
    assert shown == set(BLOCKS.split(","))
    assert torch.equal(detector.predict(image, threshold=0.0)[0].boxes, expected.boxes)


def test_detections_name_their_queries(saved: Path) -> None:
    detector = Detector.from_checkpoint(saved)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    found = detector.predict(image, threshold=0.0)[0]
    with torch.inference_mode():
        boxes = detector.model(pad_to_batch([image])).boxes[-1, 0]
    assert sorted(found.queries.tolist()) == list(range(7))
    torch.testing.assert_close(found.boxes, box_ops.cxcywh_to_xyxy(boxes[found.queries]) * 64)
    best = found.above(float(found.scores[2]))
    assert torch.equal(best.queries, found.queries[:3]) and torch.equal(best.boxes, found.boxes[:3])


@pytest.mark.parametrize("cell", [(0, 5), (1, 2), (3, 0)])
def test_attention_that_is_forced_to_a_cell_is_drawn_there(
    tiny_detr: Callable[..., DETR], cell: tuple[int, int]
) -> None:
    """Queries all alike, made to fit one cell's key and no other's: the heat's maximum lies in that cell."""
    model = tiny_detr(num_classes=3).eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    detector = Detector(model=model, categories=CATEGORIES, size=64, max_size=96)
    attention = model.decoder.layers[-1].cross_attn
    attention.nhead = 1
    with torch.no_grad():
        key = model.encode(pad_to_batch([image])).key[0]
        wanted = torch.zeros(len(key))
        wanted[cell[0] * 6 + cell[1]] = 100.0
        attention.in_proj.weight[:32] = 0.0
        attention.in_proj.weight[32:64] = torch.eye(32)
        attention.in_proj.bias[:32] = torch.linalg.lstsq(key, wanted[:, None]).solution[:, 0]
    maps = detector.attention(image, threshold=0.0)
    assert len(maps.decoder) > 0
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for weights in maps.decoder:
        assert weights[cell] > 0.99
        drawn = np.asarray(overlay(picture, weights)).astype(int)
        row, column = np.unravel_index((drawn[..., 0] - drawn[..., 2]).argmax(), drawn.shape[:2])
        assert (row // 16, column // 16) == cell


def test_points_and_models_that_attention_cannot_be_shown_of(saved: Path) -> None:
    detector, image = Detector.from_checkpoint(saved), torch.zeros(3, 64, 64, dtype=torch.uint8)
    for point in ((0.5, 1.5), (-0.1, 0.0), (0.5,), (0.1, 0.2, 0.3), (float("nan"), 0.5)):
        with pytest.raises(UserError, match=r"wanted point as x and y in \[0, 1\].*Correct attention_point"):
            detector.attention(image, point)
    with pytest.raises(UserError, match="wanted a model of class DETR, got Identity"):
        Detector(model=torch.nn.Identity(), categories=CATEGORIES, size=64, max_size=96).attention(image)


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
    torch.save({"model": to_published(published.state_dict())}, tmp_path / "detr.pth")
    with pytest.raises(UserError, match="name the model too, as in model=detr"):
        Detector.from_checkpoint(tmp_path / "detr.pth")
    detector = Detector.from_checkpoint(tmp_path / "detr.pth", model=compose([*TINY_MODEL]).model)
    assert (detector.size, detector.max_size, len(detector.categories)) == (800, 1333, 91)
    assert detector.categories[90] == Category(90, "toothbrush") and detector.categories[1] == Category(1, "person")
    assert torch.equal(detector.model.heads[0].class_head.weight, published.heads[0].class_head.weight)


@pytest.mark.parametrize("target", ["os.system", "torch.hub.load", "builtins.eval"])
def test_a_checkpoints_configuration_builds_only_detectors(saved: Path, target: str) -> None:
    content = torch.load(saved, weights_only=True)
    content["config"]["model"]["encoder"]["position"] = {"_target_": target}
    torch.save(content, saved)
    with pytest.raises(UserError, match=rf"model\.encoder\.position\._target_: '{target}' is refused"):
        Detector.from_checkpoint(saved)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_image_is_turned_whether_it_comes_as_a_file_or_not(
    saved: Path, tmp_path: Path, orientation: int
) -> None:
    detector = Detector.from_checkpoint(saved)
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.random.default_rng(0).integers(0, 256, (75, 110, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    for image in (Image.open(tmp_path / "a.png"), Image.open(tmp_path / "a.png").convert("RGB")):
        by_path, given = detector.predict([tmp_path / "a.png", image], threshold=0.0)
        torch.testing.assert_close(given.boxes, by_path.boxes)
        sideways = orientation >= 5
        assert given.draw(image).size == by_path.draw(tmp_path / "a.png").size == ((75, 110) if sideways else (110, 75))


def test_detections_are_read_like_a_list(saved: Path, tmp_path: Path) -> None:
    detector = Detector.from_checkpoint(saved)
    assert repr(detector) == (
        "Detector(DETR, 3 classes: cat, dog, gnu, short side 64 and long side at most 96 pixels, on cpu)"
    )
    found = detector.predict(np.zeros((75, 110, 3), np.uint8), threshold=0.0)[0]
    assert len(found) == len(list(found)) == 7
    for index, one in enumerate(found):
        assert one == found[index] == found[index - 7]
        assert (one.name, one.label) == (found.names[index], int(found.labels[index]))
        assert one.score == float(found.scores[index]) and list(one.box) == found.boxes[index].tolist()
    some = found[2:6:3]
    assert len(some) == 2 and some[1] == found[5] and torch.equal(some.queries, found.queries[[2, 5]])
    assert repr(found).startswith(f"Detections(7: {found[0].name} {found[0].score:.2f} at (") and ", 2 more)" in repr(
        found
    )
    assert repr(found[:0]) == "Detections(0)" and not found[:0]
    with pytest.raises(IndexError):
        found[7]
    found.save(tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [tuple(row["box"]) for row in rows] == [one.box for one in found] and rows[0]["name"] == found[0].name
    with pytest.raises(UserError, match=r"ends in \.json, got found\.jpg\. A picture is saved with found\.draw"):
        found.save("found.jpg")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", torch.device("cuda", 99)])
def test_a_device_that_is_not_there_is_refused(saved: Path, device: str | torch.device) -> None:
    with pytest.raises(UserError, match=r"device (cuda:99|gpu) cannot be used here: .*Give device=\"cpu\""):
        Detector.from_checkpoint(saved, device)


@pytest.mark.parametrize("threshold", [2.0, -1.0, float("nan")])
def test_a_threshold_outside_of_scores_is_refused(saved: Path, threshold: float) -> None:
    with pytest.raises(UserError, match='wanted a threshold of at least 0 and at most 1, or "best", got'):
        Detector.from_checkpoint(saved).predict(np.zeros((9, 9, 3), np.uint8), threshold)
    assert len(Detector.from_checkpoint(saved).predict(np.zeros((9, 9, 3), np.uint8), 0.0, max_dets=3)[0]) == 3


def test_the_limit_of_the_long_side_follows_the_size() -> None:
    detector = Detector(model=torch.nn.Identity(), categories=CATEGORIES, size=64, max_size=96)
    detector.resize_to()
    assert (detector.size, detector.max_size) == (64, 96)
    detector.resize_to(32)
    assert (detector.size, detector.max_size) == (32, 48)
    detector.resize_to(40, 200)
    assert (detector.size, detector.max_size) == (40, 200)
    detector.resize_to(max_size=50)
    assert (detector.size, detector.max_size) == (40, 50)


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0, 3)), torch.zeros(3, 0, 0), Image.new("RGB", (0, 5))],
    ids=["array", "floats", "tensor", "pillow"],
)
def test_images_without_pixels_are_refused(saved: Path, image: Image.Image | np.ndarray | torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"wanted an RGB array .* got .* of shape \(.*0"):
        Detector.from_checkpoint(saved).predict(image)


@pytest.mark.parametrize("option", ["batch_size", "max_dets"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_1_are_refused(saved: Path, option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"wanted {option} of at least 1, got {value}"):
        Detector.from_checkpoint(saved).predict(Image.new("RGB", (9, 9)), **{option: value})


def test_images_may_come_from_a_generator(saved: Path) -> None:
    assert len(Detector.from_checkpoint(saved).predict(Image.new("RGB", (9, 9)) for _ in range(5))) == 5


class Watched(torch.nn.Module):
    """A model that only notes the size of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, batch: ImageBatch) -> Predictions:
        self.sizes.append(tuple(batch.images.shape[2:]))
        assert not batch.padded
        return Predictions(logits=torch.zeros(1, len(batch), 3, 3), boxes=torch.full((1, len(batch), 3, 4), 0.5))


def test_squares_are_for_prediction_too_and_boxes_are_in_pixels_of_the_image() -> None:
    model = Watched()
    detector = Detector(model=model, categories=CATEGORIES, size=64, max_size=96, square=True)
    assert "64 x 64 pixels" in repr(detector)
    found = detector.predict([torch.zeros(3, 101, 67, dtype=torch.uint8), torch.zeros(3, 20, 200)], threshold=0.0)
    assert model.sizes == [(64, 64)]
    assert found[0].boxes[0].tolist() == [16.75, 25.25, 50.25, 75.75]
    detector.resize_to(48, square=None)
    assert (detector.square, detector.size) == (True, 48)
    detector.resize_to(square=False)
    detector.predict(torch.zeros(3, 100, 50, dtype=torch.uint8))
    assert model.sizes[-1] == (72, 36)


@pytest.mark.parametrize(("stored", "square"), [({}, False), ({"square": False}, False), ({"square": True}, True)])
def test_a_checkpoint_says_whether_images_are_squares(tmp_path: Path, stored: dict[str, bool], square: bool) -> None:
    config = compose([*TINY_MODEL, "data.size=64", "data.max_size=96"])
    content = {
        "config": {"model": plain(config.model), "data": {"size": 64, "max_size": 96, **stored}},
        "categories": [{"id": 1, "name": "a"}],
        "model": build_model(config.model, num_classes=1).state_dict(),
        "training": {},
    }
    save(tmp_path / "best.pt", content)
    assert Detector.from_checkpoint(tmp_path / "best.pt").square == square
    content["config"]["data"]["square"] = 3
    save(tmp_path / "best.pt", content)
    with pytest.raises(UserError, match="data options holds 3 as square"):
        Detector.from_checkpoint(tmp_path / "best.pt")
