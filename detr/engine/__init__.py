"""Training: the loop, callbacks, optimizer and schedules, checkpoints."""

from detr.engine.accelerate import accelerated, make_deterministic
from detr.engine.callbacks import standard_callbacks
from detr.engine.options import TrainerConfig
from detr.engine.step import TrainingStep
from detr.engine.trainer import Callback, Trainer

__all__ = [
    "Callback",
    "Trainer",
    "TrainerConfig",
    "TrainingStep",
    "accelerated",
    "make_deterministic",
    "standard_callbacks",
]
