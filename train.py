"""Train a detector: python train.py experiment=NAME key=value ..."""

from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig

from datasets import training_data
from detr import distributed
from detr.cli import command, pick_device, run_directory
from detr.config import build, build_criterion, build_model, plain
from detr.engine import Trainer, TrainerConfig, accelerated
from detr.engine.checkpoint import load_weights
from detr.evaluation import CocoEvaluator, MatchingDiagnostics
from detr.reporting import Reporter


@command("train")
def main(config: DictConfig) -> None:
    device, options = pick_device(config.device), TrainerConfig(**plain(config.trainer))
    with distributed.process_group(device, options.timeout), run_directory(config) as run_dir:
        train(config, run_dir, device, options)


def train(config: DictConfig, run_dir: Path, device: torch.device, options: TrainerConfig) -> None:
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(options.deterministic)

    with distributed.first_on_machine():
        build(config.data.prepare, path="data.prepare")
    augmentation = build(config.data.transforms, path="data.transforms")
    data = training_data(plain(config.data), augmentation, seed=config.seed, epochs=options.total_epochs)
    num_classes = len(data.categories)

    model = build_model(config.model, num_classes=num_classes, pretrained=config.weights is None)
    if config.weights is not None:
        load_weights(model, config.weights, data.categories)
    model = accelerated(model.to(device), options)
    criterion = build_criterion(config.criterion, num_classes=num_classes).to(device)
    trainer = Trainer(
        model=model,
        criterion=criterion,
        optimizer=build(config.optimizer, path="optimizer", model=model),
        schedule=build(config.scheduler, path="scheduler"),
        loader=data.train,
        evaluator=CocoEvaluator(
            loader=data.val,
            annotations=data.annotations,
            categories=data.categories,
            diagnostics=MatchingDiagnostics(criterion.match),
            limit=options.limit_evaluation_images,
            **config.evaluation,
        ),
        reporter=Reporter(sinks=build(config.logger, path="logger"), run_dir=run_dir, log_every=config.log_every),
        config=options,
        run_dir=run_dir,
        metadata={"config": plain(config), "categories": [asdict(category) for category in data.categories]},
        seed=config.seed,
    )
    trainer.fit()


if __name__ == "__main__":
    main()
