"""Data sets in COCO format: reading, augmenting, batching, and the generated `shapes` set."""

from datasets.coco import CocoDetection
from datasets.loader import TrainLoader, evaluation_loader
from datasets.training import training_data

__all__ = ["CocoDetection", "TrainLoader", "evaluation_loader", "training_data"]
