"""Training: the loop, optimiser and schedules, checkpoints."""

from detr.engine.trainer import Trainer, TrainerConfig

__all__ = ["Trainer", "TrainerConfig"]
