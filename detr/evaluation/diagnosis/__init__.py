"""What an evaluation's detections say beyond its metrics, from annotations and results alone."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from detr.annotations import identity
from detr.evaluation.backends import hotcoco_evaluation
from detr.evaluation.comparison import Comparison
from detr.evaluation.diagnosis.errors import (
    Calibration,
    Confusion,
    ErrorCost,
    calibration,
    confusion,
    error_costs,
    selected,
)
from detr.evaluation.diagnosis.images import Box, ImageErrors, ImageList, Suspect
from detr.evaluation.diagnosis.intervals import (
    LEVEL,
    Interval,
    Weighted,
    interval,
    number_of_resamples,
    resamples,
    weighted_metrics,
)
from detr.evaluation.diagnosis.slices import Slice, slices
from detr.evaluation.matching import AREAS, THRESHOLDS, Matching, match
from detr.evaluation.results import CocoResults
from detr.evaluation.thresholds import Threshold, Thresholds, thresholds_of

__all__ = [
    "AREAS",
    "LEVEL",
    "Box",
    "Calibration",
    "ClassDiagnosis",
    "Confusion",
    "Diagnosis",
    "Difference",
    "ErrorCost",
    "ImageErrors",
    "Interval",
    "Slice",
    "Suspect",
    "diagnose",
]
IOU = 0.5  # of everything but COCO's own numbers
_WITHOUT = 0.5  # the threshold where nothing is found, so that none is better
_CURVES = (0.5, 0.75, 0.9)  # IoUs


@dataclass(frozen=True)
class ClassDiagnosis:
    """A class: its objects without crowds, AP, AP50 and AP by size, and its threshold.

    threshold: the score with the best F1; None where nothing at all is found.
    """

    name: str
    objects: int
    ap: Interval
    ap50: float | None
    sizes: dict[str, float | None]
    threshold: Threshold | None


@dataclass(frozen=True)
class Difference:
    """These results less others, on the same resamples of the images. other, metrics: by name; classes: of their AP."""

    name: str
    other: dict[str, float | None]
    metrics: dict[str, Interval]
    classes: dict[str, Interval]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """All of it. Counts leave crowds out; `metrics` are COCO's twelve numbers.

    resamples, seed: of the intervals. curves: precision at 101 recalls, mean over classes, by IoU.
    confusion, worst, suspects: of the detections above the thresholds of their classes.
    """

    images: int
    objects: int
    detections: int
    kept: int
    max_dets: int
    resamples: int
    seed: int
    metrics: dict[str, Interval]
    curves: dict[str, Float64[np.ndarray, " 101"]]
    classes: list[ClassDiagnosis]
    errors: list[ErrorCost]
    confusion: Confusion
    calibration: Calibration
    worst: list[ImageErrors]
    suspects: list[Suspect]
    slices: list[Slice]
    difference: Difference | None

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, default=lambda array: array.tolist()) + "\n"


def diagnose(
    annotations: Mapping[str, Any],
    results: CocoResults,
    *,
    max_dets: int = 100,
    against: CocoResults | None = None,
    against_name: str = "the other results",
    seed: int = 0,
) -> Diagnosis:
    """Say what the detections of all annotated images are worth, and where they fail.

    annotations: the content of a COCO file. Further keys of its images, such as their weather, give slices.
    max_dets: most detections counted in an image and class. against: other results for the same images.
    Raises UserError as `coco_metrics` does.
    """
    comparison = Comparison(annotations, results, "bbox")
    matching = match(comparison, max_dets)
    number = number_of_resamples(matching)
    draws = resamples(matching.number_of_images, number, seed)
    weights = np.column_stack((np.ones(len(draws), dtype=np.int32), draws))
    weighted = weighted_metrics(matching, weights)
    difference = None
    if against is not None:
        other = weighted_metrics(match(Comparison(annotations, against, "bbox"), max_dets), weights)
        difference = _difference(weighted, other, comparison.names, max_dets, against_name)
    evaluation = hotcoco_evaluation(comparison, max_dets)
    thresholds = thresholds_of(matching, comparison.names, IOU)

    counted = np.zeros(len(comparison.found.scores), dtype=bool)
    counted[matching.rows[matching.counted(IOU)]] = True
    without_crowds = hotcoco_evaluation(selected(comparison, counted), max_dets)
    least = np.array([thresholds.per_class[name].score if thresholds else _WITHOUT for name in comparison.names])
    kept = counted & (comparison.found.scores >= least[comparison.found.categories])
    chosen = selected(comparison, kept)
    above = hotcoco_evaluation(chosen, max_dets)
    rows = {comparison.images[identity(row["id"])]: row for row in annotations["images"]}
    listed = [rows[place] for place in range(len(rows))]
    images = ImageList(above, chosen, listed, IOU)
    return Diagnosis(
        images=matching.number_of_images,
        objects=int((~comparison.truth.crowds).sum()),
        detections=int(counted.sum()),
        kept=int(kept.sum()),
        max_dets=max_dets,
        resamples=number,
        seed=seed,
        metrics={name: interval(values) for name, values in weighted.summary(max_dets).items()},
        curves=_curves(evaluation),
        classes=_classes(comparison, matching, weighted, thresholds),
        errors=error_costs(without_crowds),
        confusion=confusion(above, comparison.names, max_dets),
        calibration=calibration(without_crowds, int(counted.sum())),
        worst=images.worst(),
        suspects=images.suspects(),
        slices=slices(matching, listed, number, seed),
        difference=difference,
    )


def _curves(evaluation: Any) -> dict[str, np.ndarray]:
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (IoUs, recalls, classes)
    places = [int(np.abs(THRESHOLDS - iou).argmin()) for iou in _CURVES]
    valid = (precision > -1).all((0, 1))
    if not valid.any():
        return {}
    return {f"{iou:.2f}": precision[place][:, valid].mean(1) for iou, place in zip(_CURVES, places, strict=True)}


def _classes(
    comparison: Comparison, matching: Matching, weighted: Weighted, thresholds: Thresholds | None
) -> list[ClassDiagnosis]:
    objects = np.bincount(matching.object_classes[matching.wanted[0]], minlength=len(comparison.names))
    ap = weighted.per_class()
    sizes = weighted.ap[0].mean(-1)
    return [
        ClassDiagnosis(
            name=name,
            objects=int(objects[label]),
            ap=interval(ap[:, label]),
            ap50=_or_none(weighted.ap[0, label, 0, 0]),
            sizes={area: _or_none(sizes[label, place]) for place, area in enumerate(AREAS) if place},
            threshold=thresholds.per_class.get(name) if thresholds else None,
        )
        for label, name in enumerate(comparison.names)
    ]


def _difference(weighted: Weighted, others: Weighted, names: list[str], max_dets: int, name: str) -> Difference:
    own, theirs = weighted.summary(max_dets), others.summary(max_dets)
    classes = weighted.per_class() - others.per_class()
    return Difference(
        name=name,
        other={key: _or_none(values[0]) for key, values in theirs.items()},
        metrics={key: interval(own[key] - theirs[key]) for key in own},
        classes={key: interval(classes[:, label]) for label, key in enumerate(names)},
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
