"""Matching of predictions to targets, and the losses of the matched pairs.

A new loss is a subclass of `Term` in its own file, and one entry in `criterion.terms`.
"""

from detr.losses.classification import ClassificationLoss
from detr.losses.criterion import SetCriterion
from detr.losses.matcher import HungarianMatcher
from detr.losses.terms import Matched, Term

__all__ = ["ClassificationLoss", "HungarianMatcher", "Matched", "SetCriterion", "Term"]
