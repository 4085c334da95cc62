"""The panoptic quality (Kirillov et al., CVPR 2019, https://arxiv.org/abs/1801.00868), by COCO's rules."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from detr.errors import UserError, brief
from detr.segments import VOID, Panoptic
from detr.types import Category

_IGNORED = 0.5  # a prediction that lies on void and crowds by more than this is none to count


@dataclass(frozen=True)
class PanopticMetrics:
    """Averages over classes, and for each class by name; in [0, 1], or -1 where there is nothing to find nor found.

    summary: PQ, SQ (the mean IoU of what was found) and RQ (the F1 of finding it) of all classes; PQ_th and so on of
        things; PQ_st and so on of stuff.
    per_class: PQ, SQ and RQ.
    """

    summary: dict[str, float]
    per_class: dict[str, dict[str, float]]


class PanopticQuality:
    """Adds up image after image what was found. A segment is found where one of its class has an IoU above 0.5 with it.

    Void pixels of the annotations count for no IoU. Crowds are not to be found. Predictions that are not matched are no
    false positives where more than half of them lies on void or on crowds of their class.

    categories: of the labels of all segments.
    totals: (K, 4) for each class the sum of the IoUs of what was found, and how many were found, found wrongly (false
        positives) and missed (false negatives). Those of several processes are added.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = categories
        self.totals: Float64[np.ndarray, "k 4"] = np.zeros((len(categories), 4))

    def add(self, truth: Panoptic, found: Panoptic) -> None:
        """One image. Raises UserError where the maps differ in size, or have ids that no segment has."""
        if truth.ids.shape != found.ids.shape:
            raise UserError(
                f"PanopticQuality: wanted two maps of one size, got {truth.ids.shape} of the annotations and "
                f"{found.ids.shape} of the predictions. Resize predictions to the original image."
            )
        # The last row is that of void, and so is the last column.
        columns = len(found.segments) + 1
        pairs = _places(truth, "annotations") * columns + _places(found, "predictions")
        shared = np.bincount(pairs.ravel(), minlength=(len(truth.segments) + 1) * columns).reshape(-1, columns)
        crowds = np.array([segment.crowd for segment in truth.segments], dtype=bool)
        labels, found_labels = _labels(truth), _labels(found)
        same = labels[:, None] == found_labels
        own = np.where(same, shared[:-1, :-1], 0)
        areas, void = shared[:, :-1].sum(0), shared[-1, :-1]
        union = shared[:-1].sum(1)[:, None] + areas - void - own
        overlaps = own / np.maximum(union, 1)
        matched = (overlaps > 0.5) & ~crowds[:, None]
        ignored = (void + own[crowds].sum(0)) / np.maximum(areas, 1) > _IGNORED
        columns_of_totals = (
            (labels, (overlaps * matched).sum(1)),
            (labels, matched.any(1)),
            (found_labels, ~matched.any(0) & ~ignored),
            (labels, ~matched.any(1) & ~crowds),
        )
        for column, (classes, values) in enumerate(columns_of_totals):
            self.totals[:, column] += np.bincount(classes, values, len(self.categories))

    def metrics(self) -> PanopticMetrics:
        """Of all images so far."""
        overlaps, found, wrong, missed = self.totals.T
        counted = self.totals[:, 1:].sum(1) > 0
        recognition = found / np.maximum(found + wrong / 2 + missed / 2, 0.5)
        segmentation = overlaps / np.maximum(found, 1)
        qualities = {"PQ": recognition * segmentation, "SQ": segmentation, "RQ": recognition}
        things = np.array([category.is_thing for category in self.categories], dtype=bool)
        kinds = {"": counted, "_th": counted & things, "_st": counted & ~things}
        return PanopticMetrics(
            summary={
                f"{name}{kind}": float(values[chosen].mean()) if chosen.any() else -1.0
                for kind, chosen in kinds.items()
                for name, values in qualities.items()
            },
            per_class={
                name: {
                    quality: float(values[label]) if counted[label] else -1.0 for quality, values in qualities.items()
                }
                for label, name in enumerate(_names(self.categories))
            },
        )


def _places(panoptic: Panoptic, source: str) -> Int64[np.ndarray, "height width"]:
    """For each pixel the index of its segment, and for void their number."""
    ids = [segment.id for segment in panoptic.segments]
    known = ids if VOID in ids else [*ids, VOID]
    order = np.argsort(known)
    listed = np.array(known)[order]
    places = np.searchsorted(listed, panoptic.ids).clip(max=len(listed) - 1)
    unknown = listed[places] != panoptic.ids
    if unknown.any():
        raise UserError(
            f"PanopticQuality: the map of the {source} has the id {panoptic.ids[unknown][0]}, which is none of its "
            f"segments, {brief(ids)}. List all of them."
        )
    return order[places]


def _labels(panoptic: Panoptic) -> Int64[np.ndarray, " n"]:
    return np.array([segment.label for segment in panoptic.segments], dtype=np.int64)


def _names(categories: Sequence[Category]) -> list[str]:
    """The id follows where two have the same name."""
    count = Counter(category.name for category in categories)
    return [one.name if count[one.name] == 1 else f"{one.name} ({one.id})" for one in categories]
