"""A model's COCO metrics on a data set."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from detr import distributed
from detr.errors import NonFiniteError
from detr.evaluation.backends import Backend
from detr.evaluation.coco import CocoMetrics, box_and_mask_metrics
from detr.evaluation.comparison import loaded
from detr.evaluation.diagnostics import MatchingDiagnostics
from detr.evaluation.panoptic import PanopticQuality
from detr.evaluation.results import CocoResults
from detr.evaluation.samples import Sample, spread
from detr.panoptic import PUBLISHED_THRESHOLD, panoptic_segmentations
from detr.postprocess import PUBLISHED_PAIRS, Ranked, non_finite, postprocess
from detr.segments import Panoptic
from detr.types import Category, ImageBatch, Predictions, Target


@dataclass(frozen=True)
class Evaluation:
    """Metrics, all detections, and a few images with what is annotated and what was found in them.

    diagnostics: by name; empty where the evaluator has none.
    """

    metrics: CocoMetrics
    results: CocoResults
    samples: list[Sample]
    diagnostics: dict[str, float]


@dataclass(frozen=True)
class _Batch:
    """What one batch gives. measured: diagnostics; quality: totals of the panoptic quality; None without them."""

    results: CocoResults
    images: list[int]
    measured: dict[str, Tensor] | None
    quality: np.ndarray | None


class CocoEvaluator:
    """Runs a model over every image of a loader once and compares with the annotations.

    Masks are compared too, where the model finds them and the annotations have them.

    loader: batches of (ImageBatch, targets), sized.
    annotations: the COCO annotations of the loader's images, as a file or its content.
    categories: the model's classes, in the order of its labels; they give the category ids of the results. None: of no
        category of the annotations, so that its detections are left out.
    max_dets: the most detections of an image and class that are counted, by COCO's rules.
    samples: number of images to keep for drawing, from all over the data set.
    limit: evaluate on about this many images instead of all.
    diagnostics: what to measure besides the metrics.
    panoptic: gives what is annotated in the image of an id, with labels as ranks in the categories of the annotations;
        for the panoptic quality of models with masks. Segments of the model's other classes are void.
    panoptic_threshold: the least probability of what becomes a segment.
    """

    def __init__(
        self,
        *,
        loader: Iterable[tuple[ImageBatch, Sequence[Target]]],
        annotations: str | Path | Mapping[str, Any],
        categories: Sequence[Category | None],
        backend: Backend = "hotcoco",
        max_dets: int = 100,
        samples: int = 8,
        limit: int | None = None,
        diagnostics: MatchingDiagnostics | None = None,
        panoptic: Callable[[int], Panoptic] | None = None,
        panoptic_threshold: float = PUBLISHED_THRESHOLD,
    ) -> None:
        self.loader, self.annotations, self.categories = loader, annotations, categories
        self.backend, self.max_dets, self.samples = backend, max_dets, samples
        self.limit, self.diagnostics = limit, diagnostics
        self.panoptic, self.panoptic_threshold = panoptic, panoptic_threshold

    @torch.inference_mode()
    def __call__(self, model: nn.Module, stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """The evaluation in process 0, and None in the others; each process evaluates a part of the images.

        stop: called after each batch; if it is true in any process, all stop and return None.
        The model is left in evaluation mode. Raises NonFiniteError where its predictions are NaN or infinite.
        """
        model.eval()
        device = next(iter(model.parameters()), torch.empty(0)).device  # exported files have no parameters
        names = ["" if category is None else category.name for category in self.categories]
        done: list[_Batch] = []
        samples: list[Sample] = []
        known = None if self.panoptic is None else self._of_data()
        stopped, seen = False, 0
        most = max(self.max_dets, PUBLISHED_PAIRS)  # COCO counts max_dets of each class
        for number, (batch, targets) in enumerate(self.loader):
            predictions = model(batch.to(device))
            if damaged := non_finite(predictions):
                raise NonFiniteError("The model's predictions", [targets[index].image_id for index in damaged])
            originals = [target.original_size for target in targets]
            found = postprocess(predictions, originals, names, most, sizes=batch.sizes())
            results = [
                CocoResults.from_detections(detections, target.image_id, self.categories)
                for target, detections in zip(targets, found, strict=True)
            ]
            for index in range(min(spread(self.samples, self._batches(len(batch)), number), len(batch))):
                samples.append(Sample.of(batch, index, targets[index], found[index], names=names))
            done.append(
                _Batch(
                    results=CocoResults.concatenate(results),
                    images=[target.image_id for target in targets],
                    measured=self.diagnostics.measure(predictions, targets, found) if self.diagnostics else None,
                    quality=None if known is None else self._quality(known, predictions, batch, targets),
                )
            )
            seen += len(targets)
            stopped = stop()
            if stopped or (self.limit is not None and seen * distributed.world_size() >= self.limit):
                break
        if distributed.any_of(stopped):
            return None
        parts = distributed.gather_objects(done)
        if not parts:
            return None
        # In the order of the data, so that nothing depends on the number of processes.
        done = self._limited(batch for turn in zip_longest(*parts) for batch in turn if batch is not None)
        everything = CocoResults.concatenate([batch.results for batch in done])
        images = {image for batch in done for image in batch.images}
        annotations = self.annotations if self.limit is None else _only(self.annotations, images)
        metrics = box_and_mask_metrics(annotations, everything, self.backend, self.max_dets)
        if known is not None:
            quality = PanopticQuality(known)
            quality.totals = np.sum([batch.quality for batch in done if batch.quality is not None], axis=0)
            metrics = metrics.with_panoptic(quality.metrics())
        measured = [batch.measured for batch in done if batch.measured is not None]
        diagnostics = self.diagnostics.summarize(measured) if self.diagnostics else {}
        return Evaluation(metrics=metrics, results=everything, samples=samples, diagnostics=diagnostics)

    def _of_data(self) -> list[Category]:
        """The categories of the annotations."""
        rows = loaded(self.annotations)["categories"]
        return [Category(row["id"], row["name"], is_thing=bool(row.get("isthing", True))) for row in rows]

    def _limited(self, batches: Iterable[_Batch]) -> list[_Batch]:
        """The first batches, up to the one that reaches the limit."""
        kept: list[_Batch] = []
        images = 0
        for batch in batches:
            if self.limit is not None and images >= self.limit:
                break
            kept.append(batch)
            images += len(batch.images)
        return kept

    def _quality(
        self,
        categories: Sequence[Category],
        predictions: Predictions | Ranked,
        batch: ImageBatch,
        targets: Sequence[Target],
    ) -> np.ndarray:
        """The totals of PanopticQuality over a batch. categories: those of the annotations."""
        assert self.panoptic is not None
        originals = [target.original_size for target in targets]
        known = {category.id: rank for rank, category in enumerate(categories)}
        # What is no class of the data is merged like the others, and then void.
        own = [Category(-1, "") if one is None else categories[known[one.id]] for one in self.categories]
        found = panoptic_segmentations(
            predictions,
            batch.sizes(),
            originals,
            own,
            padded_size=predictions.mask_size,
            threshold=self.panoptic_threshold,
        )
        labels = {label: known[one.id] for label, one in enumerate(self.categories) if one is not None}
        quality = PanopticQuality(categories)
        for target, one in zip(targets, found, strict=True):
            quality.add(self.panoptic(target.image_id), one.numbered(labels))
        return quality.totals

    def _batches(self, size: int) -> int:
        """How many batches of this size there will be in this process."""
        batches = len(cast(Sized, self.loader))
        return batches if self.limit is None else min(-(-self.limit // (size * distributed.world_size())), batches)


def _only(annotations: str | Path | Mapping[str, Any], images: Collection[int]) -> dict[str, Any]:
    """The annotations of some images."""
    content = loaded(annotations)
    return {
        **content,
        "images": [row for row in content["images"] if row["id"] in images],
        "annotations": [row for row in content["annotations"] if row["image_id"] in images],
    }
