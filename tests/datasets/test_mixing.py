"""A mixing of one's own: the k-th sample is the same for any number of workers and after a restart."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets import Augmentation, DetectionDataset, Recipe, TrainLoader, transforms
from detr.boxes import cxcywh_to_xyxy
from detr.config import build, compose
from detr.errors import UserError
from tests.helpers.data import shapes_set

SIDE_BY_SIDE = """
import torch
from torchvision import tv_tensors


class SideBySide:
    '''A sample with others at its right.'''

    def __init__(self, *, others: int) -> None:
        self.others = others

    def __call__(self, image, objects, draw):
        samples = [(image, objects), *(draw() for _ in range(self.others))]
        images, boxes, offset = [], [], 0
        for part, found in samples:
            images.append(part)
            boxes.append(found["boxes"] + torch.tensor([offset, 0, offset, 0]))
            offset += part.shape[2]
        mixed = torch.cat(images, dim=2)
        boxes = tv_tensors.BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=mixed.shape[1:])
        labels = torch.cat([found["labels"] for _, found in samples])
        return tv_tensors.Image(mixed), {"boxes": boxes, "labels": labels}
"""
RECIPE = transforms.train(sizes=[40, 48, 56], max_size=120, crop_from=[50, 60], crop_min=30, crop_max=50)
SIZE = 48  # of each image, height and width


@pytest.fixture
def mixing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two images side by side, as a configuration names it."""
    (tmp_path / "side_by_side.py").write_text(SIDE_BY_SIDE)
    monkeypatch.syspath_prepend(tmp_path)
    node = "data.mixing={_target_: side_by_side.SideBySide, others: 1}"
    with pytest.raises(UserError, match=r"data\.mixing\._target_: .* is refused"):
        compose([node])
    return build(compose([node, "allow_targets=[side_by_side]"]).data.mixing, path="data.mixing")


def samples(dataset: DetectionDataset, workers: int, epoch: int, start: int = 0) -> Iterator[tuple[Any, ...]]:
    for batch, targets in TrainLoader(dataset, batch_size=5, workers=workers, seed=7).epoch(epoch, start):
        yield batch.images, batch.mask, *(tensor for target in targets for tensor in (target.boxes, target.labels))


def test_samples_are_the_same_for_any_number_of_workers_and_after_a_restart(shapes_root: Path, mixing: Any) -> None:
    dataset = shapes_set(shapes_root, "train", RECIPE, mixing=mixing, seed=5)
    before = torch.get_rng_state()
    _ = dataset[(3, 2)]
    assert torch.equal(torch.get_rng_state(), before), "the training's own randomness is not touched"
    whole = [list(samples(dataset, 0, epoch)) for epoch in (0, 1)]
    assert len(whole[0]) == 4
    assert not torch.equal(whole[0][0][1], whole[1][0][1]) or not torch.equal(whole[0][0][0], whole[1][0][0])
    for workers, epoch, start in ((1, 0, 0), (3, 0, 0), (3, 1, 0), (0, 1, 2), (1, 1, 3), (3, 0, 1)):
        again = shapes_set(shapes_root, "train", RECIPE, mixing=mixing, seed=5)
        for batch, same in zip(whole[epoch][start:], samples(again, workers, epoch, start), strict=True):
            assert all(map(torch.equal, batch, same))


def test_boxes_stay_on_their_objects(shapes_root: Path, mixing: Any) -> None:
    plain, mixed = shapes_set(shapes_root), shapes_set(shapes_root, mixing=mixing)
    originals = [plain[index] for index in range(len(plain))]
    drawn = []
    for index, (left, own) in enumerate(originals):
        image, target = mixed[(2, index)]
        assert image.shape == (3, SIZE, 2 * SIZE) and torch.equal(image[..., :SIZE], left)
        [(other, theirs)] = [(n, t) for n, (right, t) in enumerate(originals) if torch.equal(image[..., SIZE:], right)]
        drawn.append(other)
        assert target.image_id == own.image_id and target.labels.tolist() == [*own.labels, *theirs.labels]
        found = cxcywh_to_xyxy(target.boxes) * torch.tensor([2 * SIZE, SIZE, 2 * SIZE, SIZE])
        apart = [cxcywh_to_xyxy(t.boxes) * SIZE + torch.tensor([x, 0, x, 0]) for t, x in ((own, 0), (theirs, SIZE))]
        torch.testing.assert_close(found, torch.cat(apart))
    assert len(set(drawn)) > 8, "others are drawn from the whole set"


@pytest.mark.parametrize("workers", [0, 1])
def test_mixing_ends_with_the_augmentation(shapes_root: Path, mixing: Any, workers: int) -> None:
    dataset = shapes_set(shapes_root, mixing=mixing)
    loader = TrainLoader(dataset, batch_size=4, workers=workers, seed=7)
    plain = Recipe(transforms.evaluation(size=30, max_size=60))
    dataset.schedule(Augmentation(Recipe(None), plain, mixing, plain_after=0.5), epochs=2)
    assert {batch.images.shape[2:] for batch, _ in loader.epoch(0)} == {(SIZE, 2 * SIZE)}
    assert {batch.images.shape[2:] for batch, _ in loader.epoch(1)} == {(30, 30)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_not_drawn(
    shapes_root: Path, tmp_path: Path, mixing: Any, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    shutil.copytree(shapes_root, root)
    dataset = shapes_set(root, mixing=mixing, unreadable="skip")
    for path in dataset.folder.iterdir():
        if path.name != "000007.jpg":
            path.write_bytes(b"")
    for batch, targets in TrainLoader(dataset, batch_size=4, workers=workers, seed=7).epoch(0):
        assert {target.image_id for target in targets} == {7}
        assert torch.equal(batch.images[..., :SIZE], batch.images[..., SIZE:])
    assert "23 images in" in caplog.text
    with pytest.raises(UserError, match="cannot be read"):
        _ = shapes_set(root, mixing=mixing)[7]
