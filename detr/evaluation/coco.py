"""The COCO detection metrics (Lin et al., ECCV 2014; https://cocodataset.org/#detection-eval)."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from detr.errors import UserError
from detr.evaluation.backends import Backend, check_backend, hotcoco_evaluation, pycocotools_evaluation
from detr.evaluation.comparison import Comparison, IouType, loaded
from detr.evaluation.panoptic import PanopticMetrics
from detr.evaluation.results import CocoResults
from detr.evaluation.thresholds import Thresholds, best_thresholds
from detr.text import printable

logger = logging.getLogger(__name__)
_AREAS = ("all", "small", "medium", "large")
_MASK = "mask_"


@dataclass(frozen=True)
class CocoMetrics:
    """Averages over all classes, and for each class by name; in [0, 1], or -1 where there is nothing to find.

    summary: AP (over IoU 0.50 to 0.95), AP50, AP75, APs, APm, APl (by area), AR1, AR10, AR100 (by detections per
        image), ARs, ARm, ARl; where masks were compared beside boxes, those of masks too, as mask_AP and so on.
    per_class: AP, AP50, AP75 and AR100 of each class, and likewise mask_AP and so on.
    thresholds: with the best F1 at an IoU of 0.5; None where nothing is found, or they were not asked for.
    panoptic: of data with panoptic annotations, whose summary is a part of `summary` too.
    """

    summary: dict[str, float]
    per_class: dict[str, dict[str, float]]
    thresholds: Thresholds | None = None
    panoptic: PanopticMetrics | None = None

    def as_json(self, **more: Any) -> str:
        """{"bbox": summary, "segm": that of masks, "panoptic": ..., "per_class": ..., "thresholds": ...}, and `more`.

        "segm", whose names are those of "bbox", "panoptic" and "thresholds" only where there are any.
        """
        boxes, masks = self._summaries()
        optional: dict[str, Any] = {"segm": masks} if masks else {}
        if self.panoptic is not None:
            optional["panoptic"] = {**self.panoptic.summary, "per_class": self.panoptic.per_class}
        thresholds = {} if self.thresholds is None else {"thresholds": self.thresholds.content()}
        content = {"bbox": boxes, **optional, "per_class": self.per_class, **thresholds, **more}
        return json.dumps(content, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.as_json())

    def table(self) -> str:
        """Both parts as text."""
        boxes, masks = self._summaries()
        lines = ["  ".join(f"{name} {value:.3f}" for name, value in summary.items()) for summary in (boxes, masks)]
        lines = [f"Boxes: {lines[0]}", f"Masks: {lines[1]}"] if masks else lines[:1]
        if self.panoptic is not None:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in self.panoptic.summary.items())
            lines.append(f"Panoptic: {shown}")
        rows = {printable(name): values for name, values in self.per_class.items()}
        width = max([len(name) for name in rows] + [5])
        columns = list(next(iter(rows.values()), {}))
        wide = max(8, *(len(column) + 2 for column in columns)) if columns else 8
        lines.append(f"{'class':<{width}}" + "".join(f"{column:>{wide}}" for column in columns))
        for name, values in rows.items():
            lines.append(f"{name:<{width}}" + "".join(f"{values[column]:{wide}.3f}" for column in columns))
        return "\n".join(lines)

    def with_masks(self, masks: "CocoMetrics") -> "CocoMetrics":
        """These, of boxes, with those of masks beside them."""
        per_class = {name: {**own, **_of_masks(masks.per_class[name])} for name, own in self.per_class.items()}
        return replace(self, summary={**self.summary, **_of_masks(masks.summary)}, per_class=per_class)

    def with_panoptic(self, panoptic: PanopticMetrics) -> "CocoMetrics":
        """These, with the panoptic quality beside them."""
        return replace(self, summary={**self.summary, **panoptic.summary}, panoptic=panoptic)

    def _summaries(self) -> tuple[dict[str, float], dict[str, float]]:
        """Of boxes, and of masks under the same names."""
        others = () if self.panoptic is None else self.panoptic.summary
        boxes = {
            name: value for name, value in self.summary.items() if not name.startswith(_MASK) and name not in others
        }
        masks = {name[len(_MASK) :]: value for name, value in self.summary.items() if name.startswith(_MASK)}
        return boxes, masks


def _of_masks(values: Mapping[str, float]) -> dict[str, float]:
    return {f"{_MASK}{name}": value for name, value in values.items()}


def evaluate_coco(
    annotations: str | Path | Mapping[str, Any],
    results: str | Path | Sequence[Mapping[str, Any]] | CocoResults,
    iou_type: IouType = "bbox",
    backend: Backend = "hotcoco",
    max_dets: int = 100,
) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; see `coco_metrics`."""
    return coco_metrics(annotations, results, iou_type, backend, max_dets).summary


