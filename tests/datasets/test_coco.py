"""The data set: what it reads, drops and keeps, and that its randomness depends on (seed, epoch, index) alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from datasets import Augmentation, DetectionDataset, Recipe, TrainLoader, evaluation_loader, transforms
from detr.boxes import cxcywh_to_xyxy
from detr.errors import UserError
from detr.types import Category
from tests.helpers.data import coco_set, refusal, shapes_set

Write = Callable[..., tuple[Path, Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes images of 20 x 30 (height x width) pixels and an annotation file with these annotations."""

    def write(annotations: list[dict[str, Any]], images: int = 2, categories: tuple[int, ...] = (3, 17, 90)) -> Any:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        entries = []
        for index in range(images):
            Image.fromarray(np.full((20, 30, 3), index, np.uint8)).save(folder / f"{index}.png")
            entries.append({"id": 10 * index, "file_name": f"{index}.png", "width": 30, "height": 20})
        rows = [{"id": index + 1, "image_id": 0, "iscrowd": 0, **row} for index, row in enumerate(annotations)]
        content = {
            "images": entries,
            "annotations": rows,
            "categories": [{"id": i, "name": f"c{i}"} for i in categories],
        }
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return folder, tmp_path / "instances.json"

    return write


def test_category_ids_with_gaps_become_ranks(write: Write) -> None:
    rows = [{"category_id": 90, "bbox": [1, 2, 5, 6]}, {"category_id": 3, "bbox": [0, 0, 30, 20], "image_id": 10}]
    dataset = coco_set(*write(rows, categories=(90, 3, 17)))
    assert dataset.categories == [Category(3, "c3"), Category(17, "c17"), Category(90, "c90")]
    (_, first), (_, second) = dataset[0], dataset[1]
    assert (first.labels.tolist(), first.image_id, first.original_size) == ([2], 0, (20, 30))
    assert (second.labels.tolist(), second.image_id) == ([0], 10)
    torch.testing.assert_close(
        cxcywh_to_xyxy(first.boxes) * torch.tensor([30, 20, 30, 20.0]), torch.tensor([[1, 2, 6, 8.0]])
    )
    torch.testing.assert_close(second.boxes, torch.tensor([[0.5, 0.5, 1, 1]]))


def test_crowds_and_bad_boxes_are_left_out_and_counted(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    boxes = [[1, 1, 5, 5], [1, 1, float("nan"), 5], [1, 1, -3, 5], [1, 1, 0, 5], [40, 1, 5, 5], [-5, -5, 10, 10]]
    rows = [{"category_id": 3, "bbox": box} for box in boxes]
    rows.append({"category_id": 3, "bbox": [2, 2, 9, 9], "iscrowd": 1})
    dataset = coco_set(*write(rows))
    xyxy = cxcywh_to_xyxy(dataset[0][1].boxes) * torch.tensor([30, 20, 30, 20.0])
    torch.testing.assert_close(xyxy, torch.tensor([[1, 1, 6, 6], [0, 0, 5, 5.0]]))  # the last one clipped to the image
    kept = [entry["bbox"] for entry in dataset.ground_truth()["annotations"]]
    assert kept == [[1, 1, 5, 5], [-5, -5, 10, 10], [2, 2, 9, 9]], "what was dropped cannot be found either"
    assert "dropped 4 of 7 boxes: 1 NaN or infinite, 1 of negative size, 1 of zero size, 1 outside" in caplog.text


def test_crowds_count_as_boxes_like_others(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"category_id": 3, "bbox": [1, 1, size, 5], "iscrowd": 1} for size in (0, 5)]
    dataset = coco_set(*write(rows))
    assert [entry["bbox"] for entry in dataset.ground_truth()["annotations"]] == [[1, 1, 5, 5]]
    assert "dropped 1 of 2 boxes: 1 of zero size." in caplog.text
    with pytest.raises(UserError, match=r"not one of the 1 boxes is usable \(1 of zero size\)"):
        coco_set(*write(rows[:1]))


def test_images_without_objects_stay(write: Write) -> None:
    dataset = coco_set(*write([]))
    assert len(dataset) == 2
    assert dataset[1][1].boxes.shape == (0, 4)


