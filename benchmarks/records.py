"""Time and memory of a data set of COCO's size, before its first batch and in the processes that load images."""

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import in_new_process
from benchmarks.results import Row
from datasets import DetectionDataset
from datasets.formats.coco import read_coco
from detr.memory import peak_memory

IMAGES, BOXES, CATEGORIES = 118_000, 860_000, 80
WORKERS = 2
PHOTOGRAPHS = 8  # that differ; each file is one of them with a few bytes behind its end


def run(*, images: int = IMAGES, boxes: int = BOXES) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        generate(root, images, boxes)
        case = f"{images:,} images with {boxes:,} boxes"
        seconds, held, peak, own = in_new_process(_loaded, root)
        yield Row(case, "read and checked", "s", seconds)
        yield Row(case, "read and checked", "GiB held", held)
        yield Row(case, "read and checked", "GiB at most", peak)
        yield Row(case, "after every record was used: each worker", "MiB of its own", own)


def generate(root: Path, images: int, boxes: int, seed: int = 0) -> None:
    """A training set in COCO's format: instances_train.json, and train/ with a small JPEG file for each image."""
    rng, folder = random.Random(seed), root / "train"
    folder.mkdir(parents=True)
    contents = []
    for number in range(PHOTOGRAPHS):
        pixels = torch.rand((6, 8, 3), generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(root / "one.jpg", quality=50)
        contents.append((root / "one.jpg").read_bytes())
    (root / "one.jpg").unlink()
    listed = []
    for key in range(images):
        file = f"{key:012d}.jpg"
        (folder / file).write_bytes(contents[key % PHOTOGRAPHS] + f"{key:012d}".encode())
        listed.append({"id": key, "file_name": file, "width": 640, "height": 480})
    rows = []
    for key in range(boxes):
        width, height = round(rng.uniform(5, 320), 2), round(rng.uniform(5, 240), 2)
        box = [round(rng.uniform(0, 640 - width), 2), round(rng.uniform(0, 480 - height), 2), width, height]
        row = {"id": key, "image_id": rng.randrange(images), "category_id": 1 + rng.randrange(CATEGORIES)}
        rows.append({**row, "bbox": box, "area": width * height / 2, "iscrowd": 0})
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)]
    content = {"images": listed, "annotations": rows, "categories": categories}
    (root / "instances_train.json").write_text(json.dumps(content))


class _Touched(Dataset[tuple[int, int] | None]):
    """What a worker does with a record, but for its image; and how much memory the worker has for itself alone."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int] | None:
        record = self.dataset.records[index]
        record.select(~record.crowds)
        return (os.getpid(), _own()) if index % 1000 == 0 else None


def _loaded(root: Path) -> tuple[float, float, float, float]:
    """Seconds, GiB of this process afterwards and at most, and MiB that a worker copies while it uses all records."""
    began = time.perf_counter()
    dataset = DetectionDataset(read_coco(images=root / "train", annotations=root / "instances_train.json"))
    seconds, held, peak = time.perf_counter() - began, _held() / 2**30, peak_memory() / 2**30
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    options = {"batch_size": 1000, "num_workers": WORKERS, "collate_fn": list}
    for batch in DataLoader(_Touched(dataset), multiprocessing_context="fork", **options):
        process, own = batch[0]
        first.setdefault(process, own)
        last[process] = own
    return seconds, held, peak, sum(last[key] - first[key] for key in last) / len(last) / 2**20


def _own() -> int:
    """Bytes that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def _held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
