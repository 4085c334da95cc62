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
from detr.evaluation.backends import Backend
from detr.evaluation.coco import CocoMetrics, coco_metrics
from detr.evaluation.diagnostics import MatchingDiagnostics
from detr.evaluation.results import CocoResults
from detr.postprocess import postprocess
from detr.types import Category, Detections, ImageBatch, Target


@dataclass(frozen=True)
class Evaluation:
    """Metrics, all detections, and the first few images with what was found in them.

    diagnostics: by name; empty where the evaluator has none.
    """

    metrics: CocoMetrics
    results: CocoResults
    samples: list[tuple[UInt8[Tensor, "3 _ _"], Detections]]
    diagnostics: dict[str, float]


class CocoEvaluator:
    """Runs a model over every image of a loader once and compares with the annotations.

    loader: batches of (ImageBatch, targets), sized.
    annotations: the COCO annotations of the loader's images, as a file or its content.
    categories: the model's classes, in the order of its labels; they give the category ids of the results.
    samples: number of images to keep for drawing.
    limit: evaluate on about this many images instead of all.
    diagnostics: what to measure besides the metrics.
    """

    def __init__(
        self,
        *,
        loader: Iterable[tuple[ImageBatch, Sequence[Target]]],
        annotations: str | Path | Mapping[str, Any],
        categories: Sequence[Category],
        backend: Backend = "hotcoco",
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
        """The evaluation in process 0, and None in the others; each process evaluates a part of the images.

        stop: called after each batch; if it is true in any process, all stop and return None.
        The model is left in evaluation mode.
        """
        model.eval()
        device = next(model.parameters()).device
        names = [category.name for category in self.categories]
        results: list[CocoResults] = []
        samples: list[tuple[Tensor, Detections]] = []
        measured: list[dict[str, Tensor]] = []
        seen: list[int] = []
        stopped = False
        for batch, targets in self.loader:
            predictions = model(batch.to(device).normalized())
            found = postprocess(predictions, [target.original_size for target in targets], names)
            for index, (target, detections) in enumerate(zip(targets, found, strict=True)):
                results.append(CocoResults.from_detections(detections, target.image_id, self.categories))
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
        parts = distributed.gather_objects((CocoResults.concatenate(results), measured, seen))
        if not parts:
            return None
        everything = CocoResults.concatenate([part[0] for part in parts])
        measured = [batch for part in parts for batch in part[1]]
        seen = [image for part in parts for image in part[2]]
        annotations = self.annotations if self.limit is None else _only(self.annotations, set(seen))
        metrics = coco_metrics(annotations, everything, backend=self.backend, max_dets=self.max_dets)
        diagnostics = self.diagnostics.summarize(measured) if self.diagnostics else {}
        return Evaluation(metrics=metrics, results=everything, samples=samples, diagnostics=diagnostics)


def _only(annotations: str | Path | Mapping[str, Any], images: Collection[int]) -> dict[str, Any]:
    """The annotations of some images."""
    content = annotations if isinstance(annotations, Mapping) else json.loads(Path(annotations).read_text())
    return {
        **content,
        "images": [row for row in content["images"] if row["id"] in images],
        "annotations": [row for row in content["annotations"] if row["image_id"] in images],
    }


def _sample(batch: ImageBatch, index: int, target: Target, found: Detections) -> tuple[Tensor, Detections]:
    """One image without its padding, and its detections in its pixels."""
    valid = ~batch.mask[index]
    height, width = int(valid[:, 0].sum()), int(valid[0].sum())
    original_height, original_width = target.original_size
    scale = torch.tensor([width / original_width, height / original_height]).repeat(2)
    return batch.images[index, :, :height, :width].clone(), replace(found, boxes=found.boxes * scale)
