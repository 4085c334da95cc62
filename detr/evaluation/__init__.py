"""COCO metrics of results, and of a model on a data set."""

from detr.evaluation.coco import CocoMetrics, coco_metrics, evaluate_coco
from detr.evaluation.evaluator import CocoEvaluator, Evaluation, to_results

__all__ = ["CocoEvaluator", "CocoMetrics", "Evaluation", "coco_metrics", "evaluate_coco", "to_results"]
