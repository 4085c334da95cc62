"""Train a detector: python train.py experiment=NAME key=value ..."""

from detr.cli.help import answer_help

if __name__ == "__main__":
    answer_help("train")

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig

from datasets import (
    Augmentation,
    DetectionDataset,
    Recipe,
    TrainLoader,
    before_training,
    evaluation_loader,
    hold_out,
    transforms,
)
from datasets.formats import Annotations
from detr import distributed
from detr.cli.command import command
from detr.cli.devices import pick_device
from detr.cli.run_folder import run_directory
from detr.config import build, build_criterion, build_model, build_reader, plain
from detr.engine import Trainer, TrainerConfig, accelerated, elastic, make_deterministic, standard_callbacks
from detr.errors import UserError
from detr.evaluation import CocoEvaluator, CocoResults, MatchingDiagnostics
from detr.published import PUBLISHED
from detr.reporting import Reporter, describe_model
from detr.weights import load_weights, weights_file

logger = logging.getLogger(__name__)
TENSORS = "weights.txt"  # what became of each tensor of weights=...
BATCHES = ("batch_size", "workers", "pad_to")  # options of both loaders


def unread(config: DictConfig) -> str | None:
    """The split of the data that a training has no use for."""
    return "val" if config.data.split is not None or config.trainer.overfit_batches else None


@command("train", unread=unread)
def main(config: DictConfig) -> None:
    device, options = pick_device(config.device), TrainerConfig(**plain(config.trainer))
    group = distributed.process_group(device, options.timeout)
    with group, elastic.alike(options), run_directory(config) as run_dir:
        train(config, run_dir, device, options)


def train(config: DictConfig, run_dir: Path, device: torch.device, options: TrainerConfig) -> None:
    if config.report and options.limit_evaluation_images is not None:
        raise UserError("report=true: wanted trainer.limit_evaluation_images=null, as the page is about all images.")
    logger.info("Device: %s; threads of the CPU: %d. Reading the data.", device, torch.get_num_threads())
    torch.manual_seed(config.seed)
    make_deterministic(options)
    weights = None if config.weights is None else fetch(config.weights)

    augmentation = build_augmentation(config.data)
    train_set, val_set = data_sets(config, options, augmentation)
    logger.info("Training: %s.", train_set.summary())
    logger.info("Evaluation: %s.", val_set.summary())
    data = {
        f"{split}: {name}": value
        for split, part in (("training", train_set), ("validation", val_set))
        for name, value in part.fingerprint().items()
    }
    distributed.check_same(data)
    loader = train_loader(config, options, train_set, augmentation)
    categories, num_classes = train_set.categories, len(train_set.categories)

    model = build_model(config.model, num_classes=num_classes, pretrained=weights is None)
    if weights is not None:
        report = load_weights(model, weights, categories)
        if distributed.rank() == 0:
            (run_dir / TENSORS).write_text(report.listing(), encoding="utf-8")
    model = accelerated(model.to(device), options)
    if config.optimizer.get("backbone_lr") == 0:
        cast(Any, model).backbone.freeze()
    logger.info("Model: %s.", describe_model(model))
    criterion = build_criterion(config.criterion, num_classes=num_classes).to(device)
    evaluator = CocoEvaluator(
        loader=evaluation_loader(val_set, **{name: config.data[name] for name in BATCHES}),
        annotations=val_set.ground_truth(),
        categories=categories,
        diagnostics=MatchingDiagnostics(criterion.match),
        limit=options.limit_evaluation_images,
        panoptic=None if val_set.segments is None else val_set.panoptic,
        **config.evaluation,
    )
    trainer = Trainer(
        model=model,
        criterion=criterion,
        optimizer=build(config.optimizer, path="optimizer", model=model),
        schedule=build(config.scheduler, path="scheduler"),
        loader=loader,
        callbacks=standard_callbacks(
            options,
            model=model,
            evaluator=evaluator,
            report=partial(write_report, val_set, run_dir, config.evaluation.max_dets) if config.report else None,
            own=build(config.callbacks, path="callbacks"),
        ),
        reporter=Reporter(
            sinks=build(config.logger, path="logger"),
            run_dir=run_dir,
            log_every=config.log_every,
            names=[category.name for category in categories],
        ),
        config=options,
        run_dir=run_dir,
        metadata={"config": plain(config), "categories": [asdict(category) for category in categories]},
        seed=config.seed,
        data=data,
    )
    trainer.fit()


