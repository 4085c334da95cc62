"""Training: the loop, optimiser and schedules, checkpoints."""

from detr.engine.accelerate import accelerated
from detr.engine.options import TrainerConfig
from detr.engine.step import TrainingStep
from detr.engine.trainer import Trainer

__all__ = ["Trainer", "TrainerConfig", "TrainingStep", "accelerated"]
