"""A whole training step: ResNet-50, two images of up to 512x640 with 7 objects each, forward to optimiser."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor

from benchmarks.measure import Row, in_new_process, medians, peak_memory
from benchmarks.published import load
from detr.config import build, build_criterion, build_model, compose
from detr.engine import TrainerConfig, TrainingStep
from detr.images import pad_to_batch
from detr.types import ImageBatch, Target

CLASSES, OBJECTS = 91, 7
SIZES = ((512, 640), (480, 640))  # the second is padded, as nearly all batches of real data are
ELSEWHERE = 3.57  # seconds of the published code on another machine

Step = Callable[[], object]


def run(*, checkout: Path | None, device: str, threads: int, repeats: int) -> Iterator[Row]:
    makers: dict[str, Callable[[], Step]] = {
        "channels_last": partial(training_step, "detr", device, torch.channels_last),
        "contiguous": partial(training_step, "detr", device, torch.contiguous_format),
    }
    if checkout is not None:
        makers["published"] = partial(_published_step, checkout, device)
    seconds = medians({name: make() for name, make in makers.items()}, repeats)
    memory = {name: in_new_process(_memory, make, device, threads) for name, make in makers.items()}
    elsewhere = ELSEWHERE if device == "cpu" else None
    for layout in ("channels_last", "contiguous"):
        # train.py uses channels_last, so that is what must be no slower.
        target = seconds.get("published") if layout == "channels_last" else None
        yield Row(f"training step, {layout}", "s", seconds[layout], target, seconds.get("published"), elsewhere)
    for layout in ("channels_last", "contiguous"):
        yield Row(f"training step, {layout}, peak memory", "GiB", memory[layout], published=memory.get("published"))


def _memory(make: Callable[[], Step], device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    step = make()
    for _ in range(3):
        step()
    return peak_memory(device)


def training_step(model_name: str, device: str, layout: torch.memory_format = torch.channels_last) -> Step:
    """A training step with the model of configs/model/{model_name}.yaml."""
    torch.manual_seed(0)
    config = compose([f"model={model_name}", "model.backbone.weights=null"])
    model = build_model(config.model, num_classes=CLASSES).to(device, memory_format=layout)
    batch, targets = _batch()
    batch = replace(batch, images=batch.images.contiguous(memory_format=layout))
    step = TrainingStep(
        model=model.train(),
        criterion=build_criterion(config.criterion, num_classes=CLASSES).to(device),
        optimizer=build(config.optimizer, path="optimizer", model=model),
        config=TrainerConfig(),
        seed=0,
    )
    return partial(step, [(batch, targets)], 0)


def _published_step(checkout: Path, device: str) -> Step:
    """One epoch of its own training loop, over a loader with one batch."""
    torch.manual_seed(0)
    main, engine, misc = load(checkout, "main", "engine", "util.misc")
    options = main.get_args_parser().parse_args(["--device", device])
    with mock.patch.object(torchvision.models, "resnet50", _untrained_resnet50):
        model, criterion, _ = main.build_model(options)
    model.to(device)
    backbone = [p for name, p in model.named_parameters() if "backbone" in name and p.requires_grad]
    others = [p for name, p in model.named_parameters() if "backbone" not in name]
    groups = [{"params": others}, {"params": backbone, "lr": options.lr_backbone}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
    batch, targets = _batch()
    batch = batch.normalized()
    samples = misc.NestedTensor(batch.images.contiguous(), batch.mask)
    objects = [{"labels": target.labels, "boxes": target.boxes} for target in targets]

    def step() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            engine.train_one_epoch(
                model, criterion, [(samples, objects)], optimizer, torch.device(device), 0, options.clip_max_norm
            )

    return step


_resnet50 = torchvision.models.resnet50


def _untrained_resnet50(*, pretrained: bool, **options: Any) -> torch.nn.Module:
    """The published code always asks for pre-trained weights, which would be downloaded."""
    return _resnet50(weights=None, **options)


def _batch() -> tuple[ImageBatch, list[Target]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]

    def target(image: int) -> Target:
        boxes: Tensor = 0.3 + 0.3 * torch.rand((OBJECTS, 4), generator=generator)
        labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        return Target(labels=labels, boxes=boxes, image_id=image, original_size=SIZES[image])

    return pad_to_batch(images), [target(image) for image in range(len(SIZES))]
