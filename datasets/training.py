"""The data of a training, from its options."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import transforms
from datasets.coco import CocoDetection
from datasets.loader import TrainLoader, evaluation_loader
from datasets.workers import Batch
from detr.types import Category


@dataclass(frozen=True)
class TrainingData:
    """Batches to train on; batches to validate on, with their annotations; the classes of both."""

    train: TrainLoader
    val: Iterable[Batch]
    annotations: dict[str, Any]
    categories: list[Category]


def training_data(
    options: Mapping[str, Any], augmentation: Callable[..., Any], *, seed: int, epochs: Callable[[int], int]
) -> TrainingData:
    """What the `data` options describe.

    augmentation: of training images. epochs: how many the training has, from the number of batches in one.
    """
    recipe, resized = options["transforms"] or {}, {name: options[name] for name in ("size", "max_size")}
    batches = {name: options[name] for name in ("batch_size", "workers", "pad_to")}
    train = CocoDetection(**options["train"], transforms=augmentation, seed=seed, unreadable=options["unreadable"])
    val = CocoDetection(**options["val"], transforms=transforms.evaluation(**resized), categories=train.categories)
    loader = TrainLoader(train, **batches, seed=seed, group_by_aspect=options["group_by_aspect"])
    plain = transforms.without_augmentation(recipe, **resized)
    loader.switch_transforms(plain, after=options["plain_after"], epochs=epochs(len(loader)))
    return TrainingData(loader, evaluation_loader(val, **batches), val.ground_truth(), train.categories)
