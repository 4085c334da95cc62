"""A model's COCO metrics on a data set."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

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
        diagnostics: MatchingDiagnostics | None = None,
    ) -> None:
        self.loader, self.annotations, self.categories = loader, annotations, categories
        self.backend, self.max_dets, self.samples = backend, max_dets, samples
        self.diagnostics = diagnostics

    @torch.inference_mode()
    def __call__(self, model: nn.Module, on_batch: Callable[[int], None] = lambda images: None) -> Evaluation:
        """on_batch: called with the number of images after each batch; an exception from it ends the evaluation.

        The model is left in evaluation mode.
        """
        model.eval()
        device = next(model.parameters()).device
        names = [category.name for category in self.categories]
        results: list[dict[str, Any]] = []
        samples: list[tuple[Tensor, Detections]] = []
        measured: list[dict[str, Tensor]] = []
        for batch, targets in self.loader:
            predictions = model(batch.to(device).normalized())
            found = postprocess(predictions, [target.original_size for target in targets], names)
            for index, (target, detections) in enumerate(zip(targets, found, strict=True)):
                results += to_results(detections, target.image_id, self.categories)
                if len(samples) < self.samples:
                    samples.append(_sample(batch, index, target, detections))
            if self.diagnostics:
                measured.append(self.diagnostics.measure(predictions, targets, found))
            on_batch(len(batch))
        metrics = coco_metrics(self.annotations, results, backend=self.backend, max_dets=self.max_dets)
        diagnostics = self.diagnostics.summarize(measured) if self.diagnostics else {}
        return Evaluation(metrics=metrics, results=results, samples=samples, diagnostics=diagnostics)


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
    found = Detections(boxes=found.boxes * scale, scores=found.scores, labels=found.labels, names=found.names)
    return batch.images[index, :, :height, :width].clone(), found
