"""Types of the fixed options: a wrong type or an unknown key fails when the configuration is composed."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from detr.engine import TrainerConfig


@dataclass
class DataConfig:
    """size, max_size: short side and limit of the long side in evaluation and prediction, in pixels.

    train, val: readers of the two splits. transforms: of training images. mixing: of several of them, before.
    plain_after: fraction of the training after which plain_transforms take the place of both.
    batch_size: images in a batch of each process. workers: processes that load images, for each process.
    group_by_aspect: training batches of images with similar aspect ratios.
    pad_to: batches are padded to a multiple of so many pixels.
    unreadable: what to do with training images that cannot be read, stop or skip.
    """

    root: str | None = MISSING
    train: Any = MISSING
    val: Any = MISSING
    size: int | None = 800
    max_size: int | None = 1333
    transforms: Any = None
    mixing: Any = None
    plain_after: float = 1.0
    plain_transforms: Any = None
    prepare: Any = None
    batch_size: int = 2
    workers: int = 4
    group_by_aspect: bool = False
    pad_to: int = 1
    unreadable: str = "stop"


@dataclass
class RunConfig:
    """What all commands share. allow_targets: packages of your own that `_target_` may name."""

    run_dir: str = MISSING
    device: str = "auto"
    debug: bool = False
    allow_targets: list[str] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """backend: hotcoco or pycocotools. max_dets: most detections counted per image."""

    backend: str = "hotcoco"
    max_dets: int = 100


@dataclass
class TrainConfig(RunConfig):
    """Options of train.py."""

    model: Any = MISSING
    criterion: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: Any = MISSING
    callbacks: Any = MISSING
    log_every: int = 50
    seed: int = 42
    weights: str | None = None


@dataclass
class EvaluateConfig(RunConfig):
    """Options of evaluate.py. criterion: comes with model=NAME and is not used."""

    checkpoint: str = MISSING
    model: Any = None
    criterion: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class PredictConfig(RunConfig):
    """Options of predict.py. criterion: comes with model=NAME and is not used."""

    checkpoint: str = MISSING
    model: Any = None
    criterion: Any = None
    source: str = MISSING
    output: str = "${run_dir}"
    threshold: float = 0.5
    batch_size: int = 4
    size: int | None = None
    max_size: int | None = None
    attention: bool = False
    attention_point: list[float] = field(default_factory=lambda: [0.5, 0.5])


def register() -> None:
    """Make the schemas known to Hydra, as the first entries of the defaults lists in configs/."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="predict_schema", node=PredictConfig)
