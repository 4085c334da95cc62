"""Matching of predictions to targets, and the losses on the matched pairs."""

from detr.losses.classification import ClassificationLoss
from detr.losses.criterion import SetCriterion
from detr.losses.matcher import HungarianMatcher

__all__ = ["ClassificationLoss", "HungarianMatcher", "SetCriterion"]
