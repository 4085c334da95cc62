"""A model's COCO metrics on a data set."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from detr import distributed
from detr.evaluation.coco import Backend, CocoMetrics, coco_metrics
from detr.evaluation.diagnostics import MatchingDiagnostics
from detr.postprocess import postprocess
from detr.types import Category, Detections, ImageBatch, Target


@dataclass(frozen=True)
class Evaluation:
    """Metrics, all detections as COCO results, and the first few images with what was found in them.

    diagnostics: by name, where the evaluator was given any.
    """

    metrics: CocoMetrics
    results: list[dict[str, Any]]
    samples: list[tuple[UInt8[Tensor, "3 _ _"], Detections]]
    diagnostics: dict[str, float]


class CocoEvaluator:
    """Runs a model over every image of a loader once and compares with the annotations.

    loader: batches of (ImageBatch, targets), sized.
    annotations: the COCO annotations of the loader's images, as a file or its content.
    categories: the model's classes, in the order of its labels; they give the category ids of the results.
    samples: number of images to keep for drawing.
    limit: evaluate on about so many images instead of all, for a quick look.
    diagnostics: what to measure beside the metrics.
    """

    def __init__(
        self,
        *,
        loader: Iterable[tuple[ImageBatch, Sequence[Target]]],
        annotations: str | Path | Mapping[str, Any],
        categories: Sequence[Category],
        backend: Backend = "faster",
        max_dets: int = 100,
        samples: int = 8,
        limit: int | None = None,
        diagnostics: MatchingDiagnostics | None = None,
    ) -> None:
        self.loader, self.annotations, self.categories = loader, annotations, categories
        self.backend, self.max_dets, self.samples = backend, max_dets, samples
        self.limit, self.diagnostics = limit, diagnostics

    @torch.inference_mode()
    def __call__(self, model: nn.Module, stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """The evaluation, in process 0 of all that have a part of the images; None in the others.

        stop: asked after each batch; where it becomes true in any process, all give up and return None.
        The model is left in evaluation mode.
        """
        model.eval()
        device = next(model.parameters()).device
        names = [category.name for category in self.categories]
        results: list[dict[str, Any]] = []
        samples: list[tuple[Tensor, Detections]] = []
        measured: list[dict[str, Tensor]] = []
        seen: list[int] = []
        stopped = False
        for batch, targets in self.loader:
            predictions = model(batch.to(device).normalized())
            found = postprocess(predictions, [target.original_size for target in targets], names)
            for index, (target, detections) in enumerate(zip(targets, found, strict=True)):
                results += to_results(detections, target.image_id, self.categories)
                if len(samples) < self.samples:
                    samples.append(_sample(batch, index, target, detections))
            if self.diagnostics:
                measured.append(self.diagnostics.measure(predictions, targets, found))
            seen += [target.image_id for target in targets]
            stopped = stop()
            if stopped or (self.limit is not None and len(seen) * distributed.world_size() >= self.limit):
                break
        if distributed.any_of(stopped):
            return None
        parts = distributed.gather_objects((results, measured, seen))
        if not parts:
            return None
        results, measured, seen = ([row for rows in part for row in rows] for part in zip(*parts, strict=True))
        annotations = self.annotations if self.limit is None else _only(self.annotations, set(seen))
        metrics = coco_metrics(annotations, results, backend=self.backend, max_dets=self.max_dets)
        diagnostics = self.diagnostics.summarize(measured) if self.diagnostics else {}
        return Evaluation(metrics=metrics, results=results, samples=samples, diagnostics=diagnostics)


def _only(annotations: str | Path | Mapping[str, Any], images: Collection[int]) -> dict[str, Any]:
    """The annotations of some images."""
    content = annotations if isinstance(annotations, Mapping) else json.loads(Path(annotations).read_text())
    return {
        **content,
        "images": [row for row in content["images"] if row["id"] in images],
        "annotations": [row for row in content["annotations"] if row["image_id"] in images],
    }


def to_results(detections: Detections, image_id: int, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Detections of one image as COCO results."""
    boxes = torch.cat((detections.boxes[:, :2], detections.boxes[:, 2:] - detections.boxes[:, :2]), dim=1)
    return [
        {"image_id": image_id, "category_id": categories[label].id, "bbox": box, "score": score}
        for box, score, label in zip(
            boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]


def _sample(batch: ImageBatch, index: int, target: Target, found: Detections) -> tuple[Tensor, Detections]:
    """One image without its padding, and its detections in the pixels of that."""
    valid = ~batch.mask[index]
    height, width = int(valid[:, 0].sum()), int(valid[0].sum())
    original_height, original_width = target.original_size
    scale = torch.tensor([width / original_width, height / original_height]).repeat(2)
    return batch.images[index, :, :height, :width].clone(), replace(found, boxes=found.boxes * scale)
