"""Train a detector: python train.py experiment=NAME key=value ..."""

from dataclasses import asdict

import hydra
import torch
from omegaconf import DictConfig

from datasets import CocoDetection, TrainLoader, evaluation_loader
from datasets.transforms import evaluation
from detr.config import build, build_criterion, build_model, check_config, exit_codes, pick_device, plain, run_directory
from detr.engine import Trainer, TrainerConfig
from detr.engine.checkpoint import load_weights
from detr.evaluation import CocoEvaluator
from detr.reporting import Reporter


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@exit_codes()
def main(config: DictConfig) -> None:
    check_config(config)
    device, run_dir = pick_device(config.device), run_directory(config)
    torch.manual_seed(config.seed)

    data = config.data
    build(data.prepare, path="data.prepare")
    augment = build(data.transforms, path="data.transforms")
    train_set = CocoDetection(**data.train, transforms=augment, seed=config.seed)
    resized = evaluation(size=data.size, max_size=data.max_size)
    val_set = CocoDetection(**data.val, transforms=resized, categories=train_set.categories)

    model = build_model(config.model, num_classes=len(train_set.categories), pretrained=config.weights is None)
    if config.weights is not None:
        load_weights(model, config.weights, train_set.categories)
    model = model.to(device).to(memory_format=torch.channels_last)
    trainer = Trainer(
        model=model,
        criterion=build_criterion(config.criterion, num_classes=len(train_set.categories)).to(device),
        optimizer=build(config.optimizer, path="optimizer", model=model),
        schedule=build(config.scheduler, path="scheduler"),
        loader=TrainLoader(train_set, batch_size=data.batch_size, workers=data.workers, seed=config.seed),
        evaluator=CocoEvaluator(
            loader=evaluation_loader(val_set, batch_size=data.batch_size, workers=data.workers),
            annotations=val_set.ground_truth(),
            categories=train_set.categories,
            **config.evaluation,
        ),
        reporter=Reporter(sinks=build(config.logger, path="logger"), run_dir=run_dir, log_every=config.log_every),
        config=TrainerConfig(**config.trainer),
        run_dir=run_dir,
        metadata={"config": plain(config), "categories": [asdict(category) for category in train_set.categories]},
        seed=config.seed,
    )
    trainer.fit()


if __name__ == "__main__":
    with exit_codes():
        main()
