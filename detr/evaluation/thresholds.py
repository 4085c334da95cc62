"""The score from which on a detector's detections are kept, chosen by class for the best F1."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from detr.evaluation.comparison import Comparison
from detr.evaluation.matches import coco_matches

LEAST_OBJECTS = 20  # of a class, for a threshold of its own


@dataclass(frozen=True)
class Threshold:
    """A score, and what the detections of one class with at least this score are worth.

    precision, recall: and their harmonic mean, `f1`; in [0, 1], or -1 where there is nothing to divide by.
    objects: of this class, crowds left out.
    """

    score: float
    f1: float
    precision: float
    recall: float
    objects: int


def best_thresholds(
    comparison: Comparison, iou: float = 0.5, max_dets: int = 100, least_objects: int = LEAST_OBJECTS
) -> dict[str, Threshold]:
    """The threshold with the best F1 of each class by name; none at all where no object is found.

    Detections are matched by COCO's rules (`coco_matches`). Every score between two neighboring detections gives the
    same F1: the middle is taken, which small changes of the scores hardly cross, or the lowest score of all where
    there is none below. Of scores with the same F1 it is the highest.

    With few objects the best score is a matter of chance. So a class with fewer than `least_objects` has the score that
    is best for all detections together, as has one of which nothing is found.

    iou: the least overlap of a detection with what it finds. max_dets: most detections counted in an image and class.
    """
    matches = coco_matches(comparison, iou, max_dets)
    counted = matches.counted
    scores, classes, hits = (
        comparison.found.scores[counted],
        comparison.found.categories[counted],
        matches.hits[counted],
    )
    objects = np.bincount(comparison.truth.categories[matches.wanted], minlength=len(comparison.names))
    overall = _best_score(scores, hits, int(objects.sum()))
    if overall is None:
        return {}
    thresholds = {}
    for number, name in enumerate(comparison.names):
        own, wanted = classes == number, int(objects[number])
        score = _best_score(scores[own], hits[own], wanted) if wanted >= least_objects else None
        thresholds[name] = _at(overall if score is None else score, scores[own], hits[own], wanted)
    return thresholds


def _best_score(scores: Float64[np.ndarray, " n"], hits: Bool[np.ndarray, " n"], objects: int) -> float | None:
    """None where there is no hit."""
    if not hits.any():
        return None
    values, number = np.unique(-scores, return_inverse=True)
    values, kept, found = -values, _up_to(number), _up_to(number[hits], len(values))
    best = int((2 * found / (kept + objects)).argmax())
    return float(values[best : best + 2].mean())


def _up_to(numbers: Int64[np.ndarray, " n"], count: int = 0) -> Int64[np.ndarray, " count"]:
    """How many are at most 0, 1, 2 ..."""
    return np.bincount(numbers, minlength=count).cumsum()


def _at(score: float, scores: Float64[np.ndarray, " n"], hits: Bool[np.ndarray, " n"], objects: int) -> Threshold:
    kept = scores >= score
    count, found = int(kept.sum()), int(hits[kept].sum())
    return Threshold(
        score=score,
        f1=_ratio(2 * found, count + objects),
        precision=_ratio(found, count),
        recall=_ratio(found, objects),
        objects=objects,
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else -1.0