def test_every_image_of_coco_reads_as_with_pycocotools(shared: Path) -> None:
    folder = shared / "data" / "coco_sample"
    dataset = coco_set(folder / "images" / "train", folder / "instances_train.json")
    reference = COCO(folder / "instances_train.json")
    assert [category.id for category in dataset.categories] == sorted(reference.getCatIds())
    assert any(not len(dataset[index][1]) for index in range(len(dataset)))
    for image, target in (dataset[index] for index in range(len(dataset))):
        info = reference.loadImgs(target.image_id)[0]
        assert tuple(image.shape) == (3, *target.original_size) == (3, info["height"], info["width"])
        wanted = reference.loadAnns(reference.getAnnIds(target.image_id, iscrowd=False))
        assert [dataset.categories[label].id for label in target.labels] == [entry["category_id"] for entry in wanted]
        height, width = target.original_size
        found = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in wanted)])
        torch.testing.assert_close(found, boxes.reshape(-1, 4), atol=0.05, rtol=0)


RECIPE = transforms.train(sizes=[40, 48, 56], max_size=80, crop_from=[50, 60], crop_min=30, crop_max=50)


def augmented(root: Path, seed: int = 5) -> DetectionDataset:
    return shapes_set(root, "train", RECIPE, seed=seed)


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_do_not_depend_on_workers(shapes_root: Path, workers: int) -> None:
    def batches(workers: int) -> list[Any]:
        loader = TrainLoader(augmented(shapes_root), batch_size=5, workers=workers, seed=7)
        return [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]

    for (a, a_targets), (b, b_targets) in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.mask, b.mask)
        for left, right in zip(a_targets, b_targets, strict=True):
            assert left.image_id == right.image_id and torch.equal(left.boxes, right.boxes)


def test_randomness_comes_from_seed_epoch_and_index(shapes_root: Path) -> None:
    dataset, state = augmented(shapes_root), torch.get_rng_state()
    same, other_epoch = dataset[(3, 2)][0], dataset[(4, 2)][0]
    assert torch.equal(dataset[(3, 2)][0], same)
    assert same.shape != other_epoch.shape or not torch.equal(same, other_epoch)
    variants = {tuple(augmented(shapes_root, seed)[(0, 2)][0].shape) for seed in range(12)}
    assert len(variants) > 1
    assert torch.equal(torch.get_rng_state(), state), "the training's own randomness is not touched"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("after", "plain"),
    [
        (1.0, [False, False, False]),
        (0.6, [False, False, True]),
        (0.4, [False, True, True]),
        (0.0, [True, True, True]),
    ],
)
def test_augmentation_ends_after_a_fraction_of_the_training(
    shapes_root: Path, workers: int, after: float, plain: list[bool]
) -> None:
    dataset = augmented(shapes_root)
    plainly = transforms.train(sizes=[44], max_size=60, crop=False, horizontal_flip=0.5, vertical_flip=0.25)
    whole = shapes_set(shapes_root, "train", plainly, seed=5)
    loader = TrainLoader(dataset, batch_size=5, workers=workers, seed=7)
    dataset.schedule(Augmentation(Recipe(RECIPE), Recipe(plainly), plain_after=after), epochs=3)
    for epoch, expected in enumerate(plain):
        (_, targets) = next(iter(loader.epoch(epoch)))
        index = next(i for i, record in enumerate(dataset.records) if record.id == targets[0].image_id)
        wanted = (whole if expected else augmented(shapes_root))[(epoch, index)][1].boxes
        assert torch.equal(targets[0].boxes, wanted), "the sample still follows from seed, epoch and index"
        assert (dataset[(epoch, index)][0].shape == (3, 44, 44)) == expected


@pytest.mark.parametrize("after", [-0.1, 1.1, float("nan")])
def test_a_fraction_beyond_the_training_is_refused(after: float) -> None:
    with pytest.raises(UserError, match=refusal(f"data.plain_after={after}")):
        Augmentation(Recipe(RECIPE), Recipe(RECIPE), plain_after=after)


def test_an_epoch_can_start_in_the_middle(shapes_root: Path) -> None:
    loader = TrainLoader(augmented(shapes_root), batch_size=5, workers=0, seed=7)
    assert len(loader) == 4  # 24 images, the incomplete batch dropped
    whole = [[target.image_id for target in targets] for _, targets in loader.epoch(2)]
    rest = [[target.image_id for target in targets] for _, targets in loader.epoch(2, start=3)]
    assert rest == whole[3:]
    assert len({image for batch in whole for image in batch}) == 20
    assert whole != [[target.image_id for target in targets] for _, targets in loader.epoch(3)]


def test_evaluation_sees_each_image_once(shapes_root: Path) -> None:
    dataset = shapes_set(shapes_root, "val")
    ids = [t.image_id for _, targets in evaluation_loader(dataset, batch_size=3, workers=0) for t in targets]
    assert ids == [record.id for record in dataset.records] and len(ids) == 7
