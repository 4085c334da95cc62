"""Batches: the same for any number of processes, grouped, padded, and what happens when images or workers fail."""

import itertools
import json
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets import DetectionDataset, TrainLoader, evaluation_loader, transforms
from datasets.workers import BatchLoader
from detr import distributed
from detr.errors import UserError
from detr.types import ImageBatch, Target
from tests.helpers import with_small_disk
from tests.helpers.commands import REPOSITORY
from tests.helpers.data import coco_set, refusal, shapes_set

RECIPE = transforms.train(sizes=[40, 48, 56], max_size=80, crop_from=[50, 60], crop_min=30, crop_max=50)


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of several, as far as the loaders know."""

    def pretend(rank: int, processes: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: processes)

    return pretend


@pytest.fixture
def damaged(shapes_root: Path, tmp_path: Path) -> DetectionDataset:
    """A set with four of 24 training images spoilt, each in another way, two of them in a row; they are skipped."""
    root = tmp_path / "set"
    shutil.copytree(shapes_root, root)
    dataset = shapes_set(root, "train", RECIPE, seed=5, unreadable="skip")
    empty, cut, gone, other = (root / "train" / dataset.records[index].file_name for index in (3, 4, 11, 23))
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:200])
    gone.unlink()
    other.write_bytes(b"no image at all")
    return dataset


def augmented(root: Path) -> DetectionDataset:
    return shapes_set(root, transforms=RECIPE, seed=5)


def images_of(batches: Iterable[tuple[ImageBatch, list[Target]]]) -> list[tuple[torch.Tensor, Target]]:
    """All images in a row, without their padding, and their targets."""
    found = []
    for batch, targets in batches:
        for image, mask, target in zip(batch.images, batch.mask, targets, strict=True):
            height, width = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
            assert not mask[:height, :width].any() and mask.sum() == mask.numel() - height * width
            found.append((image[:, :height, :width], target))
    return found


def ids_of(batches: Iterable[tuple[ImageBatch, list[Target]]]) -> list[list[int]]:
    return [[target.image_id for target in targets] for _, targets in batches]


def assert_same_images(a: list[tuple[torch.Tensor, Target]], b: list[tuple[torch.Tensor, Target]]) -> None:
    for (image, target), (other_image, other_target) in zip(a, b, strict=True):
        assert torch.equal(image, other_image) and torch.equal(target.boxes, other_target.boxes)
        assert torch.equal(target.labels, other_target.labels) and target.image_id == other_target.image_id


class Sizes:
    """A data set of black images of these sizes, (height, width)."""

    source = Path("none.json")

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.records = [type("Record", (), {"size": size}) for size in sizes]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int, None]) -> tuple[torch.Tensor, Target]:
        _, index, _ = key
        height, width = self.records[index].size
        target = Target(
            labels=torch.zeros(0, dtype=torch.long),
            boxes=torch.zeros(0, 4),
            image_id=index,
            original_size=(height, width),
        )
        return torch.zeros(3, height, width, dtype=torch.uint8), target

    def count_objects(self) -> int:
        return 1

    def begin_training(self, *, workers: int) -> None: ...

    def report_unreadable(self) -> None: ...


def sizes_like_photographs(count: int) -> Sizes:
    generator = torch.Generator().manual_seed(1)
    shapes = torch.tensor([[48, 64], [64, 48], [43, 64], [64, 43], [64, 64], [36, 64]])
    return Sizes([tuple(row) for row in shapes[torch.randint(len(shapes), (count,), generator=generator)].tolist()])


# Several processes


@pytest.mark.parametrize("options", [{}, {"group_by_aspect": True}])
@pytest.mark.parametrize(("processes", "batch_size"), [(2, 5), (3, 2)])
def test_processes_have_the_batches_of_one_process_among_them(
    shapes_root: Path,
    as_process: Callable[[int, int], None],
    processes: int,
    batch_size: int,
    options: dict[str, Any],
) -> None:
    one = TrainLoader(
        augmented(shapes_root),
        batch_size=processes * batch_size,
        workers=0,
        seed=7,
        **options,
    )
    several = []
    for rank in range(processes):
        as_process(rank, processes)
        several.append(TrainLoader(augmented(shapes_root), batch_size=batch_size, workers=0, seed=7, **options))
    assert {len(loader) for loader in several} == {len(one)} == {24 // (processes * batch_size)}
    for epoch, start in ((0, 0), (3, 1)):
        whole = list(one.epoch(epoch, start))
        parts = [list(loader.epoch(epoch, start)) for loader in several]
        for batch, *of_batch in zip(whole, *parts, strict=True):
            assert [len(images) for images, _ in of_batch] == [batch_size] * processes
            assert_same_images(images_of([batch]), [image for part in of_batch for image in images_of([part])])


@pytest.mark.parametrize("seed", [20261126115307, 2**63, 2**64 - 1])
def test_any_seed_of_64_bits_gives_an_order_of_its_own(shapes_root: Path, seed: int) -> None:
    dataset = shapes_set(shapes_root, transforms=RECIPE, seed=seed)

    def order(seed: int, epoch: int) -> list[int]:
        loader = TrainLoader(dataset, batch_size=6, workers=0, seed=seed)
        return [target.image_id for _, targets in loader.epoch(epoch) for target in targets]

    assert sorted(order(seed, 0)) == sorted(order(seed - 1, 0)) and order(seed, 0) == order(seed, 0)
    assert len({tuple(order(*place)) for place in ((seed, 0), (seed, 1), (seed - 1, 0))}) == 3


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (3, 1), (9, 0), (9, 1)])
def test_processes_evaluate_each_image_once_among_them(
    shapes_root: Path, as_process: Callable[[int, int], None], processes: int, workers: int
) -> None:
    dataset = shapes_set(shapes_root, "val")
    everything = images_of(evaluation_loader(dataset, batch_size=2, workers=0))
    parts = []
    for rank in range(processes):
        as_process(rank, processes)
        parts.append(images_of(evaluation_loader(dataset, batch_size=2, workers=workers)))
    batches = [everything[start : start + 2] for start in range(0, 7, 2)]
    for rank, part in enumerate(parts):
        assert_same_images(part, [image for batch in batches[rank::processes] for image in batch])


def test_too_few_images_for_all_processes(shapes_root: Path, as_process: Callable[[int, int], None]) -> None:
    as_process(1, 5)
    with pytest.raises(UserError, match=r"has 24 images, too few for one batch of 5 in each of 5 processes\. Lower"):
        TrainLoader(augmented(shapes_root), batch_size=5, workers=0, seed=7)


# Groups and padding


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_groups_of_similar_images_save_padding_and_are_still_shuffled(batch_size: int) -> None:
    dataset = sizes_like_photographs(1009)

    def loader(**options: Any) -> TrainLoader:
        return TrainLoader(dataset, batch_size=batch_size, workers=0, seed=3, **options)  # type: ignore[arg-type]

    def waste(batches: list[Any]) -> float:
        """Share of padding in the pixels of all batches, from the sizes alone."""
        used = padded = 0
        for _, targets in batches:
            heights, widths = zip(*(target.original_size for target in targets), strict=True)
            used += sum(map(math.prod, zip(heights, widths, strict=True)))
            padded += len(targets) * max(heights) * max(widths)
        return 1 - used / padded

    plain, grouped = list(loader().epoch(2)), list(loader(group_by_aspect=True).epoch(2))
    assert len(plain) == len(grouped) == 1009 // batch_size
    assert waste(grouped) < 0.5 * waste(plain)
    ids = ids_of(grouped)
    flat = [image for batch in ids for image in batch]
    assert len(set(flat)) == len(flat) == 1009 // batch_size * batch_size
    assert set(flat) == {image for batch in ids_of(plain) for image in batch}, "no shape is left out more often"
    assert ids_of(loader(group_by_aspect=True).epoch(2)) == ids
    assert ids_of(loader(group_by_aspect=True).epoch(2, start=77)) == ids[77:]
    again = {frozenset(batch) for batch in ids} & {frozenset(b) for b in ids_of(loader(group_by_aspect=True).epoch(3))}
    assert len(again) < 0.02 * len(ids), "the next epoch has other batches"
    aspects = [targets[0].original_size[1] / targets[0].original_size[0] for _, targets in grouped]
    rises = sum(a < b for a, b in itertools.pairwise(aspects))
    falls = sum(a > b for a, b in itertools.pairwise(aspects))
    assert 0.7 < rises / falls < 1.4, "narrow and wide batches come in any order"


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_padded_to_a_multiple(shapes_root: Path, workers: int) -> None:
    options = {"batch_size": 5, "workers": workers, "seed": 7}
    plain = list(TrainLoader(augmented(shapes_root), **options).epoch(1))
    padded = list(TrainLoader(augmented(shapes_root), pad_to=32, **options).epoch(1))
    assert_same_images(images_of(plain), images_of(padded))
    for (before, _), (after, _) in zip(plain, padded, strict=True):
        height, width = (math.ceil(extent / 32) * 32 for extent in before.images.shape[2:])
        assert after.images.shape == (5, 3, height, width) and after.mask.shape == (5, height, width)
        assert after.padded == bool(after.mask.any())
        assert not after.images.masked_fill(~after.mask.unsqueeze(1), 0).any()
    dataset = shapes_set(shapes_root, "val", transforms.evaluation(size=48, max_size=48))
    shapes = {
        batch.images.shape[2:] for batch, _ in evaluation_loader(dataset, batch_size=2, workers=workers, pad_to=37)
    }
    assert shapes == {(74, 74)}


@dataclass(frozen=True)
class MarkedTarget(Target):
    """A target with one more thing to know of each object, as a mask head would want."""

    masks: torch.Tensor
    visible: torch.Tensor | None = None


class Marked(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        count = (index * 3) % 5  # 0, 3, 1, 4, 2
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, 11, 13 + index), generator=generator).to(torch.uint8)
        target = MarkedTarget(
            labels=torch.randint(7, (count,), generator=generator),
            boxes=torch.rand(count, 4, generator=generator),
            image_id=index,
            original_size=(11, 13),
            masks=torch.rand(count, 11, 13 + index, generator=generator) > 0.5,
        )
        return image, target


def test_more_workers_than_cores_are_no_matter_for_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    workers = 2 * (os.cpu_count() or 1)
    assert len(list(BatchLoader(Marked(), workers=workers, pad_to=1, batch_size=1))) == 5
    assert not [str(warning.message) for warning in recwarn if "worker" in str(warning.message)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_tensor_of_a_target_comes_from_a_worker(batch_size: int) -> None:
    loaders = [BatchLoader(Marked(), workers=workers, pad_to=1, batch_size=batch_size) for workers in (0, 2)]
    for (batch, targets), (same, same_targets) in zip(*loaders, strict=True):
        assert torch.equal(batch.images, same.images) and same.images.stride() == batch.images.stride()
        for a, b in zip(targets, same_targets, strict=True):
            assert isinstance(b, MarkedTarget) and (a.image_id, a.visible) == (b.image_id, b.visible)
            assert [t.dtype for t in a.tensors().values()] == [t.dtype for t in b.tensors().values()]
            assert all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in ("labels", "boxes", "masks"))
        memory = {
            t.untyped_storage().data_ptr() for target in same_targets for t in target.tensors().values() if len(t)
        }
        assert len(memory) <= 1, "each piece of memory is an open file"


# Images that cannot be read


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_an_unreadable_one(
    damaged: DetectionDataset, shapes_root: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    sound = augmented(shapes_root)
    next_of = {3: 5, 4: 5, 11: 12, 23: 0}
    loaders = [
        TrainLoader(dataset, batch_size=6, workers=count, seed=7) for dataset, count in ((sound, 0), (damaged, workers))
    ]
    for epoch in range(2):
        wanted, found = (ids_of(loader.epoch(epoch)) for loader in loaders)
        index_of = {record.id: index for index, record in enumerate(sound.records)}
        replaced = [[next_of.get(index_of[image], index_of[image]) for image in batch] for batch in wanted]
        assert [[index_of[image] for image in batch] for batch in found] == replaced
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        message = caplog.records[0].getMessage()
        names = ", ".join(sound.records[index].file_name for index in next_of)
        assert f"4 images in {damaged.folder} could not be read and were skipped: {names}. Replace them" in message
        caplog.clear()


def test_many_unreadable_images_are_counted_and_a_few_named(
    damaged: DetectionDataset, caplog: pytest.LogCaptureFixture
) -> None:
    for path in list(damaged.folder.iterdir())[:15]:
        path.write_bytes(b"")
    batches = TrainLoader(damaged, batch_size=2, workers=1, seed=7).epoch(0)
    next(batches)
    assert not caplog.records
    del batches  # a training that ends within an epoch
    (record,) = caplog.records
    assert "images in" in record.getMessage() and record.getMessage().count(".jpg") <= 5


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_at_all_ends_the_training(damaged: DetectionDataset, workers: int) -> None:
    for path in damaged.folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"Not one of the 24 images in \S*train can be read.*\.jpg cannot be read"):
        list(TrainLoader(damaged, batch_size=2, workers=workers, seed=7).epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_evaluation_and_by_default_training(damaged: DetectionDataset, workers: int) -> None:
    (damaged.folder / damaged.records[11].file_name).write_bytes(b"")  # one that is not there is found before
    dataset = coco_set(damaged.folder, damaged.source, transforms.evaluation(size=48, max_size=48))
    with pytest.raises(
        UserError, match=r"000003\.jpg cannot be read.*Replace it, or remove it from the annotations\.$"
    ):
        list(evaluation_loader(dataset, batch_size=2, workers=workers))
    with pytest.raises(UserError, match=r"0000\d\d\.jpg cannot be read.*Replace it.*data\.unreadable=skip"):
        list(TrainLoader(dataset, batch_size=2, workers=workers, seed=7).epoch(0))


def test_an_unknown_way_with_unreadable_images_is_refused(shapes_root: Path) -> None:
    with pytest.raises(UserError, match=refusal("data.unreadable=ignore")):
        shapes_set(shapes_root, "val", unreadable="ignore")


def test_a_training_goes_on_exactly_where_it_was_with_everything_on(
    damaged: DetectionDataset, as_process: Callable[[int, int], None]
) -> None:
    as_process(1, 2)
    options = {"batch_size": 3, "seed": 7, "group_by_aspect": True, "pad_to": 32}
    whole = list(TrainLoader(damaged, workers=0, **options).epoch(4))
    rest = TrainLoader(damaged, workers=2, **options).epoch(4, start=2)
    for (batch, targets), (same, same_targets) in zip(whole[2:], rest, strict=True):
        assert torch.equal(batch.images, same.images) and torch.equal(batch.mask, same.mask)
        assert_same_images(images_of([(batch, targets)]), images_of([(same, same_targets)]))


# Workers that are lost


@pytest.mark.parametrize(("evaluated", "number"), [(False, signal.SIGKILL), (True, signal.SIGBUS)])
def test_a_killed_worker_is_told_at_the_next_batch(shapes_root: Path, evaluated: bool, number: int) -> None:
    dataset = augmented(shapes_root)
    before = set(multiprocessing.active_children())
    if evaluated:
        batches = iter(evaluation_loader(dataset, batch_size=1, workers=2))
    else:
        batches = TrainLoader(dataset, batch_size=1, workers=2, seed=7).epoch(0)
    next(batches)
    worker = (set(multiprocessing.active_children()) - before).pop()
    os.kill(worker.pid, number)
    time.sleep(1)  # a step of the training: nothing is raised here, where it could do damage
    with pytest.raises(UserError, match=r"process that loads images died.*--shm-size.*Lower data\.workers"):
        list(batches)


def test_a_worker_killed_between_two_epochs(shapes_root: Path) -> None:
    before = set(multiprocessing.active_children())
    loader = TrainLoader(augmented(shapes_root), batch_size=4, workers=1, seed=7)
    list(loader.epoch(0))
    os.kill((set(multiprocessing.active_children()) - before).pop().pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"process that loads images died"):
        list(loader.epoch(1))


TOO_LITTLE = """
import subprocess
import sys
from datasets import DetectionDataset, TrainLoader, transforms
from datasets.formats.coco import read_coco
root = sys.argv[1]
recipe = transforms.evaluation(size=600, max_size=600)
annotations = read_coco(images=f"{root}/train", annotations=f"{root}/instances_train.json")
for size in ("1m,ro", "4k", "1m"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
    for workers in (0, 1):
        try:
            dataset = DetectionDataset(annotations, recipe, unreadable="skip")
            print(len(list(TrainLoader(dataset, batch_size=4, workers=workers, seed=0).epoch(0))))
        except ValueError as error:
            print(error)
"""


def test_too_little_shared_memory_is_reported(shapes_root: Path) -> None:
    namespace, mount = with_small_disk("/dev/shm", "1m")
    command = f'{mount} && exec "$0" -c "$1" "$2"'
    arguments = [sys.executable, TOO_LITTLE, str(shapes_root)]
    done = subprocess.run(
        [*namespace, command, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = iter(done.stdout.splitlines())
    for state in ("cannot be used", "is full", "is full"):
        assert next(lines) == "6", "without processes no shared memory is needed"
        message = next(lines)
        assert message.startswith(f"Shared memory {state}: "), message
        assert "--shm-size" in message and "data.workers=0" in message


class WithoutFiles(Marked):
    """Its workers may open no further files, as where `ulimit -n` is low: they can send no batch."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return super().__getitem__(index)


def test_a_batch_that_cannot_be_sent_is_reported() -> None:
    loader = BatchLoader(WithoutFiles(), workers=2, pad_to=1, batch_size=1)
    with pytest.raises(UserError, match=r"too many files.*ulimit -n.*ower data\.workers"):
        list(loader)


class EndsInAThread(Marked):
    """Its workers end as where a thread of theirs can take no connection."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        sys.excepthook(OSError, OSError("Too many open files"), None)
        return super().__getitem__(index)


def test_a_worker_whose_thread_fails_is_reported() -> None:
    with pytest.raises(UserError, match="A process that loads images died"):
        list(BatchLoader(EndsInAThread(), workers=1, pad_to=1, batch_size=1))


def test_data_that_differ_have_another_fingerprint(shapes_root: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> set[str]:
        root = tmp_path / name
        shutil.copytree(shapes_root, root)
        path = root / "instances_train.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        found = shapes_set(root).fingerprint()
        return {part for part, value in found.items() if value != whole[part]}

    whole = shapes_set(shapes_root).fingerprint()
    assert changed("same", lambda content: None) == set()
    assert changed("order", lambda content: content["images"].reverse()) >= {"names or order of images"}
    assert changed("box", lambda content: content["annotations"][0]["bbox"].reverse()) == {"boxes or labels"}
    assert changed("fewer", lambda content: content["annotations"].pop()) == {"boxes or labels"}
    assert changed("class", lambda content: content["categories"][0].update(name="disc")) == {"categories"}

    (tmp_path / "same" / "train" / "000003.jpg").write_bytes(b"another image")
    other = shapes_set(tmp_path / "same").fingerprint()
    assert {part for part, value in other.items() if value != whole[part]} == {"image files"}
