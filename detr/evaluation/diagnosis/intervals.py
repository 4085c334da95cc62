"""COCO's metrics with images weighted: their bootstrap intervals, differences of two results, and slices.

A bootstrap (Efron, 1979) draws as many images as there are, with replacement. An image that is drawn twice counts
twice, so that a resample is a weight for each image; none needs another matching.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer
from scipy.sparse import csr_array

from detr.evaluation.matching import AREAS, THRESHOLDS, Matching

LEVEL = 0.95
_RECALLS = np.linspace(0, 1, 101)
# pycocotools compares a recall of k/100 with a threshold that rounding can have made larger.
_ABOVE = (_RECALLS - np.arange(101) / 100) > 0
_ROUNDING = 1e-9  # far less than between two recalls
_FEW = (1, 10)  # detections of an image and class for AR1 and AR10
_WORK = 10_000_000  # detections of all resamples
_MOST = 2**22  # numbers that are worked on at a time


@dataclass(frozen=True)
class Interval:
    """A value, and the central interval of its resamples; low and high are None where it has no value in them.

    A value is None where there is nothing to find.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Weighted:
    """Metrics for R weightings of the images; NaN where there is nothing to find.

    ap: (R, K, A, T) of each class, area and threshold. recall: (R, K, A, T) likewise.
    few: (R, K, T, 2) recall of the best 1 and the best 10 detections of an image, for all areas.
    """

    ap: Float64[np.ndarray, "r k a t"]
    recall: Float64[np.ndarray, "r k a t"]
    few: Float64[np.ndarray, "r k t 2"]

    def at(self, chosen: slice) -> "Weighted":
        """A view of some weightings."""
        return Weighted(self.ap[chosen], self.recall[chosen], self.few[chosen])

    def summary(self, max_dets: int = 100) -> dict[str, Float64[np.ndarray, " r"]]:
        """The twelve numbers of COCO by name."""
        half, three_quarters = 0, 5
        return {
            "AP": _mean(self.ap[:, :, 0], (1, 2)),
            "AP50": _mean(self.ap[:, :, 0, half], 1),
            "AP75": _mean(self.ap[:, :, 0, three_quarters], 1),
            **{f"AP{AREAS[area][0]}": _mean(self.ap[:, :, area], (1, 2)) for area in (1, 2, 3)},
            **{f"AR{count}": _mean(self.few[..., place], (1, 2)) for place, count in enumerate(_FEW)},
            f"AR{max_dets}": _mean(self.recall[:, :, 0], (1, 2)),
            **{f"AR{AREAS[area][0]}": _mean(self.recall[:, :, area], (1, 2)) for area in (1, 2, 3)},
        }

    def per_class(self) -> Float64[np.ndarray, "r k"]:
        """AP of each class."""
        return self.ap[:, :, 0].mean(-1)


def number_of_resamples(matching: Matching) -> int:
    """1,000; fewer where there is much to resample, but at least 200: they take seconds, whatever the data."""
    return int(np.clip(_WORK / max(len(matching.matched), 1), 200, 1000))


def resamples(images: int, number: int, seed: int) -> Integer[np.ndarray, "images resamples"]:
    """How often each image is drawn."""
    if images == 0:
        return np.zeros((0, number), dtype=np.int32)
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=number)
    return np.ascontiguousarray(drawn.T.astype(np.int32))


