"""Train a detector: python train.py experiment=NAME key=value ..."""

from dataclasses import asdict

import hydra
import torch
from omegaconf import DictConfig

from datasets import CocoDetection, TrainLoader, evaluation_loader, transforms
from detr import distributed
from detr.config import build, build_criterion, build_model, check_config, exit_codes, pick_device, plain, run_directory
from detr.engine import Trainer, TrainerConfig, accelerated
from detr.engine.checkpoint import load_weights
from detr.evaluation import CocoEvaluator, MatchingDiagnostics
from detr.reporting import Reporter


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@exit_codes()
def main(config: DictConfig) -> None:
    check_config(config)
    device, options = pick_device(config.device), TrainerConfig(**plain(config.trainer))
    with distributed.process_group(device, options.timeout):
        train(config, device, options)


def train(config: DictConfig, device: torch.device, options: TrainerConfig) -> None:
    run_dir = run_directory(config)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(options.deterministic)

    data = config.data
    with distributed.first_on_machine():
        build(data.prepare, path="data.prepare")
    train_set = CocoDetection(**data.train, transforms=build(data.transforms, path="data.transforms"), seed=config.seed)
    resized = transforms.evaluation(size=data.size, max_size=data.max_size)
    val_set = CocoDetection(**data.val, transforms=resized, categories=train_set.categories)
    loader = TrainLoader(train_set, batch_size=data.batch_size, workers=data.workers, seed=config.seed)
    late = transforms.without_augmentation(data.transforms or {}, size=data.size, max_size=data.max_size)
    loader.switch_transforms(late, after=data.plain_after, epochs=options.total_epochs(len(loader)))

    model = build_model(config.model, num_classes=len(train_set.categories), pretrained=config.weights is None)
    if config.weights is not None:
        load_weights(model, config.weights, train_set.categories)
    model = model.to(device).to(memory_format=torch.channels_last)
    model = accelerated(model, options)
    criterion = build_criterion(config.criterion, num_classes=len(train_set.categories)).to(device)
    trainer = Trainer(
        model=model,
        criterion=criterion,
        optimizer=build(config.optimizer, path="optimizer", model=model),
        schedule=build(config.scheduler, path="scheduler"),
        loader=loader,
        evaluator=CocoEvaluator(
            loader=evaluation_loader(val_set, batch_size=data.batch_size, workers=data.workers),
            annotations=val_set.ground_truth(),
            categories=train_set.categories,
            diagnostics=MatchingDiagnostics(criterion.match),
            limit=options.limit_evaluation_images,
            **config.evaluation,
        ),
        reporter=Reporter(
            sinks=build(config.logger, path="logger") if distributed.rank() == 0 else {},
            run_dir=run_dir,
            log_every=config.log_every,
        ),
        config=options,
        run_dir=run_dir,
        metadata={"config": plain(config), "categories": [asdict(category) for category in train_set.categories]},
        seed=config.seed,
    )
    trainer.fit()


if __name__ == "__main__":
    with exit_codes():
        main()
