"""COCO metrics of results, and of a model on a data set; diagnostics of the matching."""

from detr.evaluation.coco import CocoMetrics, coco_metrics, evaluate_coco
from detr.evaluation.diagnostics import MatchingDiagnostics
from detr.evaluation.evaluator import CocoEvaluator, Evaluation, to_results

__all__ = [
    "CocoEvaluator",
    "CocoMetrics",
    "Evaluation",
    "MatchingDiagnostics",
    "coco_metrics",
    "evaluate_coco",
    "to_results",
]
