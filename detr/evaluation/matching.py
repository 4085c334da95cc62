"""COCO's matching of detections with objects, at several overlaps and in ranges of areas, as arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import pycocotools.mask
from jaxtyping import Bool, Float64, Int64

from detr.evaluation.comparison import Comparison, Entries

THRESHOLDS: Float64[np.ndarray, " t"] = np.linspace(0.5, 0.95, 10)
AREAS = ("all", "small", "medium", "large")
_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # pixels
_ALMOST_ONE = 1 - 1e-10  # rounding must not keep equal boxes apart where an IoU of 1 is wanted


class Pair(NamedTuple):
    """A detection and an object of its class that overlap enough to be matched at some threshold."""

    detection: int  # its place in `Matching`
    overlap: float
    object: int  # its row in the annotations


@dataclass(frozen=True, eq=False)
class Matching:
    """What each detection found. Detections are sorted by class, then by falling score; equal ones by image.

    rows: (N,) rows of the comparison's detections; those beyond `max_dets` of an image and class are left out.
    images, classes, scores: (N,) of each detection. rank: (N,) its place among those of its image and class, from 0.
    in_area: (A, N) whether its own area is in a range of `AREAS`.
    matched: (K,) places of the detections that found anything at any threshold, rising.
    found: (K, A, T) the row of the object that each of them found, or -1.
    object_images, object_classes: (M,) of each annotation. wanted: (A, M) whether it is to be found: no crowd, and its
        area in the range.
    thresholds: (T,) the least overlaps.
    """

    rows: Int64[np.ndarray, " n"]
    images: Int64[np.ndarray, " n"]
    classes: Int64[np.ndarray, " n"]
    scores: Float64[np.ndarray, " n"]
    rank: Int64[np.ndarray, " n"]
    in_area: Bool[np.ndarray, "a n"]
    matched: Int64[np.ndarray, " k"]
    found: Int64[np.ndarray, "k a t"]
    object_images: Int64[np.ndarray, " m"]
    object_classes: Int64[np.ndarray, " m"]
    wanted: Bool[np.ndarray, "a m"]
    thresholds: Float64[np.ndarray, " t"]
    number_of_images: int
    number_of_classes: int

    def at(self, threshold: float) -> Int64[np.ndarray, " n"]:
        """The object that each detection found at this threshold in any area, or -1."""
        column = int(np.abs(self.thresholds - threshold).argmin())
        found = np.full(len(self.rows), -1)
        found[self.matched] = self.found[:, 0, column]
        return found

    def counted(self, threshold: float) -> Bool[np.ndarray, " n"]:
        """Whether each detection counts at this threshold, in any area: what found a crowd does not."""
        found = self.at(threshold)
        return np.where(found >= 0, np.append(self.wanted[0], False)[found], self.in_area[0])


def match(
    comparison: Comparison,
    max_dets: int = 100,
    *,
    thresholds: Sequence[float] | np.ndarray = THRESHOLDS,
    sizes: bool = True,
) -> Matching:
    """Match by COCO's rules (https://cocodataset.org/#detection-eval): boxes of one image and class, the best scores
    first, each with the free object that it overlaps most; one that does not count only where no other one is free.

    The back ends match in the same way, but hotcoco lists what it matched only as dicts, which takes five minutes for
    5,000 images, and pycocotools is slower still.

    thresholds: the least overlaps, rising. sizes: also in the ranges of small, medium and large objects.
    """
    truth, found = comparison.truth, comparison.found
    ranges = _RANGES if sizes else _RANGES[:1]
    least = np.minimum(thresholds, _ALMOST_ONE)
    order, rank = _ranked(found, max_dets)
    wanted = np.array([~truth.crowds & _within(truth.areas, *limits) for limits in ranges]).reshape(len(ranges), -1)
    hits: dict[int, np.ndarray] = {}
    for pairs in _groups(order, truth, found, least[0]):
        _match_group(pairs, truth.crowds, wanted, least, hits)
    places = sorted(hits)
    return Matching(
        rows=order,
        images=found.images[order],
        classes=found.categories[order],
        scores=found.scores[order],
        rank=rank,
        in_area=np.array([_within(found.areas[order], *limits) for limits in ranges]).reshape(len(ranges), -1),
        matched=np.array(places, dtype=np.int64),
        found=np.array([hits[place] for place in places], dtype=np.int64).reshape(-1, len(ranges), len(least)),
        object_images=truth.images,
        object_classes=truth.categories,
        wanted=wanted,
        thresholds=np.asarray(thresholds, dtype=np.float64),
        number_of_images=len(comparison.images),
        number_of_classes=len(comparison.names),
    )


def _within(areas: np.ndarray, low: float, high: float) -> np.ndarray:
    return (areas >= low) & (areas <= high)


def _ranked(found: Entries, max_dets: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the detections in the order of `Matching`, and the rank of each."""
    order = np.lexsort((-found.scores, found.categories, found.images))
    images, classes = found.images[order], found.categories[order]
    places = np.arange(len(order))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (images[1:] != images[:-1]) | (classes[1:] != classes[:-1])
    rank = places - np.maximum.accumulate(np.where(first, places, 0))
    order, rank = order[rank < max_dets], rank[rank < max_dets]
    by_class = np.lexsort((-found.scores[order], found.categories[order]))  # stable: images keep their order
    return order[by_class], rank[by_class]


