"""Detections of many images in columns, as metrics read them, and in rows, as COCO's files list them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from jaxtyping import Float64, Shaped

from detr.annotations import identity
from detr.types import Category, Detections


@dataclass(frozen=True, eq=False)
class CocoResults:
    """Detections in columns: half a million rows as dicts take longer to make than to evaluate.

    image_ids, category_ids: (N,) integers of any size, as in the annotations; texts for images without annotations.
    boxes: (N, 4) as x, y, width, height in pixels of the original image.
    scores: (N,).
    masks: a run-length encoding for each, or None for the outline of the box; None where there are no masks at all.
    areas: (N,) in pixels, which decide where masks are compared whether a detection is small, medium or large; None:
        those of the boxes, which decide where boxes are compared.
    """

    image_ids: Shaped[np.ndarray, " n"]
    category_ids: Shaped[np.ndarray, " n"]
    boxes: Float64[np.ndarray, "n 4"]
    scores: Float64[np.ndarray, " n"]
    masks: Sequence[Any] | None = None
    areas: Float64[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self) -> list[dict[str, Any]]:
        """As COCO's files list them, with "segmentation" where there are masks."""
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        masks = [None] * len(self) if self.masks is None else self.masks
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score, **_segmentation(mask)}
            for image, category, box, score, mask in zip(*(column.tolist() for column in columns), masks, strict=True)
        ]

    @classmethod
    def from_detections(
        cls, found: Detections, image_id: int | str, categories: Sequence[Category | None]
    ) -> "CocoResults":
        """Detections of one image. categories: of each label; detections with None are left out."""
        ids = [None if category is None else category.id for category in categories]
        if None in ids:
            found = found.select(torch.tensor([number is not None for number in ids])[found.labels].nonzero()[:, 0])
        boxes = torch.cat((found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]), dim=1)
        return cls(
            image_ids=_ids([image_id] * len(found)),
            category_ids=_ids([number for label in found.labels.tolist() if (number := ids[label]) is not None]),
            boxes=boxes.double().numpy(),
            scores=found.scores.double().numpy(),
            masks=None if found.masks is None else found.masks.rows(),
            areas=None if found.masks is None else found.masks.areas(),
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], *, masks: bool = False) -> "CocoResults":
        """Rows of COCO results. masks: read their masks too, whose areas count where the first row has no box."""
        encoded = [row.get("segmentation") for row in rows] if masks else []
        boxed = not encoded or len(rows[0].get("bbox", ())) > 0  # the first row decides for all, as in pycocotools
        boxes = [row["bbox"] for row in rows] if boxed else [pycocotools.mask.toBbox(mask) for mask in encoded]
        return cls(
            image_ids=_ids([identity(row["image_id"]) for row in rows]),
            category_ids=_ids([identity(row["category_id"]) for row in rows]),
            boxes=np.array(boxes, dtype=float).reshape(-1, 4),
            scores=np.array([row["score"] for row in rows], dtype=float),
            masks=encoded if masks else None,
            areas=None if boxed else np.array([pycocotools.mask.area(mask) for mask in encoded], dtype=float),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["CocoResults"]) -> "CocoResults":
        """One part after the other. Where one has masks, the boxes of those without stand for theirs."""
        parts = [cls.from_rows([]), *parts]
        masked = any(part.masks is not None for part in parts)
        return cls(
            image_ids=np.concatenate([part.image_ids for part in parts]),
            category_ids=np.concatenate([part.category_ids for part in parts]),
            boxes=np.concatenate([part.boxes for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            masks=[mask for part in parts for mask in part.masks or [None] * len(part)] if masked else None,
            areas=np.concatenate([part.mask_areas() for part in parts]) if masked else None,
        )

    def box_areas(self) -> Float64[np.ndarray, " n"]:
        """In pixels."""
        return self.boxes[:, 2] * self.boxes[:, 3]

    def mask_areas(self) -> Float64[np.ndarray, " n"]:
        """In pixels; those of the boxes where `areas` has none."""
        return self.box_areas() if self.areas is None else self.areas


def to_results(
    detections: Detections, image_id: int | str, categories: Sequence[Category | None]
) -> list[dict[str, Any]]:
    """Detections of one image as rows of COCO results. categories: as in `CocoResults.from_detections`."""
    return CocoResults.from_detections(detections, image_id, categories).rows()


def _segmentation(mask: Any) -> dict[str, Any]:
    """As JSON can hold it."""
    if isinstance(mask, dict) and isinstance(mask["counts"], bytes):
        mask = {**mask, "counts": mask["counts"].decode()}
    return {} if mask is None else {"segmentation": mask}


def _ids(values: Sequence[int | str]) -> np.ndarray:
    """Python's integers: some ids exceed 64 bits, and numpy would round a mixture of sizes to floats."""
    return np.array(values, dtype=object)
