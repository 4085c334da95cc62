"""When what is done to training images, and the sizes that batches draw: the same for any number of workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets import Augmentation, DetectionDataset, Recipe, TrainLoader, transforms
from datasets.mixing import Chain, CopyBlend, Mixup, Mosaic
from detr import distributed
from detr.config import compose
from detr.errors import UserError
from tests.helpers.data import shapes_set
from train import build_augmentation

# Epochs of a training: where DEIM's policy begins to mix, ends it, and ends all augmentation.
DEIM = {160: (4, 78, 148), 132: (4, 64, 120), 102: (4, 49, 90), 58: (4, 29, 50), 120: (4, 64, 117), 60: (4, 34, 58)}
SIZES = [32, 40, 48, 56]
MIXING = Chain(parts={"a": Mosaic(size=24), "b": Mixup(), "c": CopyBlend(min_area=9.0)})
STRONG = {"zoom_out": 0.5, "iou_crop": 0.8, "photometric_distortion": 0.5}


def recipe(*, square: bool = False, **options: Any) -> Recipe:
    """At a size of 44, and at each of SIZES."""
    every = {"max_size": 200, "square": square, "crop": False, **options}
    return Recipe(
        transforms.train(sizes=[44], **every), {size: transforms.train(sizes=[size], **every) for size in SIZES}
    )


def augmented(root: Path, *, square: bool = False) -> DetectionDataset:
    """Plain in epoch 0, mixed in 1 and 2, strong in 3, plain in 4 and 5."""
    dataset = shapes_set(root, seed=5)
    strong = recipe(square=square, **STRONG)
    fractions = {"plain_before": 1 / 6, "mixing_until": 3 / 6, "plain_after": 4 / 6}
    dataset.schedule(Augmentation(strong, recipe(square=square), MIXING, **fractions), epochs=6)
    return dataset


def batches(dataset: DetectionDataset, workers: int, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
    loader = TrainLoader(dataset, batch_size=4, workers=workers, seed=7, image_sizes=SIZES)
    for batch, targets in loader.epoch(epoch, start):
        yield batch.images, batch.mask, *(tensor for target in targets for tensor in target.tensors().values())


@pytest.mark.parametrize("digits", [3, 15])
@pytest.mark.parametrize("epochs", DEIM)
def test_fractions_give_the_epochs_of_deim(epochs: int, digits: int) -> None:
    begin, mixed, end = DEIM[epochs]
    a, b, c = (round(epoch / epochs, digits) for epoch in DEIM[epochs])
    plain, strong = Recipe(None, {7: transforms.evaluation(size=7, max_size=7)}), recipe()
    found = Augmentation(strong, plain, MIXING, plain_before=a, mixing_until=b, plain_after=c).phases(epochs)
    assert [phase.epoch for phase in found] == [0, begin, mixed, end]
    assert [phase.recipe for phase in found] == [plain, strong, strong, Recipe(None)]
    assert [phase.mixing for phase in found] == [None, MIXING, None, None]


@pytest.mark.parametrize(
    ("fractions", "epochs", "expected"),
    [
        ({}, 3, [(0, "mixing and transforms")]),
        ({"plain_after": 0.99}, 3, [(0, "mixing and transforms"), (2, "plain transforms of one size")]),
        ({"plain_after": 0.9}, 1, [(0, "mixing and transforms")]),
        ({"plain_after": 0.0}, 3, [(0, "plain transforms of one size")]),
        ({"plain_before": 1.0}, 3, [(0, "plain transforms")]),
        ({"plain_before": 0.4, "mixing_until": 0.4}, 5, [(0, "plain transforms"), (2, "transforms")]),
        ({"mixing_until": 0.7, "plain_after": 0.5}, 1, [(0, "plain transforms of one size")]),
        ({"plain_before": 0.03}, 6, [(0, "mixing and transforms")]),
    ],
)
def test_short_trainings_leave_phases_out(fractions: Any, epochs: int, expected: list[tuple[int, str]]) -> None:
    found = Augmentation(recipe(), recipe(), MIXING, **fractions).phases(epochs)
    assert [(phase.epoch, phase.name) for phase in found] == expected


@pytest.mark.parametrize("later", ["mixing_until", "plain_after"])
def test_phases_that_end_before_they_begin_are_refused(later: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.plain_before: wanted at most data\.{later}=0\.2, got 0\.3\.$"):
        build_augmentation(compose(["data.plain_before=0.3", f"data.{later}=0.2"]).data)


def test_each_epoch_has_what_its_phase_says(shapes_root: Path) -> None:
    dataset, plain = augmented(shapes_root), recipe()
    alone = {name: shapes_set(shapes_root, seed=5) for name in ("plain", "mixed", "strong", "last")}
    for name, (used, mixing) in {
        "plain": (plain, None),
        "mixed": (recipe(**STRONG), MIXING),
        "strong": (recipe(**STRONG), None),
        "last": (Recipe(plain.transforms), None),
    }.items():
        alone[name].schedule(Augmentation(used, used, mixing), epochs=6)
    loader = TrainLoader(dataset, batch_size=4, workers=1, seed=7, image_sizes=SIZES)
    for epoch, name in ((0, "plain"), (1, "mixed"), (2, "mixed"), (3, "strong"), (4, "last"), (5, "last")):
        same = batches(alone[name], 0, epoch, start=3)
        for (batch, _), (images, mask, *_) in zip(loader.epoch(epoch, start=3), same, strict=True):
            assert torch.equal(batch.images, images) and torch.equal(batch.mask, mask)


@pytest.mark.parametrize("square", [False, True])
def test_each_batch_draws_one_size(shapes_root: Path, square: bool) -> None:
    dataset = augmented(shapes_root, square=square)
    loader = TrainLoader(dataset, batch_size=4, workers=0, seed=7, image_sizes=SIZES)
    drawn = []
    for epoch in (0, 2, 3, 4):
        for batch, _ in loader.epoch(epoch):
            heights, widths = (~batch.mask).sum(1)[:, 0], (~batch.mask).sum(2)[:, 0]
            [short] = set(torch.minimum(heights, widths).tolist())
            drawn.append((epoch, short))
            assert not square or batch.images.shape[2:] == (short, short)
    assert {size for epoch, size in drawn if epoch < 4} == set(SIZES)
    assert {size for epoch, size in drawn if epoch >= 4} == {44}, "no sizes of batches at the end"
    assert len({tuple(size for e, size in drawn if e == epoch) for epoch in range(4)}) > 1


def test_samples_are_the_same_for_any_number_of_workers_and_after_a_restart(shapes_root: Path) -> None:
    whole = [list(batches(augmented(shapes_root), 0, epoch)) for epoch in range(5)]
    for workers, epoch, start in ((1, 1, 0), (3, 1, 2), (3, 3, 1), (0, 1, 3), (1, 4, 5)):
        again = batches(augmented(shapes_root), workers, epoch, start)
        for batch, same in zip(whole[epoch][start:], again, strict=True):
            assert len(batch) == len(same) and all(map(torch.equal, batch, same))


def test_processes_draw_the_same_sizes(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = TrainLoader(augmented(shapes_root), batch_size=4, workers=0, seed=7, image_sizes=SIZES)
    sizes = [min(batch.images.shape[2:]) for batch, _ in one.epoch(0)]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        part = TrainLoader(augmented(shapes_root), batch_size=2, workers=0, seed=7, image_sizes=SIZES)
        assert [min(batch.images.shape[2:]) for batch, _ in part.epoch(0)] == sizes


def test_sizes_of_batches_do_not_change_their_images(shapes_root: Path) -> None:
    def ids(**options: Any) -> list[list[int]]:
        loader = TrainLoader(shapes_set(shapes_root, seed=5), batch_size=4, workers=0, seed=7, **options)
        return [[target.image_id for target in targets] for _, targets in loader.epoch(2)]

    assert ids() == ids(image_sizes=SIZES)


def test_sizes_of_batches_replace_those_of_the_transforms() -> None:
    made = build_augmentation(compose(["data.batch_sizes=[64,72,72]", "data.square=true"]).data)
    assert made.recipe.at_size.keys() == made.plain.at_size.keys() == {64, 72}
    assert build_augmentation(compose([]).data).recipe.at_size == {}
    own = compose(["data.batch_sizes=[64]"]).data
    own.transforms = {"_target_": "torchvision.transforms.v2.RandomHorizontalFlip"}
    with pytest.raises(
        UserError, match=r"^data\.transforms: torchvision\S+Flip takes no sizes.*Choose another _target_"
    ):
        build_augmentation(own)
    with pytest.raises(UserError, match=r"^data\.batch_sizes: wanted null where data\.plain_transforms is null"):
        build_augmentation(compose(["data.plain_transforms=null", "data.batch_sizes=[64]"]).data)


def test_a_mixed_sample_is_neither_zoomed_out_nor_cropped(shapes_root: Path) -> None:
    spared = transforms.ZoomOutAndCrop(zoom_out=1.0, fill=0, iou_crop=0.0, limit=64)
    dataset = shapes_set(shapes_root, transforms=spared, mixing=Mosaic(size=20), seed=5)
    shapes = [tuple(dataset[(epoch, 3)][0].shape[1:]) for epoch in range(20)]
    mosaics = [shape for shape in shapes if shape == (40, 40)]
    assert 4 < len(mosaics) < 16 and all(min(shape) >= 48 for shape in shapes if shape != (40, 40))
