"""Training: the loop, callbacks, optimizer and schedules, checkpoints."""

from detr.engine.accelerate import accelerated
from detr.engine.callbacks import standard_callbacks
from detr.engine.options import TrainerConfig
from detr.engine.step import TrainingStep
from detr.engine.trainer import Callback, Trainer

__all__ = ["Callback", "Trainer", "TrainerConfig", "TrainingStep", "accelerated", "standard_callbacks"]