def coco_metrics(
    annotations: str | Path | Mapping[str, Any],
    results: str | Path | Sequence[Mapping[str, Any]] | CocoResults,
    iou_type: IouType = "bbox",
    backend: Backend = "hotcoco",
    max_dets: int = 100,
    *,
    thresholds: bool = False,
) -> CocoMetrics:
    """Compare detections with the annotations of all images.

    annotations: COCO annotations, as a file or its content.
    results: COCO results, as a file, a list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}, or columns.
    iou_type: compare boxes, or masks ("segmentation").
    backend: `hotcoco`, or `pycocotools`, the reference; they agree to 1e-9.
    max_dets: most detections counted in an image, 100 by COCO's rules; AR100 is named after it.
    thresholds: also find the scores with the best F1, of boxes.

    Raises UserError where results belong to images that the annotations do not list, or are not finite.
    """
    check_backend(backend, "evaluate_coco: wanted backend")
    if max_dets <= 10:
        raise UserError(f"evaluate_coco: wanted max_dets above 10, because AR10 is reported too, got {max_dets}.")
    if thresholds and iou_type != "bbox":
        raise UserError(
            f"coco_metrics: wanted iou_type 'bbox' for thresholds, got '{iou_type}'. Leave thresholds=False."
        )
    comparison = Comparison(annotations, results, iou_type)
    evaluate = hotcoco_evaluation if backend == "hotcoco" else pycocotools_evaluation
    metrics = _summarize(evaluate(comparison, max_dets), comparison.names, max_dets)
    return replace(metrics, thresholds=best_thresholds(comparison, max_dets=max_dets)) if thresholds else metrics


def box_and_mask_metrics(
    annotations: str | Path | Mapping[str, Any],
    results: CocoResults,
    backend: Backend = "hotcoco",
    max_dets: int = 100,
) -> CocoMetrics:
    """`coco_metrics` of boxes, with thresholds, and of masks too where both sides have them.

    Areas are those of the masks where masks are compared, as with COCO's results of masks, which have no boxes.
    """
    content = loaded(annotations)
    boxes = coco_metrics(content, results, "bbox", backend, max_dets, thresholds=True)
    if results.masks is None:
        return boxes
    missing = sum(not row.get("segmentation") for row in content["annotations"])
    if missing:
        text = "Masks are not compared, because %d of %d annotations have no segmentation."
        logger.warning(text, missing, len(content["annotations"]))
        return boxes
    return boxes.with_masks(coco_metrics(content, results, "segm", backend, max_dets))


def _summarize(evaluation: Any, names: Sequence[str], max_dets: int) -> CocoMetrics:
    # precision: (IoU thresholds, recall thresholds, classes, areas, max_dets); recall lacks the recall thresholds.
    values = evaluation.eval
    precision, recall = values["precision"], values["recall"]
    thresholds = np.asarray(evaluation.params.iouThrs)
    half, three_quarters = (int(np.abs(thresholds - value).argmin()) for value in (0.5, 0.75))

    def mean(values: np.ndarray) -> float:
        valid = values[values > -1]
        return float(valid.mean()) if valid.size else -1.0

    summary = {
        "AP": mean(precision[..., 0, 2]),
        "AP50": mean(precision[half, ..., 0, 2]),
        "AP75": mean(precision[three_quarters, ..., 0, 2]),
        **{f"AP{_AREAS[area][0]}": mean(precision[..., area, 2]) for area in (1, 2, 3)},
        **{f"AR{count}": mean(recall[..., 0, place]) for place, count in enumerate((1, 10, max_dets))},
        **{f"AR{_AREAS[area][0]}": mean(recall[..., area, 2]) for area in (1, 2, 3)},
    }
    per_class = {
        name: {
            "AP": mean(precision[:, :, k, 0, 2]),
            "AP50": mean(precision[half, :, k, 0, 2]),
            "AP75": mean(precision[three_quarters, :, k, 0, 2]),
            f"AR{max_dets}": mean(recall[:, k, 0, 2]),
        }
        for k, name in enumerate(names)
    }
    return CocoMetrics(summary=summary, per_class=per_class)
