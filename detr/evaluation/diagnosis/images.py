"""The images with the most errors, and annotations that may be wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from detr.annotations import identity
from detr.evaluation.comparison import Comparison

MOST_IMAGES, MOST_SUSPECTS = 8, 12
Suspicion = Literal["another class", "not annotated"]
_KINDS: dict[str, Suspicion] = {"wrong_label": "another class", "missing_annotation": "not annotated"}


@dataclass(frozen=True)
class Box:
    """An object or a detection: box as x, y, width, height in pixels. right: it was found, or found something."""

    label: int
    name: str
    box: tuple[float, ...]
    score: float
    right: bool


@dataclass(frozen=True)
class ImageErrors:
    """An image with what is annotated, without crowds, and the detections above their thresholds.

    wrong: detections that found nothing. missed: objects that nothing found.
    """

    image_id: int | str
    file_name: str
    wrong: int
    missed: int
    truth: list[Box]
    found: list[Box]


@dataclass(frozen=True)
class Suspect:
    """A detection that may be right where the annotation is not.

    kind: it overlaps an object of another class, which nothing of that class found ("another class", with `annotated`
        as that class), or hardly overlaps any object ("not annotated").
    """

    kind: Suspicion
    image_id: int | str
    file_name: str
    found: Box
    annotated: Box | None


class ImageList:
    """The images of a comparison, with their boxes.

    evaluation: of `comparison`, whose detections are those above their thresholds, and which has no crowds.
    rows: of the images in the annotations.
    """

    def __init__(self, evaluation: Any, comparison: Comparison, rows: Sequence[Mapping[str, Any]], iou: float) -> None:
        self.comparison = comparison
        self.found = evaluation.image_diagnostics(iou_thr=iou, score_thr=0.0)
        self.ids = list(comparison.images)
        self.files = {comparison.images[identity(row["id"])]: str(row.get("file_name", row["id"])) for row in rows}

    def worst(self, most: int = MOST_IMAGES) -> list[ImageErrors]:
        """Those with the most errors, wrong detections and missed objects alike."""
        counts = {
            image: (part["fp"], part["fn"])
            for image, part in self.found["img_summary"].items()
            if part["fp"] + part["fn"]
        }
        order = sorted(counts, key=lambda image: (-sum(counts[image]), image))[:most]
        truth, found = self.comparison.truth, self.comparison.found
        return [
            ImageErrors(
                image_id=self.ids[image],
                file_name=self.files[image],
                wrong=counts[image][0],
                missed=counts[image][1],
                truth=[self._object(row) for row in np.flatnonzero(truth.images == image).tolist()],
                found=sorted(
                    (self._detection(row) for row in np.flatnonzero(found.images == image).tolist()),
                    key=lambda box: -box.score,
                ),
            )
            for image in order
        ]

    def suspects(self, most: int = MOST_SUSPECTS) -> list[Suspect]:
        """The detections with the best scores that no annotation agrees with."""
        errors = [error for error in self.found["label_errors"] if error["type"] in _KINDS]
        errors.sort(key=lambda error: (-error["dt_score"], error["dt_id"]))
        return [
            Suspect(
                kind=_KINDS[error["type"]],
                image_id=self.ids[error["image_id"]],
                file_name=self.files[error["image_id"]],
                found=self._detection(error["dt_id"] - 1),
                annotated=self._object(error["gt_id"] - 1) if error["type"] == "wrong_label" else None,
            )
            for error in errors[:most]
        ]

    def _object(self, row: int) -> Box:
        truth = self.comparison.truth
        label = int(truth.categories[row])
        return Box(
            label=label,
            name=self.comparison.names[label],
            box=tuple(truth.boxes[row].tolist()),
            score=1.0,
            right=self.found["gt_status"].get(row + 1) == "matched",
        )

    def _detection(self, row: int) -> Box:
        found = self.comparison.found
        label = int(found.categories[row])
        return Box(
            label=label,
            name=self.comparison.names[label],
            box=tuple(found.boxes[row].tolist()),
            score=float(found.scores[row]),
            right=self.found["dt_status"].get(row + 1) == "tp",
        )
