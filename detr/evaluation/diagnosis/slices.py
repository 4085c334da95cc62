"""Groups of images by what is known of them, to see where a detector is worse."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool

from detr.annotations import COCO_KEYS
from detr.evaluation.diagnosis.intervals import Interval, interval, resamples, weighted_metrics
from detr.evaluation.matching import Matching

_MOST_ATTRIBUTES, _MOST_VALUES = 8, 8
SIZE, OBJECTS = "image size in pixels", "objects in the image"


@dataclass(frozen=True)
class Slice:
    """The images with one value of an attribute: their number, that of their objects, and their AP and AP50."""

    attribute: str
    value: str
    images: int
    objects: int
    ap: Interval
    ap50: Interval


def slices(matching: Matching, rows: Sequence[Mapping[str, Any]], number: int, seed: int) -> list[Slice]:
    """AP of the images with each value of each attribute.

    rows: of the images, in the order of their numbers. number, seed: of the resamples.

    Attributes are the keys of the rows that COCO does not have, with a text, number or bool, and more than one value;
    the size of the images; and their number of objects. Numbers of many values are grouped by their quartiles. Texts
    of more than eight values have the eight most frequent ones.
    """
    wanted = matching.wanted[0]
    objects = np.bincount(matching.object_images[wanted], minlength=len(rows))
    found = []
    for attribute, groups in _attributes(rows, objects).items():
        for value, images in groups.items():
            part = _only(matching, images)
            weights = np.column_stack((np.ones(images.sum(), dtype=int), resamples(int(images.sum()), number, seed)))
            summary = weighted_metrics(part, weights, sizes=False).summary()
            found.append(
                Slice(
                    attribute=attribute,
                    value=value,
                    images=int(images.sum()),
                    objects=int(objects[images].sum()),
                    ap=interval(summary["AP"]),
                    ap50=interval(summary["AP50"]),
                )
            )
    return found


def _attributes(rows: Sequence[Mapping[str, Any]], objects: np.ndarray) -> dict[str, dict[str, Bool[np.ndarray, " n"]]]:
    """The groups of images, by attribute and value."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in COCO_KEYS]
    columns = {name: [row.get(name) for row in rows] for name in names if not name.endswith("_url")}
    columns = {name: values for name, values in columns.items() if not any(isinstance(v, list | dict) for v in values)}
    sizes = [row["height"] * row["width"] if {"height", "width"} <= row.keys() else None for row in rows]
    groups = {name: _groups(values) for name, values in columns.items()}
    groups = {name: found for name, found in groups.items() if len(found) > 1}
    groups = dict(list(groups.items())[:_MOST_ATTRIBUTES])
    computed = {SIZE: _groups(sizes), OBJECTS: _groups([int(count) or None for count in objects])}
    return groups | {name: found for name, found in computed.items() if len(found) > 1}


def _groups(values: Sequence[Any]) -> dict[str, Bool[np.ndarray, " n"]]:
    counts = Counter(value for value in values if value is not None)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in counts)
    if numbers and len(counts) > _MOST_VALUES:
        return _quartiles(values)
    if len(counts) > max(len(values) // 2, 1):  # nearly every image has its own
        return {}
    chosen = [value for value, _ in counts.most_common(_MOST_VALUES)]
    chosen = sorted(chosen) if numbers else chosen
    return {_text(value): np.array([other == value for other in values]) for value in chosen}


def _quartiles(values: Sequence[Any]) -> dict[str, Bool[np.ndarray, " n"]]:
    column = np.array([np.nan if value is None else float(value) for value in values])
    edges = np.unique(np.nanquantile(column, [0, 0.25, 0.5, 0.75, 1]))
    found = {}
    for low, high in pairwise(edges):
        last = high == edges[-1]
        inside = (column >= low) & ((column <= high) if last else (column < high))
        found[f"{_text(low)} to {'' if last else 'below '}{_text(high)}"] = inside
    return {name: inside for name, inside in found.items() if inside.any()}


def _text(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _only(matching: Matching, images: Bool[np.ndarray, " n"]) -> Matching:
    """The matching of some images, numbered anew."""
    numbers = images.cumsum() - 1
    kept, objects = images[matching.images], images[matching.object_images]
    places, rows = kept.cumsum() - 1, np.append(objects.cumsum() - 1, -1)
    matched = kept[matching.matched]
    return replace(
        matching,
        rows=matching.rows[kept],
        images=numbers[matching.images[kept]],
        classes=matching.classes[kept],
        scores=matching.scores[kept],
        rank=matching.rank[kept],
        in_area=matching.in_area[:, kept],
        matched=places[matching.matched[matched]],
        found=rows[matching.found[matched]],  # -1 is the last one
        object_images=numbers[matching.object_images[objects]],
        object_classes=matching.object_classes[objects],
        wanted=matching.wanted[:, objects],
        number_of_images=int(images.sum()),
    )
