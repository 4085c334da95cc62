"""Augmentation: boxes stay on their objects; sizes follow the recipe; resizing looks like Pillow's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from datasets import transforms
from detr.boxes import cxcywh_to_xyxy
from tests.helpers.data import coco_set, shapes_set


def marked(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A black image with a white rectangle exactly at its box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([box], dtype=torch.float32), format="XYXY", canvas_size=(height, width)
    )
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([4])}


@pytest.mark.parametrize("seed", range(25))
def test_boxes_follow_the_image(seed: int) -> None:
    torch.manual_seed(seed)
    recipe = transforms.train(
        sizes=[60, 70, 80], max_size=133, crop_from=[90, 100], crop_min=50, crop_max=80, vertical_flip=0.5
    )
    image, objects = recipe(*marked(77, 131, (30, 20, 70, 50)))
    ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
    box = objects["boxes"][0]
    if not (box[2:] > box[:2]).all():
        assert len(xs) == 0, "only a box that was cut away may be empty"
        return
    found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)
    torch.testing.assert_close(found, box.as_subclass(torch.Tensor), atol=1.5, rtol=0)


def test_short_sides_are_drawn_from_the_list() -> None:
    recipe = transforms.train(sizes=[40, 48, 56], max_size=1000, crop=False)
    sizes = {min(recipe(*marked(64, 96, (1, 1, 20, 20)))[0].shape[1:]) for _ in range(60)}
    assert sizes == {40, 48, 56}


def test_without_crops_the_recipe_flips_and_resizes_as_in_evaluation() -> None:
    flips = transforms.train(sizes=[77], max_size=131, crop=False, horizontal_flip=1.0, vertical_flip=1.0)
    image, objects = flips(*marked(77, 131, (30, 20, 70, 50)))
    torch.testing.assert_close(objects["boxes"].as_subclass(torch.Tensor), torch.tensor([[61.0, 27.0, 101.0, 57.0]]))
    assert tuple(image.shape) == (3, 77, 131)
    unflipped = transforms.train(sizes=[50], max_size=60, crop=False, horizontal_flip=0.0)
    evaluated = transforms.evaluation(size=50, max_size=60)(*marked(77, 131, (30, 20, 70, 50)))
    assert torch.equal(unflipped(*marked(77, 131, (30, 20, 70, 50)))[0], evaluated[0])


def test_crop_windows_are_within_their_limits() -> None:
    crop = transforms.RandomSizeCrop(20, 50)
    extents = {tuple(crop(*marked(64, 33, (1, 1, 20, 20)))[0].shape[1:]) for _ in range(200)}
    heights, widths = {h for h, _ in extents}, {w for _, w in extents}
    assert min(heights) == 20 and max(heights) == 50 and min(widths) == 20 and max(widths) == 33
    assert transforms.RandomSizeCrop(20, 50)(*marked(11, 13, (1, 1, 9, 9)))[0].shape[1:] == (11, 13)


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
