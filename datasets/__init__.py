"""Data sets: reading annotations of any format, augmenting, batching, and the generated `shapes` set."""

from datasets.checks import before_training
from datasets.detection import DetectionDataset
from datasets.loader import TrainLoader, evaluation_loader
from datasets.schedule import Augmentation, Recipe
from datasets.splitting import hold_out

__all__ = [
    "Augmentation",
    "DetectionDataset",
    "Recipe",
    "TrainLoader",
    "before_training",
    "evaluation_loader",
    "hold_out",
]
