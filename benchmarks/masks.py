"""Memory and time of evaluating masks: 500 images of 1333 x 800 pixels, with 100 masks each."""

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.measure import in_new_process
from benchmarks.results import Row
from detr.evaluation import CocoResults
from detr.memory import peak_memory
from detr.postprocess import postprocess
from detr.types import Category, Predictions

IMAGES, QUERIES, CLASSES = 500, 100, 80
SIZE, ORIGINAL = (800, 1333), (480, 800)


def run(*, images: int = IMAGES) -> Iterator[Row]:
    before, peak, seconds, encoded = in_new_process(_evaluated, images)
    dense = images * QUERIES * ORIGINAL[0] * ORIGINAL[1] / 2**30
    case = f"{images} images of 1333 x 800, {QUERIES} masks each"
    yield Row(case, "before the first one", "GiB at most", before)
    yield Row(case, f"masks as pixels would add {dense:.0f}", "GiB at most", peak)
    yield Row(case, "of these all encoded masks", "GiB", encoded)
    yield Row(case, "from logits to results", "s an image", seconds)


def _evaluated(images: int) -> tuple[float, float, float, float]:
    """GiB at most before and afterwards, seconds an image, and GiB of what is kept."""
    names = [str(number) for number in range(CLASSES)]
    categories = [Category(id=number, name=name) for number, name in enumerate(names)]
    generator = torch.Generator().manual_seed(0)
    predictions = _predictions(generator)
    before, began = peak_memory() / 2**30, time.perf_counter()
    results = []
    for image in range(images):
        found = postprocess(predictions, [ORIGINAL], names, QUERIES, sizes=[SIZE])
        results.append(CocoResults.from_detections(found[0], image, categories))
    everything = CocoResults.concatenate(results)
    seconds = (time.perf_counter() - began) / images
    assert everything.masks is not None and len(everything) == images * QUERIES
    return before, peak_memory() / 2**30, seconds, sum(len(mask["counts"]) for mask in everything.masks) / 2**30


def _predictions(generator: torch.Generator) -> Predictions:
    """Blobs of all sizes, at the stride of masks."""
    height, width = (-(-side // 4) for side in SIZE)
    coarse = torch.randn(1, QUERIES, 7, 11, generator=generator)
    return Predictions(
        logits=torch.randn(1, 1, QUERIES, CLASSES + 1, generator=generator),
        boxes=torch.rand(1, 1, QUERIES, 4, generator=generator),
        masks=F.interpolate(coarse, size=(height, width), mode="bicubic")[None],
        mask_size=SIZE,
    )
