"""Several images in one: boxes stay on their objects, and the k-th sample is the same for any number of workers."""

import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import tv_tensors

from datasets import Augmentation, DetectionDataset, Recipe, TrainLoader, transforms
from datasets.mixing import Chain, CopyBlend, Mixing, Mixup, Mosaic, Sample
from detr.boxes import cxcywh_to_xyxy
from detr.config import build, compose, plain
from detr.errors import UserError
from tests.helpers.boxes import extents, painted
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


# Mosaic, mixup and copy-blend

ALL: dict[str, Mixing] = {
    "mosaic": Mosaic(size=64, probability=1.0),
    "turned mosaic": Mosaic(size=47, probability=1.0, rotation=180.0, translation=0.3, scaling=[0.4, 2.5]),
    "mosaic of short sides": Mosaic(size=31, probability=1.0, short_side=True),
    "mixup": Mixup(probability=1.0),
    "copy-blend": CopyBlend(probability=1.0, min_area=30.0),
    "covering": CopyBlend(probability=1.0, number=5, weight=[1.0, 1.0], expand=[0.0, 0.3]),
    "chain": Chain(
        parts={"a": Mosaic(size=53), "b": Mixup(probability=0.7), "c": CopyBlend(probability=0.7, min_area=20.0)}
    ),
}


