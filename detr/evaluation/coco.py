"""The COCO detection metrics (Lin et al., ECCV 2014; https://cocodataset.org/#detection-eval)."""

import contextlib
import gc
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from detr.errors import UserError

logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it reports every stage

Backend = Literal["faster", "pycocotools"]
_AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class CocoMetrics:
    """Averages over all classes, and for each class by name; in [0, 1], or -1 where there is nothing to find.

    summary: AP (over IoU 0.50 to 0.95), AP50, AP75, APs, APm, APl (by area), AR1, AR10, AR100 (by detections an
        image), ARs, ARm, ARl.
    per_class: AP, AP50, AP75 and AR100 of each class.
    """

    summary: dict[str, float]
    per_class: dict[str, dict[str, float]]

    def save(self, path: str | Path) -> None:
        """Write as {"bbox": summary, "per_class": ...}."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"bbox": self.summary, "per_class": self.per_class}, indent=2) + "\n")

    def table(self) -> str:
        """Both parts as text."""
        lines = ["  ".join(f"{name} {value:.3f}" for name, value in self.summary.items())]
        width = max([len(name) for name in self.per_class] + [5])
        columns = list(next(iter(self.per_class.values()), {}))
        lines.append(f"{'class':<{width}}" + "".join(f"{column:>8}" for column in columns))
        for name, values in self.per_class.items():
            lines.append(f"{name:<{width}}" + "".join(f"{values[column]:8.3f}" for column in columns))
        return "\n".join(lines)


def evaluate_coco(
    annotations: str | Path | Mapping[str, Any],
    results: str | Path | Sequence[Mapping[str, Any]],
    iou_type: Literal["bbox", "segm"] = "bbox",
    backend: Backend = "faster",
    max_dets: int = 100,
) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; see `coco_metrics`."""
    return coco_metrics(annotations, results, iou_type, backend, max_dets).summary


def coco_metrics(
    annotations: str | Path | Mapping[str, Any],
    results: str | Path | Sequence[Mapping[str, Any]],
    iou_type: Literal["bbox", "segm"] = "bbox",
    backend: Backend = "faster",
    max_dets: int = 100,
) -> CocoMetrics:
    """Compare detections with the annotations of all images.

    annotations: COCO annotations, as a file or its content.
    results: COCO results, as a file or a list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.
    backend: `faster` for faster-coco-eval, `pycocotools` for the reference; they agree to 1e-9.
    max_dets: most detections counted in an image, 100 by COCO's rules; AR100 is named after it.

    Raises UserError where results belong to images that the annotations do not list.
    """
    if backend not in ("faster", "pycocotools"):
        raise UserError(f"evaluate_coco: wanted backend 'faster' or 'pycocotools', got '{backend}'.")
    if max_dets <= 10:
        raise UserError(f"evaluate_coco: wanted max_dets above 10, because AR10 is reported too, got {max_dets}.")
    truth = _load(annotations)
    found = _load(results)
    known = {image["id"] for image in truth["images"]}
    unknown = {result["image_id"] for result in found} - known
    if unknown:
        raise UserError(
            f"evaluate_coco: {len(unknown)} images of the results, such as {min(unknown)}, are not in the annotations. "
            "Evaluate against the annotations of the same images."
        )
    with contextlib.redirect_stdout(io.StringIO()), _without_garbage_collection():  # pycocotools prints its progress
        evaluation = _run(truth, found, iou_type, backend, max_dets)
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth["categories"]}
    repeated = {name for name, count in Counter(names.values()).items() if count > 1}
    names = {key: f"{name} ({key})" if name in repeated else name for key, name in names.items()}
    return _summarize(evaluation, names, max_dets)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of small objects are made and none is cyclic: looking for cycles would take a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load(source: Any) -> Any:
    return json.loads(Path(source).read_bytes()) if isinstance(source, str | Path) else source


def _run(
    truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], iou_type: str, backend: Backend, max_dets: int
) -> Any:
    # Many exporters leave out area and iscrowd; and pycocotools takes the id 0 for no match.
    complete = [
        {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3] if "area" not in entry else 0, **entry, "id": number}
        for number, entry in enumerate(truth["annotations"], start=1)
    ]
    module = faster_coco_eval if backend == "faster" else pycocotools.coco
    evaluator = faster_coco_eval.COCOeval_faster if backend == "faster" else pycocotools.cocoeval.COCOeval
    reference = _indexed(module.COCO(), {**truth, "annotations": complete})
    if iou_type == "bbox" or not found:  # what loadRes does, without a polygon for every box
        boxes = [
            {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
            for number, result in enumerate(found, start=1)
        ]
        detections = _indexed(module.COCO(), {**truth, "annotations": boxes})
    else:
        detections = reference.loadRes([dict(result) for result in found])
    evaluation = evaluator(reference, detections, iou_type)
    evaluation.params.maxDets = [1, 10, max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _indexed(coco: Any, dataset: dict[str, Any]) -> Any:
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _summarize(evaluation: Any, names: Mapping[int, str], max_dets: int) -> CocoMetrics:
    # precision: (IoU thresholds, recall thresholds, classes, areas, max_dets); recall lacks the recall thresholds.
    precision, recall = np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])
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
        names[category]: {
            "AP": mean(precision[:, :, k, 0, 2]),
            "AP50": mean(precision[half, :, k, 0, 2]),
            "AP75": mean(precision[three_quarters, :, k, 0, 2]),
            f"AR{max_dets}": mean(recall[:, k, 0, 2]),
        }
        for k, category in enumerate(evaluation.params.catIds)
    }
    return CocoMetrics(summary=summary, per_class=per_class)