def weighted_metrics(matching: Matching, weights: Integer[np.ndarray, "images r"], *, sizes: bool = True) -> Weighted:
    """The metrics for each weighting. sizes: also those of small, medium and large objects, else NaN."""
    weights = weights.astype(np.int32)
    shape = (weights.shape[1], matching.number_of_classes, len(AREAS), len(THRESHOLDS))
    weighted = Weighted(np.full(shape, np.nan), np.full(shape, np.nan), np.full((*shape[:2], shape[3], 2), np.nan))
    ends = np.searchsorted(matching.classes, np.arange(matching.number_of_classes + 1))
    ends_matched = np.searchsorted(matching.matched, ends)
    for label in range(matching.number_of_classes):
        detections, matched = slice(*ends[label : label + 2]), slice(*ends_matched[label : label + 2])
        width = max(_MOST // (matched.stop - matched.start + matching.number_of_images), 1)
        for start in range(0, shape[0], width):
            chosen = slice(start, start + width)
            for area in range(len(AREAS) if sizes else 1):
                _weight_class(matching, label, area, detections, matched, weights[:, chosen], weighted.at(chosen))
    return weighted


def _weight_class(
    matching: Matching,
    label: int,
    area: int,
    detections: slice,
    matched: slice,
    weights: Integer[np.ndarray, "images r"],
    to: Weighted,
) -> None:
    """Fill in the metrics of a class and a range of areas."""
    objects = (matching.object_classes == label) & matching.wanted[area]
    total = weights[matching.object_images[objects]].sum(0)
    if not total.any():
        return
    found, places = matching.found[matched, area], matching.matched[matched]
    own = weights[matching.images[places]]
    inside = matching.in_area[area]
    hit = (found >= 0) & matching.wanted[area][found]
    # A detection counts where it found an object that counts, or found none and is itself in the range.
    before = (_counted_before(matching, places, inside, detections) @ weights).cumsum(0, dtype=np.int32)
    change = np.where(found >= 0, hit.astype(np.int32) - inside[places, None], 0)
    few = [matching.rank[places] < most for most in _FEW]
    for column in range(len(THRESHOLDS)):
        rows = hit[:, column]
        counted = before
        if change[:, column].any():
            counted = before + (change[:, column, None] * own).cumsum(0, dtype=np.int32)
        true = own[rows].cumsum(0, dtype=np.int32)
        to.ap[:, label, area, column] = _average_precision(true, counted[rows], total)
        to.recall[:, label, area, column] = _ratio(own[rows].sum(0), total)
        if area == 0:
            for place, best in enumerate(few):
                to.few[:, label, column, place] = _ratio(own[rows & best].sum(0), total)


def _counted_before(matching: Matching, places: np.ndarray, inside: np.ndarray, detections: slice) -> csr_array:
    """(K, images) how many detections inside the range each image has after one matched one and up to the next."""
    own = np.arange(detections.start, detections.stop)[inside[detections]]
    own = own[own <= places[-1]] if len(places) else own[:0]
    segment = np.searchsorted(places, own)
    shape = (len(places), matching.number_of_images)
    return csr_array((np.ones(len(own), dtype=np.int32), (segment, matching.images[own])), shape=shape)


def _average_precision(
    true: Integer[np.ndarray, "k r"], counted: Integer[np.ndarray, "k r"], total: Integer[np.ndarray, " r"]
) -> Float64[np.ndarray, " r"]:
    """COCO's mean precision at 101 recalls. true, counted: up to each true positive; others lower the precision."""
    precision = np.maximum.accumulate(_ratio(true, counted, nothing=0.0)[::-1])[::-1]
    hundredths = (true * (100 / np.maximum(total, 1)) + _ROUNDING).astype(np.int32)
    reached = hundredths + 1 - ((100 * true == hundredths * total) & _ABOVE[hundredths])
    gained = np.diff(reached, axis=0, prepend=0)
    return np.where(total > 0, (precision * gained).sum(0) / len(_RECALLS), np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray, nothing: float = np.nan) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, float(nothing)), where=whole > 0)


def _mean(values: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """The mean of those that are not NaN, or NaN."""
    valid = ~np.isnan(values)
    return _ratio(np.where(valid, values, 0).sum(axes), valid.sum(axes))


def interval(values: Float64[np.ndarray, " r"]) -> Interval:
    """values: the value itself, then those of the resamples."""
    value, drawn = values[0], values[1:][~np.isnan(values[1:])]
    if np.isnan(value):
        return Interval(None)
    if not len(drawn):
        return Interval(float(value))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
