"""How long a training waits for its batches, what mixing takes, and how much of the batches is padding."""

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.measure import threads
from benchmarks.results import Row
from benchmarks.transforms import photographs, reader
from datasets import DetectionDataset, TrainLoader
from datasets.formats.coco import read_coco
from datasets.loader import ShuffledBatches
from detr.config import build, compose
from tools.timing import medians

BATCH, BATCHES, STEP = 4, 10, 0.2  # seconds that a GPU would take for a step, in which the CPU is free
# Widths and heights of COCO's photographs, each with its share of 64 that were looked at, in percent.
COCO_SIZES = {
    (640, 480): 25, (640, 427): 19, (640, 425): 9, (480, 640): 7, (640, 488): 7, (427, 640): 5, (500, 375): 5,
    (581, 640): 5, (640, 640): 3, (640, 416): 3, (520, 640): 3, (640, 573): 2, (381, 500): 2, (600, 500): 2,
    (640, 218): 2, (352, 230): 1,
}  # fmt: skip
IMAGES = 4000
REPEATS = 5
# Further options of squares of 640 pixels. Mixing happens in every sample.
MIXED = {
    "single images": (),
    "mosaics": ("data/mixing=mosaic", "data.mixing.parts.mosaic.probability=1.0"),
    "mixup": ("data/mixing=mixup", "data.mixing.parts.mixup.probability=1.0"),
    "copy-blend": ("data/mixing=copy_blend", "data.mixing.parts.copy_blend.probability=1.0"),
    "mosaics half the time, then mixup half the time": ("data/mixing=[mosaic,mixup]",),
    "zoom-out and crop": ("data.transforms.zoom_out=0.5", "data.transforms.iou_crop=0.8"),
    "photometric distortion": ("data.transforms.photometric_distortion=0.5",),
}


def run(*, folder: Path | None = None, annotations: Path | None = None) -> Iterator[Row]:
    """folder, annotations: photographs to use, those of a COCO data set; generated ones, of one size, by default."""
    recipe = build(compose(["data=custom"]).data.transforms, path="data.transforms")
    with tempfile.TemporaryDirectory() as temporary, threads(1):
        images, chosen = photographs(Path(temporary), folder, annotations)
        for workers in (0, 1, 2):
            dataset = DetectionDataset(read_coco(images=images, annotations=chosen), recipe)
            speed, waiting = _train(TrainLoader(dataset, batch_size=BATCH, workers=workers, seed=0))
            case = f"{workers} worker{'s' * (workers != 1)}, {STEP * 1000:.0f} ms a step of {BATCH} images"
            yield Row(case, "speed", "images/s", speed, more_is_better=True)
            yield Row(case, "waiting", "% of the time", 100 * waiting)
        yield from _mixing(images, chosen)

    sizes: Mapping[tuple[int, int], int] = COCO_SIZES
    if annotations is not None:
        listed = json.loads(annotations.read_bytes())["images"]
        sizes = Counter((image["width"], image["height"]) for image in listed)
    drawn = random.Random(0).choices(list(sizes), list(sizes.values()), k=IMAGES)
    for batch_size in (2, 8, 16):
        waste = {
            grouped: 100 * _padding(drawn, ShuffledBatches(IMAGES, batch_size, 0, aspects), recipe)
            for grouped, aspects in (("as drawn", None), ("grouped", [width / height for width, height in drawn]))
        }
        for grouped, share in waste.items():
            yield Row(f"batches of {batch_size}", f"padding, {grouped}", "% of the pixels", share)


def _mixing(images: Path, annotations: Path) -> Iterator[Row]:
    """Samples a second of one process, as one worker of the loader makes them, and how many times longer each takes."""
    calls = {}
    for name, options in MIXED.items():
        squares = ("data.size=640", "data.square=true", "data.transforms.sizes=[640]", "data.transforms.crop=false")
        data = compose(["data=custom", *squares, *options]).data
        parts = {part: build(data[part], path=f"data.{part}") for part in ("transforms", "mixing")}
        dataset = DetectionDataset(read_coco(images=images, annotations=annotations), **parts)
        calls[name] = reader(dataset)
    seconds = medians(calls, REPEATS)
    for name, taken in seconds.items():
        yield Row(name, "speed of one process", "samples/s", len(dataset) / taken, more_is_better=True)
        yield Row(name, "time", "of single images", taken / seconds["single images"])


def _train(loader: TrainLoader) -> tuple[float, float]:
    """Images a second, and the share of the time that a training with steps of fixed length waits for batches."""
    batches = (batch for epoch in range(BATCHES) for batch in loader.epoch(epoch))
    next(batches)  # the workers have started
    began, waited = time.perf_counter(), 0.0
    for _ in range(BATCHES):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(STEP)
    seconds = time.perf_counter() - began
    return BATCHES * BATCH / seconds, waited / seconds


def _padding(sizes: Sequence[tuple[int, int]], batches: ShuffledBatches, recipe: v2.Transform) -> float:
    """Share of padding in the pixels of an epoch's batches after augmentation, which needs the sizes alone."""
    torch.manual_seed(0)
    used = total = 0
    for batch in batches:
        canvases = []
        for _, index, _ in batch:
            width, height = sizes[index]
            no_boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(height, width))
            canvases.append(recipe(no_boxes).canvas_size)
        used += sum(height * width for height, width in canvases)
        heights, widths = zip(*canvases, strict=True)
        total += len(batch) * max(heights) * max(widths)
    return 1 - used / total
