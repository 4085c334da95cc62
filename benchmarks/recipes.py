"""A whole training step with each recipe: ResNet-50, two images of up to 512x640 with 7 objects each."""

from collections.abc import Iterator

import torch

from benchmarks.measure import in_new_process
from benchmarks.results import Row
from benchmarks.step import training_step
from detr.memory import peak_memory
from tools.timing import medians

RECIPES = ("detr", "conditional_detr", "dab_detr", "dn_detr", "deformable_detr", "dino")


def run(*, device: str, threads: int, repeats: int) -> Iterator[Row]:
    for name in RECIPES:
        seconds, memory = in_new_process(_measure, name, device, threads, repeats)
        yield Row(name, "training step", "s", seconds)
        yield Row(name, "peak memory", "GiB", memory)


def _measure(name: str, device: str, threads: int, repeats: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    return medians({name: training_step(name, device)}, repeats)[name], peak_memory() / 2**30