def sources(seed: int) -> list[Sample]:
    """Images of several sizes, some without objects, some of a single pixel's width. Each object has its own label."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for image in range(24):
        height, width = ((97, 131), (131, 67), (89, 1), (1, 53), (1, 1), (211, 307))[number(0, 5)]
        boxes = []
        for _ in range(number(0, 3)):
            left, top = number(0, width - 1), number(0, height - 1)
            boxes.append((left, top, number(left + 1, width), number(top + 1, height)))
        found.append(painted(height, width, boxes, labels=[10 * image + n for n in range(len(boxes))]))
    return found


def mixed(mixing: Mixing, samples: Sequence[Sample], seed: int, shown: int | None = None) -> Sample:
    """What a mixing makes of the first one, drawing the others in turn. shown: the label whose area alone is white."""
    torch.manual_seed(seed)
    rest = iter(samples[1:])

    def prepared(sample: Sample) -> Sample:
        image, objects = sample
        boxes = objects["boxes"][objects["labels"] == shown].int().tolist()
        return painted(*image.shape[1:], boxes)[0], objects

    return mixing(*prepared(samples[0]), lambda: prepared(next(rest)))


@pytest.mark.parametrize("name", ALL)
def test_a_box_is_where_its_object_is(name: str) -> None:
    compared = 0
    for seed in range(8):
        samples = sources(seed)
        if name == "mosaic of short sides":  # which would enlarge those of a pixel's width, and blur them
            samples = [sample for sample in samples if min(sample[0].shape[1:]) > 50]
        _, objects = mixed(ALL[name], samples, seed)
        everything = {int(label) for _, one in samples for label in one["labels"]}
        assert set(objects["labels"].tolist()) <= everything
        for label, box in zip(objects["labels"].tolist(), objects["boxes"].as_subclass(torch.Tensor), strict=True):
            image, again = mixed(ALL[name], samples, seed, shown=label)
            assert torch.equal(again["boxes"], objects["boxes"]), "what is drawn does not depend on the pixels"
            found = extents(image, above=12)
            if found is None:
                assert (box[2:] - box[:2]).min() < 2 or name in ("covering", "turned mosaic", "chain")
                continue
            assert (found[:2] >= box[:2] - 2).all() and (found[2:] <= box[2:] + 2).all()
            limits = torch.tensor(image.shape[:0:-1]) - 1
            inside = (box[:2] > 1).all() and (box[2:] < limits).all()
            if name != "covering" and inside and (box[2:] - box[:2]).min() >= 3:
                torch.testing.assert_close(found, box, atol=2, rtol=0)
                compared += 1
    assert compared >= 8 or name == "covering"


@pytest.mark.parametrize("name", ALL)
def test_no_box_leaves_the_image_or_has_no_area(name: str) -> None:
    for seed in range(30):
        image, objects = mixed(ALL[name], sources(seed), seed)
        boxes = objects["boxes"].as_subclass(torch.Tensor)
        assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
        assert objects["boxes"].canvas_size == tuple(image.shape[1:]) and boxes.shape == (len(objects["labels"]), 4)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert (boxes <= torch.tensor(image.shape[:0:-1]).repeat(2) + 1e-3).all()


def test_a_mosaic_that_is_not_moved_is_its_tiles() -> None:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for n, (height, width) in enumerate(((60, 41), (29, 60), (60, 60), (53, 60))):
        _, objects = painted(height, width, [(3, 5, 11, 23)], labels=[n])
        pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        samples.append((tv_tensors.Image(pixels), objects))
    still = Mosaic(size=60, probability=1.0, rotation=0.0, translation=0.0, scaling=[1.0, 1.0], fill=7)
    rest = iter(samples[1:])
    image, objects = still(*samples[0], lambda: next(rest))
    expected = torch.full((3, 120, 120), 7, dtype=torch.uint8)
    for n, (left, top) in enumerate(((19, 0), (60, 31), (0, 60), (60, 60))):
        part = samples[n][0]
        for y in range(part.shape[1]):
            for x in range(part.shape[2]):
                expected[:, top + y, left + x] = part[:, y, x]
        assert objects["labels"][n] == n and objects["boxes"][n].tolist() == [left + 3, top + 5, left + 11, top + 23]
    assert torch.equal(image, expected)


def test_tiles_of_a_mosaic_of_short_sides_are_as_large_as_the_largest_image() -> None:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for n, (height, width) in enumerate(((30, 41), (77, 30), (30, 30), (30, 53))):  # short sides as they are to be
        pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        samples.append((tv_tensors.Image(pixels), painted(height, width, [(3, 5, 11, 23)], labels=[n])[1]))
    still = Mosaic(size=30, probability=1.0, rotation=0.0, translation=0.0, scaling=[1.0, 1.0], short_side=True)
    rest = iter(samples[1:])
    image, objects = still(*samples[0], lambda: next(rest))
    expected = torch.zeros(3, 2 * 77, 2 * 53, dtype=torch.uint8)
    for n, (left, top) in enumerate(((0, 0), (53, 0), (0, 77), (53, 77))):
        height, width = samples[n][0].shape[1:]
        expected[:, top : top + height, left : left + width] = samples[n][0]
        assert objects["labels"][n] == n and objects["boxes"][n].tolist() == [left + 3, top + 5, left + 11, top + 23]
    assert torch.equal(image, expected) and objects["boxes"].canvas_size == (154, 106)
    thin = painted(1, 1000, [])
    assert still(*thin, lambda: thin)[0].shape == (3, 2, 2 * 16 * 30), "no line of pixels fills the memory"


def test_a_whole_mixup_blends_finished_samples(shapes_root: Path) -> None:
    """Each with its own transforms, as if it were alone; no sample counts as mixed in these."""
    seen = []
    resize = transforms.evaluation(size=31, max_size=99, square=True)

    def finish(image: Any, objects: Any) -> Sample:
        seen.append("mixed" in objects)
        return resize(image, objects)

    plain = shapes_set(shapes_root, transforms=resize, seed=5)
    whole = Mixup(probability=0.5, weight=[0.25, 0.25], whole=True)
    blended = shapes_set(shapes_root, transforms=finish, mixing=Chain(parts={"none": None, "mixup": whole}), seed=5)
    alone, partners = [plain[index] for index in range(len(plain))], []
    for epoch in range(3):
        for index, (own, target) in enumerate(alone):
            image, objects = blended[(epoch, index)]
            assert objects.image_id == target.image_id
            if torch.equal(image, own) and torch.equal(objects.boxes, target.boxes):
                continue
            sums = [(0.25 * own.double() + 0.75 * other.double()).round().byte() for other, _ in alone]
            [partner] = [n for n, expected in enumerate(sums) if (image.int() - expected.int()).abs().max() <= 1]
            torch.testing.assert_close(objects.boxes, torch.cat((target.boxes, alone[partner][1].boxes)))
            assert objects.labels.tolist() == [*target.labels, *alone[partner][1].labels]
            partners.append(partner)
    assert 20 < len(partners) < 52 and len(set(partners)) > 12, "half of 72, with partners from the whole set"
    assert len(seen) == 72 + len(partners) and not any(seen)


def test_what_finishes_draws_what_was_finished_before() -> None:
    class Brighter:
        def __call__(self, image: Any, objects: Any, draw: Callable[[], Sample]) -> Sample:
            return image, objects

        def finish(self, image: Any, objects: Any, draw: Callable[[], Sample]) -> Sample:
            return tv_tensors.Image(image + draw()[0] + 1), objects

    chain = Chain(parts={"first": Brighter(), "second": Mosaic(size=5), "third": Brighter()})
    image, _ = chain.finish(*painted(1, 1, []), lambda: painted(1, 1, []))
    assert image.flatten().tolist() == [3] * 3


def test_mixup_is_the_weighted_sum_where_both_are() -> None:
    first, second = painted(40, 60, [(0, 0, 60, 40)], labels=[1]), painted(20, 10, [(0, 0, 10, 20)], labels=[2])
    torch.manual_seed(0)
    image, objects = Mixup(probability=1.0, weight=[0.75, 0.75])(first[0] * 0 + 100, first[1], lambda: second)
    left, top, right, bottom = objects["boxes"][1].int().tolist()
    assert (right - left, bottom - top) == (20, 40), "as large as fits, with its aspect ratio"
    expected = torch.full((3, 40, 60), 100)
    expected[:, top:bottom, left:right] = round(0.75 * 100 + 0.25 * 255)
    assert torch.equal(image.int(), expected.int()) and objects["labels"].tolist() == [1, 2]


def test_pasted_pixels_come_from_around_their_object() -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (3, 50, 70), generator=generator, dtype=torch.uint8)
    other = tv_tensors.Image(pixels), painted(50, 70, [(20, 10, 40, 20)], labels=[5])[1]
    torch.manual_seed(0)
    paste = CopyBlend(probability=1.0, weight=[1.0, 1.0], expand=[0.2, 0.2])
    image, objects = paste(*painted(90, 110, []), lambda: other)
    left, top, right, bottom = objects["boxes"][0].int().tolist()
    assert torch.equal(image[:, top - 2 : bottom + 2, left - 4 : right + 4], pixels[:, 8:22, 16:44])
    assert (image.count_nonzero() - pixels[:, 8:22, 16:44].count_nonzero()) == 0


def test_what_a_later_part_draws_has_gone_through_the_earlier_ones() -> None:
    def brighter(image: Any, objects: Any, draw: Callable[[], Sample]) -> Sample:
        return tv_tensors.Image(image + 1), objects

    def both(image: Any, objects: Any, draw: Callable[[], Sample]) -> Sample:
        return tv_tensors.Image(torch.cat((image, draw()[0]))), objects

    chain = Chain(parts={"first": brighter, "second": both, "third": brighter, "fourth": both})
    image, _ = chain(*painted(1, 1, []), lambda: painted(1, 1, []))
    assert image[:, 0, 0].tolist() == [2] * 12
    assert ALL["chain"].images == 16 and Chain(parts={"own": brighter, "none": None}).images == 1
    assert Chain(parts={"none": None})(*painted(1, 1, []), lambda: pytest.fail("drawn in vain"))[0].shape == (3, 1, 1)
    with pytest.raises(UserError, match=r"^parts\.mosaik: wanted a node with a _target_"):
        Chain(parts={"mosaik": {"probability": 0.5}})  # type: ignore[dict-item]


@pytest.mark.parametrize("mix", [Mosaic(size=9, probability=0.0), Mixup(probability=0.0), CopyBlend(probability=0.0)])
def test_a_sample_that_is_not_mixed_stays_the_same_object(mix: Mixing) -> None:
    image, objects = painted(5, 7, [(0, 0, 3, 3)])
    assert mix(image, objects, lambda: pytest.fail("drawn in vain"))[0] is image
    assert Chain(parts={"one": mix})(image, objects, lambda: (image, objects))[0] is image


OTHER_VALUES = {
    Mosaic: {
        "size": 31,
        "probability": 0.0,
        "rotation": 90.0,
        "translation": 0.5,
        "scaling": [2.0, 2.0],
        "fill": 200,
        "short_side": True,
    },
    Mixup: {"probability": 0.0, "weight": [0.9, 1.0], "whole": True},
    CopyBlend: {
        "probability": 0.0,
        "number": 1,
        "min_area": 1e6,
        "expand": [0.5, 0.5],
        "weight": [1.0, 1.0],
    },
}
WRONG_VALUES = {
    "size": 0,
    "probability": 1.5,
    "rotation": -1.0,
    "translation": 2.0,
    "scaling": [0.0, 1.0],
    "fill": 256,
    "weight": [0.6, 0.4],
    "number": 0,
    "min_area": -1.0,
    "expand": [0.5],
}
ARGUMENTS = [(kind, name) for kind, others in OTHER_VALUES.items() for name in others]
BASE: dict[Any, dict[str, Any]] = {Mosaic: {"size": 40, "probability": 1.0}}
GROUPS = {Mosaic: "mosaic", Mixup: "mixup", CopyBlend: "copy_blend"}


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS)
def test_every_argument_has_an_effect_and_a_range(kind: Any, name: str) -> None:
    assert list(inspect.signature(kind).parameters) == list(OTHER_VALUES[kind]), "no argument is left out here"
    base = BASE.get(kind, {"probability": 1.0})
    boxes = [(10, 20, 40, 60), (5, 10, 45, 70), (5, 5, 30, 30)]
    samples = [painted(101, 53, boxes, labels=range(3 * n, 3 * n + 3)) for n in range(4)]
    before = mixed(kind(**base), samples, 5, shown=4)
    after = mixed(kind(**{**base, name: OTHER_VALUES[kind][name]}), samples, 5, shown=4)
    same = before[0].shape == after[0].shape and torch.equal(before[0], after[0])
    assert not (same and before[1]["boxes"].tolist() == after[1]["boxes"].tolist())
    if name in ("short_side", "whole"):
        return  # true or false
    with pytest.raises(UserError, match=f"^{name}: wanted .*got"):
        kind(**{**base, name: WRONG_VALUES[name]})


@pytest.mark.parametrize("kind", GROUPS)
def test_every_argument_is_in_its_file_and_a_misspelt_one_is_refused(kind: Any) -> None:
    group = GROUPS[kind]
    options = plain(compose([f"data/mixing={group}"]).data.mixing)["parts"][group]
    assert options.keys() == {"_target_", *OTHER_VALUES[kind]}
    for name in OTHER_VALUES[kind]:
        with pytest.raises(UserError, match=rf"^data\.mixing\.{name}_ is not an option of .*Did you mean {name}"):
            build({**options, f"{name}_": options[name]}, path="data.mixing")
    with pytest.raises(UserError, match=rf"parts\.{group}\.probabilty is not an option of .*Did you mean probability"):
        compose([f"data/mixing={group}", f"+data.mixing.parts.{group}.probabilty=1"])


def test_a_chain_is_short_on_the_command_line() -> None:
    data = compose(["data/mixing=[mosaic,mixup]", "data.size=80", "data.mixing.parts.mosaic.fill=9"]).data
    chain = build(data.mixing, path="data.mixing")
    mosaic, mixup = chain.parts
    assert (type(mosaic), mosaic.size, mosaic.fill, type(mixup), chain.images) == (Mosaic, 40, 9, Mixup, 8)
    assert compose([]).data.mixing is None
