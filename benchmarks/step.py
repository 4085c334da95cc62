"""A whole training step: ResNet-50, images with 7 objects each, forward to optimizer."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor

from benchmarks.measure import in_new_process
from benchmarks.published import load
from benchmarks.results import Row
from detr.config import build, build_criterion, build_model, compose
from detr.engine import TrainerConfig, TrainingStep, accelerated
from detr.images import pad_to_batch
from detr.memory import peak_memory
from detr.models.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from detr.types import ImageBatch, Target
from tools.counts import count_flops
from tools.timing import medians

CLASSES, OBJECTS = 91, 7
SIZE, BATCH = (512, 640), 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = {"compile": {"compile": True}, "checkpoint": {"activation_checkpointing": True}}

Step = Callable[[], object]


def run(
    *,
    checkout: Path | None,
    device: str,
    threads: int,
    repeats: int,
    modes: Sequence[str] = ("fp32",),
    size: tuple[int, int] = SIZE,
    batch: int = BATCH,
) -> Iterator[Row]:
    """modes: a precision each, with options after plus signs: bf16+compile. size: height and width of the images."""
    makers = {mode: partial(training_step, "detr", device, mode, size, batch) for mode in modes}
    everything: dict[str, Callable[[], Step]] = {**makers}
    if checkout is not None:
        everything["published"] = partial(_published_step, checkout, device, size, batch)
    seconds = medians({name: make() for name, make in everything.items()}, repeats)
    memory = {name: in_new_process(_memory, make, threads) for name, make in everything.items()}
    speed = {name: batch / value for name, value in seconds.items()}
    operations = count_flops(training_step("detr", device, "fp32", size, batch))
    for mode in modes:
        case = f"{batch} images of {size[0]}x{size[1]}, {mode}"
        other = speed.get("published")
        yield Row(case, "speed", "images/s", speed[mode], other, other, more_is_better=True)
        yield Row(case, "peak memory", "GiB", memory[mode], published=memory.get("published"))
        share = operations / seconds[mode] / _matrix_rate(device, DTYPES[mode.partition("+")[0]])
        yield Row(case, "operations a second", "% of those of one large product", 100 * share)


def _memory(make: Callable[[], Step], threads: int) -> float:
    torch.set_num_threads(threads)
    step = make()
    for _ in range(3):
        step()
    return peak_memory() / 2**30


def _matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the product of two matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / medians({"": lambda: a @ b}, repeats=5)[""]


def trainer_config(mode: str) -> TrainerConfig:
    """Raises ValueError where a mode is not of those that `run` takes."""
    precision, *options = mode.split("+")
    if precision not in DTYPES or not OPTIONS.keys() >= set(options):
        raise ValueError(f"'{mode}' is not one of {', '.join(DTYPES)}, with any of +{', +'.join(OPTIONS)}.")
    return TrainerConfig(precision=precision, **{k: v for name in options for k, v in OPTIONS[name].items()})


def training_step(
    model_name: str, device: str, mode: str = "fp32", size: tuple[int, int] = SIZE, batch: int = BATCH
) -> Step:
    """A training step with the model of configs/model/{model_name}.yaml, as train.py does it."""
    torch.manual_seed(0)
    trainer = trainer_config(mode)
    config = compose([f"model={model_name}", "model.backbone.weights=null"])
    model = accelerated(build_model(config.model, num_classes=CLASSES).to(device), trainer)
    step = TrainingStep(
        model=model.train(),
        criterion=build_criterion(config.criterion, num_classes=CLASSES).to(device),
        optimizer=build(config.optimizer, path="optimizer", model=model),
        config=trainer,
        seed=0,
    )
    return partial(step, [random_batch(size, batch)], 0)


def _published_step(checkout: Path, device: str, size: tuple[int, int], count: int) -> Step:
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
    batch, targets = random_batch(size, count)
    batch = batch.normalized(IMAGENET_MEAN, IMAGENET_STD)
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


def random_batch(size: tuple[int, int], count: int) -> tuple[ImageBatch, list[Target]]:
    """Every second image is padded, as nearly all batches of real data are."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(size[0] - index % 2 * size[0] // 16, size[1]) for index in range(count)]
    images = [torch.randint(256, (3, *of_image), dtype=torch.uint8, generator=generator) for of_image in sizes]

    def target(image: int) -> Target:
        boxes: Tensor = 0.3 + 0.3 * torch.rand((OBJECTS, 4), generator=generator)
        labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        return Target(labels=labels, boxes=boxes, image_id=image, original_size=sizes[image])

    return pad_to_batch(images), [target(image) for image in range(count)]
