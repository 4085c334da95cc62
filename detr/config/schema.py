"""Types and ranges of the fixed options, which the files in configs/ describe.

A wrong type or an unknown name fails when the configuration is composed, a value out of its range when it is checked.
"""

from dataclasses import dataclass, field
from typing import Any, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from detr.engine import TrainerConfig
from detr.evaluation.backends import Backend
from detr.export import FORMATS as EXPORTS
from detr.panoptic import PUBLISHED_THRESHOLD
from detr.ranges import at_least, each_from, each_of, number_or_text, one_of
from detr.reporting import FORMATS

_MOST_PIXELS = 20_000  # of a side: an image of this size takes 5 GB, before the model sees it


@dataclass
class DataConfig:
    """`data`, described in configs/data/common.yaml. train, val: readers of the two splits."""

    root: str | None = MISSING
    train: Any = MISSING
    val: Any = MISSING
    size: int | None = at_least(1, most=_MOST_PIXELS, default=800)
    max_size: int | None = at_least(1, most=_MOST_PIXELS, default=1333)
    square: bool | None = False
    transforms: Any = None
    batch_sizes: list[int] | None = field(default=None, metadata=each_from(1, _MOST_PIXELS))
    mixing: Any = None
    plain_before: float = at_least(0, most=1, default=0.0)
    mixing_until: float = at_least(0, most=1, default=1.0)
    plain_after: float = at_least(0, most=1, default=1.0)
    plain_transforms: Any = None
    prepare: Any = None
    batch_size: int = at_least(1, default=2)
    workers: int = at_least(0, most=512, default=4)
    group_by_aspect: bool = False
    pad_to: int = at_least(1, most=_MOST_PIXELS, default=1)
    unreadable: str = one_of("stop", "skip", default="stop")
    split: float | None = at_least(0.01, most=0.99, default=None)
    split_seed: int = at_least(0, default=0)
    check: str = one_of("headers", "pixels", "nothing", default="headers")


@dataclass
class RunConfig:
    """What all commands share, described in configs/train.yaml."""

    run_dir: str = MISSING
    device: str = "auto"
    debug: bool = False
    allow_targets: list[str] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """`evaluation`, described in configs/train.yaml."""

    backend: str = one_of(*get_args(Backend), default="hotcoco", former={"faster": "hotcoco"})
    max_dets: int = at_least(11, most=10_000, default=100)  # AR10 is reported too
    panoptic_threshold: float = at_least(0, most=1, default=PUBLISHED_THRESHOLD)


@dataclass
class TrainConfig(RunConfig):
    """Options of train.py, described in configs/train.yaml."""

    report: bool = False
    model: Any = MISSING
    criterion: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: Any = MISSING
    callbacks: Any = MISSING
    log_every: int = at_least(1, default=50)
    seed: int = at_least(0, most=2**64 - 1, default=42)
    weights: str | None = None


@dataclass
class EvaluateConfig(RunConfig):
    """Options of evaluate.py, described in configs/evaluate.yaml."""

    report: bool = False
    report_against: str | None = None
    checkpoint: str | None = None
    results: str | None = None
    overwrite: bool = False
    model: Any = None
    criterion: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class PredictConfig(RunConfig):
    """Options of predict.py, described in configs/predict.yaml."""

    checkpoint: str = MISSING
    model: Any = None
    criterion: Any = None
    source: str = MISSING
    output: str = "${run_dir}"
    overwrite: bool = False
    formats: list[str] = field(default_factory=lambda: ["json"], metadata=each_of(*FORMATS))
    annotations: str | None = None
    threshold: int | float | str = field(
        default=0.5, metadata=number_or_text(0, 1, "best, or a metrics.json of evaluate.py")
    )
    max_dets: int = at_least(1, most=10_000, default=300)
    panoptic_threshold: float = at_least(0, most=1, default=PUBLISHED_THRESHOLD)
    batch_size: int = at_least(1, default=4)
    size: int | None = at_least(1, most=_MOST_PIXELS, default=None)
    max_size: int | None = at_least(1, most=_MOST_PIXELS, default=None)
    square: bool | None = None
    video_stride: int = at_least(1, default=1)
    enlarge: bool = False
    attention: bool = False
    attention_point: list[float] = field(default_factory=lambda: [0.5, 0.5])


@dataclass
class ExportConfig(RunConfig):
    """Options of export.py, described in configs/export.yaml."""

    checkpoint: str = MISSING
    model: Any = None
    criterion: Any = None
    format: str = one_of(*EXPORTS, default="onnx")
    precision: str = one_of("fp32", "fp16", "int8", default="fp32")
    output: str = "${run_dir}"
    overwrite: bool = False
    size: int | None = at_least(1, most=_MOST_PIXELS, default=None)
    max_size: int | None = at_least(1, most=_MOST_PIXELS, default=None)
    square: bool | None = None
    fixed_size: bool = False
    batch_size: int | None = at_least(1, default=None)
    normalize: bool = True
    postprocess: bool = True
    images: str | None = None
    num_images: int = at_least(1, default=8)
    num_calibration_images: int = at_least(1, default=100)
    evaluate: bool = False
    ap_loss: float = at_least(0, most=1, default=0.01)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class ConvertDataConfig:
    """Options of tools/convert_data.py, described in configs/convert_data.yaml."""

    data: DataConfig = field(default_factory=DataConfig)
    output: str = MISSING
    masks: bool = False
    overwrite: bool = False
    allow_targets: list[str] = field(default_factory=list)
    debug: bool = False


def register() -> None:
    """Register what configs/ builds on: the schemas, first in the defaults lists, and `scaled`."""
    OmegaConf.register_new_resolver("scaled", _scaled, replace=True)
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="predict_schema", node=PredictConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="convert_data_schema", node=ConvertDataConfig)


def _scaled(size: int, scale: float | list[float]) -> Any:
    """Pixels: a fraction of a size, or several."""
    return OmegaConf.create([_scaled(size, one) for one in scale]) if isinstance(scale, list) else round(size * scale)
