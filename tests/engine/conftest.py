"""A trainer of a tiny model on a few shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets import TrainLoader, evaluation_loader, transforms
from detr.engine import Callback, Trainer, TrainerConfig, standard_callbacks
from detr.engine.optim import Cosine, adamw
from detr.evaluation import CocoEvaluator, MatchingDiagnostics
from detr.losses import HungarianMatcher, SetCriterion
from detr.models.detr import DETR
from detr.reporting import JsonLines, Reporter
from tests.helpers.data import shapes_set
from tests.helpers.trainings import Make


@pytest.fixture
def make(shapes_root: Path, tmp_path: Path, tiny_detr: Callable[..., DETR]) -> Make:
    """Builds everything anew, as a new process would; dropout and batch norm are on."""

    def make(
        run: str = "run",
        lr: float = 1e-3,
        seed: int = 3,
        queries: int = 7,
        attention: Any = None,
        batch_size: int = 6,
        dropout: float = 0.1,
        callbacks: dict[str, Callback] | None = None,
        **options: Any,
    ) -> Trainer:
        recipe = transforms.train(sizes=[40, 48], max_size=64, crop=False)
        train = shapes_set(shapes_root, "train", recipe, seed=seed)
        val = shapes_set(shapes_root, "val")
        model = tiny_detr(num_classes=3, num_queries=queries, dropout=dropout, attention=attention)
        criterion = SetCriterion(matcher=HungarianMatcher(), num_classes=3)
        config = TrainerConfig(**{"epochs": 4, "resume": "auto", **options})
        evaluator = CocoEvaluator(
            loader=evaluation_loader(val, batch_size=4, workers=0),
            annotations=val.ground_truth(),
            categories=train.categories,
            diagnostics=MatchingDiagnostics(HungarianMatcher()),
            limit=config.limit_evaluation_images,
        )
        run_dir = tmp_path / run
        run_dir.mkdir(exist_ok=True)
        return Trainer(
            model=model,
            criterion=criterion,
            optimizer=adamw(model, lr=lr, backbone_lr=lr),
            schedule=Cosine(warmup=0.1),
            loader=TrainLoader(
                train, batch_size=batch_size, workers=0, seed=seed, dealt=config.accumulate if config.elastic else None
            ),
            callbacks=standard_callbacks(config, model=model, evaluator=evaluator, own=callbacks),
            reporter=Reporter(sinks={"jsonl": JsonLines()}, run_dir=run_dir, log_every=1),
            config=config,
            run_dir=run_dir,
            metadata={"config": {"data": {}, "model": {}, "optimizer": {"lr": lr}}, "categories": []},
            seed=seed,
        )

    return make
