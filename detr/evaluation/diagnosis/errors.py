"""What errors cost, what is taken for what, and how far scores can be trusted; counted by hotcoco."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from detr.evaluation.comparison import Comparison, Entries

IOU, BACKGROUND_IOU, BINS = 0.5, 0.1, 10
# Names of TIDE's errors.
NAMES = {
    "Cls": "class",
    "Loc": "localization",
    "Both": "class and localization",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


@dataclass(frozen=True)
class ErrorCost:
    """One kind of error: the AP50 that is gained where all of it are mended, and how many there are."""

    name: str
    cost: float
    count: int


@dataclass(frozen=True)
class ConfusedPair:
    """How many objects of a class were found as another one, and their share of the objects of that class."""

    true: str
    found_as: str
    count: int
    share: float


@dataclass(frozen=True, eq=False)
class Confusion:
    """What became of objects, (K + 1, K + 1): rows are true classes, columns what they were found as.

    The last row holds detections where there is no object, the last column objects that were not found.
    pairs: of different classes, the most frequent first.
    """

    names: list[str]
    matrix: Int64[np.ndarray, "k1 k1"]
    pairs: list[ConfusedPair]


@dataclass(frozen=True)
class Bin:
    """Detections with scores from `low` to `high`: their number, mean score, and the share that is right."""

    low: float
    high: float
    count: int
    score: float
    right: float


@dataclass(frozen=True)
class Calibration:
    """error: the expected calibration error (Guo et al., ICML 2017): the mean gap between the score of detections and
    the share of them that is right, over bins weighted by their detections; None without detections."""

    error: float | None
    bins: list[Bin]


def selected(comparison: Comparison, detections: Bool[np.ndarray, " n"]) -> Comparison:
    """The same comparison with some of its detections, and without crowds.

    hotcoco and TIDE's authors disagree on crowds, so what found one is to be left out by `detections`.
    """
    part = copy(comparison)
    part.truth = _rows(comparison.truth, ~comparison.truth.crowds)
    part.found = _rows(comparison.found, detections)
    return part


def error_costs(evaluation: Any) -> list[ErrorCost]:
    """TIDE (Bolya et al., ECCV 2020) at an IoU of 0.5, and of 0.1 for the background; the most costly first.

    evaluation: hotcoco's of `selected` detections.
    """
    found = evaluation.tide_errors(pos_thr=IOU, bg_thr=BACKGROUND_IOU)
    costs = [
        ErrorCost(name, max(found["delta_ap"][key], 0.0), found["counts"].get(key, 0)) for key, name in NAMES.items()
    ]
    return sorted(costs, key=lambda error: -error.cost)


def confusion(evaluation: Any, names: list[str], max_dets: int) -> Confusion:
    """Each detection, the best scores first, takes the free object that it overlaps most, whatever its class."""
    matrix = evaluation.confusion_matrix(iou_thr=IOU, max_det=len(names) * max_dets)["matrix"].astype(np.int64)
    inner = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    totals = np.maximum(matrix.sum(1), 1)
    order = np.argsort(-inner, axis=None, kind="stable")[: np.count_nonzero(inner)]
    rows, columns = np.unravel_index(order, inner.shape)
    pairs = [
        ConfusedPair(names[row], names[column], int(inner[row, column]), float(inner[row, column] / totals[row]))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return Confusion(names, matrix, pairs)


def calibration(evaluation: Any, detections: int) -> Calibration:
    """A detection is right where COCO's matching gives it an object at an IoU of 0.5."""
    if not detections:
        return Calibration(None, [])
    found = evaluation.calibration(n_bins=BINS, iou_threshold=IOU)
    bins = [
        Bin(part["bin_lower"], part["bin_upper"], part["count"], part["avg_confidence"], part["avg_accuracy"])
        for part in found["bins"]
        if part["count"]
    ]
    return Calibration(found["ece"], bins)


def _rows(entries: Entries, chosen: Bool[np.ndarray, " n"]) -> Entries:
    arrays = {name: value[chosen] for name, value in vars(entries).items() if isinstance(value, np.ndarray)}
    return replace(entries, **arrays)
