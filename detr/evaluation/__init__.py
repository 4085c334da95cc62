"""COCO metrics of results, and of a model on a data set; the panoptic quality; diagnostics of the matching."""

from detr.evaluation.classes import categories_of_data
from detr.evaluation.coco import CocoMetrics, box_and_mask_metrics, coco_metrics, evaluate_coco
from detr.evaluation.diagnostics import MatchingDiagnostics
from detr.evaluation.evaluator import CocoEvaluator, Evaluation
from detr.evaluation.listed import ListedImage, ListedImages
from detr.evaluation.panoptic import PanopticMetrics, PanopticQuality
from detr.evaluation.results import CocoResults, to_results
from detr.evaluation.results_file import holds_masks, read_results
from detr.evaluation.samples import Sample
from detr.evaluation.thresholds import Threshold, Thresholds, best_thresholds, read_thresholds

__all__ = [
    "CocoEvaluator",
    "CocoMetrics",
    "CocoResults",
    "Evaluation",
    "ListedImage",
    "ListedImages",
    "MatchingDiagnostics",
    "PanopticMetrics",
    "PanopticQuality",
    "Sample",
    "Threshold",
    "Thresholds",
    "best_thresholds",
    "box_and_mask_metrics",
    "categories_of_data",
    "coco_metrics",
    "evaluate_coco",
    "holds_masks",
    "read_results",
    "read_thresholds",
    "to_results",
]
