"""Augmentation: boxes stay on their objects; sizes follow the recipe; resizing looks like Pillow's."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import transforms
from detr.boxes import cxcywh_to_xyxy
from detr.config import build, compose, plain
from detr.errors import UserError
from tests.helpers.boxes import extents, painted
from tests.helpers.data import coco_set, shapes_set


@pytest.mark.parametrize("seed", range(25))
def test_boxes_follow_the_image(seed: int) -> None:
    torch.manual_seed(seed)
    recipe = transforms.train(
        sizes=[60, 70, 80], max_size=133, crop_from=[90, 100], crop_min=50, crop_max=80, vertical_flip=0.5
    )
    assert_on_its_object(recipe, 77, 131, (30, 20, 70, 50), atol=1.5)


def assert_on_its_object(recipe: Any, height: int, width: int, box: tuple[int, int, int, int], atol: float) -> bool:
    """Whether there was a box left to compare."""
    image, objects = recipe(*painted(height, width, [box]))
    found, left = extents(image), objects["boxes"][0].as_subclass(torch.Tensor)
    if not (left[2:] > left[:2]).all():
        return False
    assert found is not None
    torch.testing.assert_close(found, left, atol=atol, rtol=0)
    return True


def test_short_sides_are_drawn_from_the_list() -> None:
    recipe = transforms.train(sizes=[40, 48, 56], max_size=1000, crop=False)
    sizes = {min(recipe(*painted(64, 96, [(1, 1, 20, 20)]))[0].shape[1:]) for _ in range(60)}
    assert sizes == {40, 48, 56}


def test_without_crops_the_recipe_flips_and_resizes_as_in_evaluation() -> None:
    flips = transforms.train(sizes=[77], max_size=131, crop=False, horizontal_flip=1.0, vertical_flip=1.0)
    image, objects = flips(*painted(77, 131, [(30, 20, 70, 50)]))
    torch.testing.assert_close(objects["boxes"].as_subclass(torch.Tensor), torch.tensor([[61.0, 27.0, 101.0, 57.0]]))
    assert tuple(image.shape) == (3, 77, 131)
    unflipped = transforms.train(sizes=[50], max_size=60, crop=False, horizontal_flip=0.0)
    evaluated = transforms.evaluation(size=50, max_size=60)(*painted(77, 131, [(30, 20, 70, 50)]))
    assert torch.equal(unflipped(*painted(77, 131, [(30, 20, 70, 50)]))[0], evaluated[0])


def test_crop_windows_are_within_their_limits() -> None:
    crop = transforms.RandomSizeCrop(20, 50)
    extents = {tuple(crop(*painted(64, 33, [(1, 1, 20, 20)]))[0].shape[1:]) for _ in range(200)}
    heights, widths = {h for h, _ in extents}, {w for _, w in extents}
    assert min(heights) == 20 and max(heights) == 50 and min(widths) == 20 and max(widths) == 33
    assert transforms.RandomSizeCrop(20, 50)(*painted(11, 13, [(1, 1, 9, 9)]))[0].shape[1:] == (11, 13)


def test_evaluation_is_within_a_gray_level_of_pillow(shared: Path) -> None:
    folder = shared / "data" / "coco_sample"
    dataset = coco_set(
        folder / "images" / "val",
        folder / "instances_val.json",
        transforms.evaluation(size=800, max_size=1333),
    )
    for index in range(0, len(dataset), 5):
        image, _ = dataset[index]
        file = Image.open(dataset.folder / dataset.records[index].file_name).convert("RGB")
        expected = np.asarray(file.resize((image.shape[2], image.shape[1]), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() <= 1


def test_objects_cut_away_by_a_crop_are_dropped(shapes_root: Path) -> None:
    recipe = transforms.train(sizes=[48], max_size=96, crop_from=[96], crop_min=24, crop_max=30)
    dataset = shapes_set(shapes_root, "train", recipe)
    plain = shapes_set(shapes_root)
    counts = [(len(dataset[(epoch, i)][1]), len(plain[i][1])) for i in range(24) for epoch in range(3)]
    assert all(cut <= whole for cut, whole in counts) and any(cut < whole for cut, whole in counts)
    for i in range(24):
        boxes = cxcywh_to_xyxy(dataset[i][1].boxes)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= -1e-6).all() and (boxes <= 1 + 1e-6).all()


SSD: dict[str, Any] = {
    "zoom-out": {"zoom_out": 1.0},
    "crop": {"iou_crop": 1.0},
    "both, flipped": {"zoom_out": 1.0, "iou_crop": 1.0, "horizontal_flip": 1.0, "vertical_flip": 1.0},
    "everything, square": {"zoom_out": 0.5, "iou_crop": 0.8, "photometric_distortion": 0.5, "square": True},
    "DETR's crop, square": {"crop": True, "crop_from": [60], "crop_min": 40, "crop_max": 60, "square": True},
}


@pytest.mark.parametrize("name", SSD)
def test_boxes_follow_the_image_through_strong_augmentation(name: str) -> None:
    recipe = transforms.train(**{"sizes": [83, 97], "max_size": 173, "crop": False, **SSD[name]})
    compared = 0
    for seed in range(30):
        torch.manual_seed(seed)
        compared += assert_on_its_object(recipe, 101, 149, (50, 40, 90, 71), atol=2)
    assert compared >= 15


@pytest.mark.parametrize("size", [(101, 149), (1, 97), (97, 1), (3, 2), (1, 1), (2000, 3)])
@pytest.mark.parametrize("square", [False, True])
def test_strong_augmentation_of_any_image_has_sound_boxes(size: tuple[int, int], square: bool) -> None:
    strong = transforms.train(
        sizes=[40], max_size=64, square=square, zoom_out=0.5, iou_crop=0.8, photometric_distortion=0.5, crop=False
    )
    height, width = size
    for seed in range(20):
        torch.manual_seed(seed)
        for boxes in ([], [(0, 0, width, height), (width // 2, height // 3, width, height)]):
            image, objects = strong(*painted(height, width, boxes))
            corners = objects["boxes"].as_subclass(torch.Tensor)
            assert len(objects["labels"]) == len(corners) == len(boxes)
            assert (corners >= 0).all() and (corners <= torch.tensor(image.shape[:0:-1]).repeat(2) + 1e-3).all()
            assert not square or image.shape == (3, 40, 40)


def test_squares_are_stretched_in_training_and_evaluation() -> None:
    for recipe in (
        transforms.train(sizes=[50], max_size=60, square=True, crop=False, horizontal_flip=0.0),
        transforms.evaluation(size=50, max_size=60, square=True),
    ):
        image, objects = recipe(*painted(100, 200, [(20, 10, 180, 90)]))
        assert image.shape == (3, 50, 50) and objects["boxes"][0].tolist() == [5, 5, 45, 45]


def test_a_large_photograph_is_not_zoomed_out_to_an_enormous_one() -> None:
    zoom = transforms.ZoomOutAndCrop(zoom_out=1.0, fill=0, iou_crop=0.0, limit=100)
    sides = [max(zoom(*painted(1000, 1500, [(0, 0, 5, 5)]))[0].shape) for _ in range(20)]
    assert 100 < max(sides) <= 400


OTHER_VALUES = {
    "sizes": [61],
    "max_size": 50,
    "square": True,
    "crop": True,
    "crop_from": [200],
    "crop_min": 45,
    "crop_max": 41,
    "horizontal_flip": 1.0,
    "vertical_flip": 1.0,
    "zoom_out": 1.0,
    "fill": 99,
    "iou_crop": 1.0,
    "photometric_distortion": 1.0,
}
# Where another one than the base values makes an argument visible.
CROPS = ("crop_from", "crop_min", "crop_max")
VISIBLE_WITH = {"fill": {"zoom_out": 1.0}, **{name: {"crop": True} for name in CROPS}}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_argument_has_an_effect(name: str) -> None:
    assert list(inspect.signature(transforms.train).parameters) == list(OTHER_VALUES), "no argument is left out here"
    base = {"sizes": [60], "max_size": 100, "crop": False, "crop_from": [80], "crop_min": 40, "crop_max": 50}
    base.update({"horizontal_flip": 0.0, **VISIBLE_WITH.get(name, {})})
    sample = painted(80, 120, [(50, 10, 90, 40), (10, 10, 30, 20)])

    def made(**options: Any) -> list[Any]:
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            image, objects = transforms.train(**options)(*sample)
            found.append((image.tolist(), objects["boxes"].tolist()))
        return found

    assert made(**base) == made(**base)
    assert made(**base) != made(**{**base, name: OTHER_VALUES[name]})


@pytest.mark.parametrize("node", ["transforms", "plain_transforms"])
def test_every_argument_is_in_the_configuration_and_a_misspelt_one_is_refused(node: str) -> None:
    options = plain(compose([]).data[node])
    assert node == "plain_transforms" or list(options) == ["_target_", *OTHER_VALUES]
    for name in options.keys() - {"_target_"}:
        with pytest.raises(UserError, match=rf"^data\.{node}\.{name}_ is not an option of .*Did you mean {name}"):
            build({**options, f"{name}_": options[name]}, path=f"data.{node}")


@pytest.mark.parametrize("name", ["zoom_out", "iou_crop", "photometric_distortion", "fill"])
def test_values_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: wanted .*, got 300"):
        transforms.train(sizes=[9], max_size=9, **{name: 300})