def write_report(val_set: DetectionDataset, run_dir: Path, max_dets: int, results: CocoResults) -> None:
    """Say in evaluation/report.html, and in numbers in report.json, where the detector fails."""
    from detr.reporting.evaluation_page import explain  # it takes half a second, for charts

    title, path = f"{run_dir} on {val_set.source}", run_dir / "evaluation" / "report.html"
    page, numbers = explain(val_set.ground_truth(), results, val_set.folder, title=title, max_dets=max_dets)
    path.write_bytes(page)
    path.with_suffix(".json").write_bytes(numbers)
    logger.info("What the last evaluation means is in %s.", path)


def fetch(weights: str) -> Path:
    """The file that a training starts from: there, or refused, before any other work."""
    if weights in PUBLISHED:
        logger.info("weights=%s brings %s.", weights, PUBLISHED[weights].options)
    with distributed.first_on_machine():
        return weights_file(weights)


def data_sets(
    config: DictConfig, options: TrainerConfig, augmentation: Augmentation
) -> tuple[DetectionDataset, DetectionDataset]:
    """For training, and for validation with the same categories."""
    data = config.data
    few = (options.overfit_batches or 0) * data.batch_size * options.sharing_processes
    train, val = read_annotations(data, few, masks=config.model.get("masks") is not None)
    if val is None:
        raise UserError("data.val: wanted a reader, got null. Or set data.split=0.2 to hold out images of data.train.")
    train_set = DetectionDataset(train, seed=config.seed, unreadable=data.unreadable)
    resized = transforms.evaluation(size=data.size, max_size=data.max_size, square=data.square)
    val_set = DetectionDataset(val, resized, categories=train_set.categories)
    before_training(
        train_set,
        val_set,
        num_queries=config.model.get("num_queries"),
        mixed_images=augmentation.mixed_images,
        images=data.check,
    )
    return train_set, val_set


def read_annotations(data: DictConfig, few: int = 0, *, masks: bool = False) -> tuple[Annotations, Annotations | None]:
    """Those to train on, and those to validate on, None where `data.val` is null.

    few: both are so many images. masks: read these too.
    """
    with distributed.first_on_machine():
        build(data.prepare, path="data.prepare")
    train = build_reader(data.train, path="data.train", masks=masks)
    if few:
        return train.first(few), train.first(few)
    if data.split is not None:
        return hold_out(train, data.split, data.split_seed)
    return train, build_reader(data.val, path="data.val", masks=masks)


def build_augmentation(data: DictConfig) -> Augmentation:
    """What becomes of training images."""
    sizes = data.batch_sizes or ()
    recipes = {}
    for name in ("transforms", "plain_transforms"):
        node, path = data[name], f"data.{name}"
        if sizes and node is None:
            raise UserError(f"data.batch_sizes: wanted null where {path} is null, because nothing resizes the images.")
        recipes[name] = Recipe(build(node, path=path), {size: build(node, path=path, sizes=[size]) for size in sizes})
    return Augmentation(
        recipe=recipes["transforms"],
        plain=recipes["plain_transforms"],
        mixing=build(data.mixing, path="data.mixing"),
        **{name: data[name] for name in ("plain_before", "mixing_until", "plain_after")},
    )


def train_loader(
    config: DictConfig, options: TrainerConfig, dataset: DetectionDataset, augmentation: Augmentation
) -> TrainLoader:
    """The batches of a training, each of its epochs augmented as it is to be."""
    data = config.data
    loader = TrainLoader(
        dataset,
        **{name: data[name] for name in BATCHES},
        seed=config.seed,
        group_by_aspect=data.group_by_aspect,
        image_sizes=data.batch_sizes or (),
        dealt=options.accumulate if options.elastic else None,
    )
    dataset.schedule(augmentation, epochs=options.total_epochs(len(loader)))
    return loader


if __name__ == "__main__":
    main()
