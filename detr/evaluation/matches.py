"""Which detections find which annotated boxes, by the rules of COCO at one overlap."""

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import pycocotools.mask
from jaxtyping import Bool, Int64

from detr.evaluation.comparison import Comparison, Entries

_LARGEST = 1e10  # area in pixels of what counts for all sizes
_ALMOST_ONE = 1 - 1e-10  # rounding must not keep equal boxes apart where an IoU of 1 is wanted


@dataclass(frozen=True, eq=False)
class CocoMatches:
    """What became of each detection of a comparison, and which of its annotations are to be found.

    annotations: (N,) the number of the annotation that a detection found, -1 for none.
    counted: (N,) whether a detection counts: not what found a crowd, nor what exceeds the most of an image and class.
    wanted: (M,) whether an annotation counts: it is no crowd.
    """

    annotations: Int64[np.ndarray, " n"]
    counted: Bool[np.ndarray, " n"]
    wanted: Bool[np.ndarray, " m"]

    @property
    def hits(self) -> Bool[np.ndarray, " n"]:
        """(N,) whether a detection found an annotation that counts."""
        return self.counted & (self.annotations >= 0)


def coco_matches(comparison: Comparison, iou: float = 0.5, max_dets: int = 100) -> CocoMatches:
    """Match the boxes of each image and class: the best scores first, each with the free annotation it overlaps most.

    Both back ends match by these rules, at ten overlaps and in four ranges of areas. One of them takes hotcoco half a
    second, but to list what it matched takes it a hundred times as long.

    iou: the least overlap. max_dets: most detections counted in an image and class, the best.
    """
    truth, found = comparison.truth, comparison.found
    ignored = truth.crowds | _of_no_size(truth)
    order, within = _ranked(found, max_dets)
    listed = np.lexsort((ignored, truth.images))
    annotations = np.full(len(found.scores), -1)
    for detections, objects in zip(
        _by_image(order, found, comparison), _by_image(listed, truth, comparison), strict=True
    ):
        if len(detections) and len(objects):
            _match(annotations, detections, objects, truth, found, ignored, min(iou, _ALMOST_ONE))
    free = annotations < 0
    not_counted = np.where(free, _of_no_size(found), False)
    not_counted[~free] = ignored[annotations[~free]]
    return CocoMatches(annotations=annotations, counted=within & ~not_counted, wanted=~ignored)


def _ranked(found: Entries, max_dets: int) -> tuple[Int64[np.ndarray, " kept"], Bool[np.ndarray, " n"]]:
    """The detections that are matched, image by image, the best scores first; and which of all these are."""
    order = np.lexsort((-found.scores, found.categories, found.images))
    images, categories = found.images[order], found.categories[order]
    places = np.arange(len(order))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (images[1:] != images[:-1]) | (categories[1:] != categories[:-1])
    rank = places - np.maximum.accumulate(np.where(first, places, 0))
    within = np.zeros(len(order), dtype=bool)
    within[order[rank < max_dets]] = True
    return order[rank < max_dets], within


def _by_image(order: Int64[np.ndarray, " k"], entries: Entries, comparison: Comparison) -> list[np.ndarray]:
    return np.split(order, np.searchsorted(entries.images[order], np.arange(1, len(comparison.images))))


def _match(
    annotations: Int64[np.ndarray, " n"],
    detections: Int64[np.ndarray, " d"],
    objects: Int64[np.ndarray, " g"],
    truth: Entries,
    found: Entries,
    ignored: Bool[np.ndarray, " m"],
    least: float,
) -> None:
    """Fill in what the detections of one image found; an object that counts goes before one that does not."""
    overlaps = pycocotools.mask.iou(found.boxes[detections], truth.boxes[objects], truth.crowds[objects].tolist())
    near = (found.categories[detections][:, None] == truth.categories[objects]) & (overlaps >= least)
    rows, columns = near.nonzero()
    pairs = zip(rows.tolist(), overlaps[near].tolist(), columns.tolist(), strict=True)
    crowds, skipped = truth.crowds[objects].tolist(), ignored[objects].tolist()
    taken: set[int] = set()
    for row, group in groupby(pairs, key=itemgetter(0)):
        free = [(not skipped[column], iou, column) for _, iou, column in group if crowds[column] or column not in taken]
        if free:
            *_, best = max(free)
            taken.add(best)
            annotations[detections[row]] = objects[best]


def _of_no_size(entries: Entries) -> Bool[np.ndarray, " n"]:
    return (entries.areas < 0) | (entries.areas > _LARGEST)