def _groups(order: np.ndarray, truth: Entries, found: Entries, least: float) -> Iterator[list[Pair]]:
    """The pairs of each image and class with at least this overlap, the best detections first."""
    count = int(max(found.images.max(initial=-1), truth.images.max(initial=-1))) + 1
    by_image = np.argsort(found.images[order], kind="stable")  # so that places rise in each image
    detections = np.split(by_image, np.searchsorted(found.images[order][by_image], np.arange(1, count)))
    listed = np.argsort(truth.images, kind="stable")
    objects = np.split(listed, np.searchsorted(truth.images[listed], np.arange(1, count)))
    for places, own in zip(detections, objects, strict=True):
        if not len(places) or not len(own):
            continue
        rows = order[places]
        overlaps = pycocotools.mask.iou(found.boxes[rows], truth.boxes[own], truth.crowds[own].tolist())
        classes = found.categories[rows]
        near = (classes[:, None] == truth.categories[own]) & (overlaps >= least)
        group: list[Pair] = []
        last = -1
        at, column = near.nonzero()  # places rise with classes, then with falling scores
        for place, label, overlap, row in zip(
            places[at].tolist(), classes[at].tolist(), overlaps[near].tolist(), own[column].tolist(), strict=True
        ):
            if label != last and group:
                yield group
                group = []
            last = label
            group.append(Pair(place, overlap, row))
        if group:
            yield group


def _match_group(
    pairs: list[Pair], crowds: np.ndarray, wanted: np.ndarray, thresholds: np.ndarray, hits: dict[int, np.ndarray]
) -> None:
    """Add what each detection of an image and class found, (A, T), by its place."""
    objects = {pair.object for pair in pairs}
    crowd = {row for row in objects if crowds[row]}
    for area in range(len(wanted)):
        counting = {row for row in objects if wanted[area, row]}
        # Which objects count only matters where some do and others do not.
        if area > 0 and not crowd and len(counting) in (0, len(objects)):
            for place in {pair.detection for pair in pairs} & hits.keys():
                hits[place][area] = hits[place][0]
            continue
        for column, threshold in enumerate(thresholds.tolist()):
            for place, row in _greedy(pairs, threshold, crowd, counting).items():
                if place not in hits:
                    hits[place] = np.full((len(wanted), len(thresholds)), -1)
                hits[place][area, column] = row


def _greedy(pairs: list[Pair], threshold: float, crowd: set[int], counting: set[int]) -> dict[int, int]:
    """The object that each detection finds at one threshold; of equal overlaps the later object is found."""
    taken: set[int] = set()
    found: dict[int, int] = {}
    for place, own in groupby(pairs, key=itemgetter(0)):
        free = [
            (row in counting, overlap, row)
            for _, overlap, row in own
            if overlap >= threshold and (row in crowd or row not in taken)
        ]
        if free:
            found[place] = max(free)[2]
            taken.add(found[place])
    return found
