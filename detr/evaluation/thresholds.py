"""The score from which on a detector's detections are kept, chosen by class for the best F1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from detr.contents import check_content, mapping, number, record, whole
from detr.errors import UserError
from detr.evaluation.comparison import Comparison, loaded
from detr.evaluation.matching import Matching, match
from detr.folders import command
from detr.types import Category

# Of a class, for a threshold of its own: a compromise. With 5 to 19 objects, on held-out photographs of blood cells, it
# gained 0.06 of F1 over a common one where classes have scores of different heights, and lost 0.02 where they have not.
LEAST_OBJECTS = 10
_RATIO = number(-1, 1)
_THRESHOLD = record(score=number(), f1=_RATIO, precision=_RATIO, recall=_RATIO, objects=whole())
_THRESHOLDS = record(overall=_THRESHOLD, per_class=mapping(_THRESHOLD))


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


@dataclass(frozen=True)
class Thresholds:
    """The best threshold for all detections together, and that of each class by name, as in `CocoMetrics`."""

    overall: Threshold
    per_class: dict[str, Threshold]

    def of(self, category: Category) -> Threshold | None:
        """That of a class; None where it is not known."""
        return self.per_class.get(category.name) or self.per_class.get(f"{category.name} ({category.id})")

    def scores(self, categories: Sequence[Category]) -> list[float]:
        """By label: the score of each class, and the overall one where it is not known."""
        return [(self.of(category) or self.overall).score for category in categories]

    def content(self) -> dict[str, Any]:
        """As checkpoints and metrics.json hold them."""
        return asdict(self)

    @classmethod
    def from_content(cls, content: Any, source: object) -> "Thresholds":
        """What `content` gave. source: where it is from. Raises UserError where it is damaged."""
        check_content(content, _THRESHOLDS, source)
        per_class = {name: Threshold(**row) for name, row in content["per_class"].items()}
        return cls(overall=Threshold(**content["overall"]), per_class=per_class)


def read_thresholds(path: str | Path) -> Thresholds:
    """The thresholds in a metrics.json of evaluate.py; raises UserError where there are none."""
    path = Path(path).expanduser()
    try:
        content = loaded(path)
        found = content["thresholds"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        raise UserError(
            f"threshold={path}: wanted a number, best, or a metrics.json of evaluate.py with thresholds, which this is "
            f"not. Write one with {command('evaluate')} checkpoint=PATH data=..."
        ) from None
    return Thresholds.from_content(found, f"threshold={path}")


def best_thresholds(
    comparison: Comparison, iou: float = 0.5, max_dets: int = 100, least_objects: int = LEAST_OBJECTS
) -> Thresholds | None:
    """The thresholds with the best F1; None where no object is found.

    Detections are matched by COCO's rules (`match`). Every score between two neighboring detections gives the
    same F1: the middle is taken, which small changes of the scores hardly cross, or the lowest score of all where
    there is none below. Of scores with the same F1 it is the highest.

    With few objects the best score is a matter of chance. So a class of which fewer than `least_objects` are found at
    its best score has the overall score, which is best for the detections of all classes together.

    comparison: of boxes. iou: the least overlap of a detection with what it finds. max_dets: most detections counted in
    an image and class.
    """
    matching = match(comparison, max_dets, thresholds=[iou], sizes=False)
    return thresholds_of(matching, comparison.names, iou, least_objects)


def thresholds_of(
    matching: Matching, names: Sequence[str], iou: float, least_objects: int = LEAST_OBJECTS
) -> Thresholds | None:
    """Those of `best_thresholds`, of what is matched already. names: of the classes."""
    counted = matching.counted(iou)
    scores, classes, hits = matching.scores[counted], matching.classes[counted], matching.at(iou)[counted] >= 0
    objects = np.bincount(matching.object_classes[matching.wanted[0]], minlength=len(names))
    common = _best_score(scores, hits, int(objects.sum()))
    if common is None:
        return None
    per_class = {}
    for label, name in enumerate(names):
        own, wanted = classes == label, int(objects[label])
        score = _best_score(scores[own], hits[own], wanted)
        if score is None or hits[own & (scores >= score)].sum() < least_objects:
            score = common
        per_class[name] = _at(score, scores[own], hits[own], wanted)
    return Thresholds(overall=_at(common, scores, hits, int(objects.sum())), per_class=per_class)


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
