"""What a model costs: parameters, operations, time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from detr.config import build_stored_model
from detr.types import ImageBatch
from tools.comparison.runs import Group, Run
from tools.counts import count_flops, count_parameters
from tools.timing import medians

_SECONDS = 60.0  # to spend on measuring time


@dataclass(frozen=True)
class Cost:
    """parameters: all of them. flops, milliseconds: of one image, `pixels` wide and high.

    milliseconds: the median of `repeats` measurements.
    """

    pixels: int
    parameters: int
    flops: int
    milliseconds: float
    repeats: int


def measure(groups: Sequence[Group], packages: Sequence[str] = ()) -> list[Cost]:
    """Each group's model, built anew with random weights, on the CPU. Models that are the same are measured once.

    packages: those that models may be built from, beside detr.models.
    """
    keys = [_key(group.runs[0]) for group in groups]
    models = {key: _build(group.runs[0], packages) for key, group in dict(zip(keys, groups, strict=True)).items()}
    sizes = {key: group.runs[0].size for key, group in zip(keys, groups, strict=True)}
    calls: dict[str, Callable[[], object]] = {key: partial(_run, models[key], sizes[key]) for key in models}
    once = sum(medians(calls, repeats=1).values())
    repeats = round(min(max(_SECONDS / once, 7), 101))
    seconds = medians(calls, repeats)
    costs = {
        key: Cost(
            pixels=sizes[key],
            parameters=count_parameters(models[key]),
            flops=count_flops(calls[key]),
            milliseconds=1000 * seconds[key],
            repeats=repeats,
        )
        for key in models
    }
    return [costs[key] for key in keys]


def _key(run: Run) -> str:
    return json.dumps([run.config["model"], run.size, run.num_classes])


def _build(run: Run, packages: Sequence[str]) -> nn.Module:
    model = build_stored_model(run.config["model"], run.num_classes, run.folder / "config.yaml", packages)
    # Without gradients everywhere: the counter does not cope with parameters under no_grad.
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _run(model: nn.Module, pixels: int) -> None:
    images = torch.randn(1, 3, pixels, pixels)
    model(ImageBatch(images=images, mask=torch.zeros(1, pixels, pixels, dtype=torch.bool), padded=False))
