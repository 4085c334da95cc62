"""COCO metrics of results, and of a model on a data set; diagnostics of the matching."""

from detr.evaluation.coco import CocoMetrics, coco_metrics, evaluate_coco
from detr.evaluation.diagnostics import MatchingDiagnostics
from detr.evaluation.evaluator import CocoEvaluator, Evaluation
from detr.evaluation.listed import ListedImage, ListedImages
from detr.evaluation.results import CocoResults, to_results
from detr.evaluation.samples import Sample
from detr.evaluation.thresholds import Threshold, best_thresholds

__all__ = [
    "CocoEvaluator",
    "CocoMetrics",
    "CocoResults",
    "Evaluation",
    "ListedImage",
    "ListedImages",
    "MatchingDiagnostics",
    "Sample",
    "Threshold",
    "best_thresholds",
    "coco_metrics",
    "evaluate_coco",
    "to_results",
]
