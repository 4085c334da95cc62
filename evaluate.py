"""Evaluate a checkpoint, or results of any detector:

python evaluate.py checkpoint=PATH data=coco data.root=DIR
python evaluate.py results=FILE data=coco data.root=DIR
"""

from detr.cli.help import answer_help

if __name__ == "__main__":
    answer_help("evaluate")

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from datasets import DetectionDataset, evaluation_loader, hold_out, transforms
from datasets.formats import Annotations
from detr import distributed
from detr.cli.command import command
from detr.cli.devices import pick_device
from detr.cli.run_folder import run_directory
from detr.config import as_yaml, build, build_reader, evaluation_data
from detr.detector import Detector
from detr.errors import UserError
from detr.evaluation import (
    CocoEvaluator,
    CocoMetrics,
    CocoResults,
    box_and_mask_metrics,
    categories_of_data,
    holds_masks,
    read_results,
)
from detr.reporting import OutputFolder
from detr.weights import weights_file

logger = logging.getLogger(__name__)
CONFIG, METRICS, DETECTIONS = "evaluate.yaml", "evaluation/metrics.json", "evaluation/detections.json"
REPORT, NUMBERS = "evaluation/report.html", "evaluation/report.json"
IMAGES = ("number of images", "names or order of images")  # of a data set's fingerprint


def unread(config: DictConfig) -> str | None:
    """The split that is not needed: that of training, unless it overrides what the checkpoint held out a part of."""
    data = config.data
    if data.split is not None:
        return "val"
    return "train" if "_target_" in (data.train or {}) else None


@command("evaluate", unread=unread)
def main(config: DictConfig) -> None:
    device = pick_device(config.device)
    with distributed.process_group(device), run_directory(config) as run_dir:
        evaluate(config, run_dir, device)


def evaluate(config: DictConfig, run_dir: Path, device: torch.device) -> None:
    if (config.checkpoint is None) == (config.results is None):
        raise UserError(
            f"evaluate.py: wanted a checkpoint or results, got {'neither' if config.results is None else 'both'}. Set "
            "checkpoint=PATH to evaluate a model, or results=FILE to judge detections that are there already."
        )
    other = report_against(config)
    names = [METRICS, DETECTIONS, CONFIG, *([REPORT, NUMBERS] if config.report else [])]
    output = distributed.by_first(
        lambda: OutputFolder(run_dir, names, overwrite=config.overwrite, option="run_dir=PATH")
    )
    if config.results is None:
        found = evaluate_checkpoint(config, device, other)
    else:
        found = evaluate_results(config, other) if distributed.rank() == 0 else None
    if found is None:  # process 0 reports
        return
    metrics, results, dataset, against = found
    output.write(METRICS, metrics.as_json(data=dataset.fingerprint()).encode())
    output.write(DETECTIONS, json.dumps(results.rows()).encode())
    output.write(CONFIG, as_yaml(config).encode())
    print(metrics.table())
    print(best_threshold(metrics))
    logger.info("Metrics are in %s, detections in %s.", output.folder / METRICS, output.folder / DETECTIONS)
    if config.report:
        from detr.reporting.evaluation_page import explain  # it takes half a second, for charts

        page, numbers = explain(
            dataset.ground_truth(),
            results,
            dataset.folder,
            title=f"{config.checkpoint or config.results} on {dataset.source}",
            max_dets=config.evaluation.max_dets,
            against=against,
            against_name=str(config.report_against),
        )
        output.write(REPORT, page)
        output.write(NUMBERS, numbers)
        logger.info("What it means is in %s, its numbers in %s.", output.folder / REPORT, output.folder / NUMBERS)


def report_against(config: DictConfig) -> Path | None:
    """The detections to compare with: a file, or those of the folder of another evaluation."""
    if config.report_against is None:
        return None
    path = Path(config.report_against).expanduser()
    file = path / DETECTIONS if path.is_dir() else path
    if not config.report or not file.is_file():
        reason = f"{file} does not exist" if config.report else "there is no report"
        raise UserError(
            f"report_against={path}: {reason}. Wanted report=true and the run_dir of another evaluation on the same "
            f"images, or a file of its detections ({DETECTIONS})."
        )
    return file


def results_against(file: Path | None, dataset: DetectionDataset) -> CocoResults | None:
    """The detections to compare with, which are to be of the same images."""
    if file is None:
        return None
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, AttributeError):  # evaluate.py writes both; others' detections stand alone
        known = json.loads(file.with_name(Path(METRICS).name).read_bytes()).get("data", {})
    own = dataset.fingerprint()
    if known and any(known.get(name) != own[name] for name in IMAGES):
        raise UserError(
            f"report_against={file} is of other images than {dataset.source}. Give an evaluation on the same images."
        )
    return read_results(file, dataset.ground_truth(), option="report_against")


class Judged(NamedTuple):
    """Results and what they are worth. against: those to compare with."""

    metrics: CocoMetrics
    results: CocoResults
    dataset: DetectionDataset
    against: CocoResults | None


def evaluate_checkpoint(config: DictConfig, device: torch.device, other: Path | None) -> Judged | None:
    with distributed.first_on_machine():
        file = weights_file(config.checkpoint)
    detector = Detector.from_checkpoint(
        config.checkpoint, device, model=config.model, allow_targets=config.allow_targets
    )
    detector.resize_to(config.data.size, config.data.max_size, config.data.square)
    evaluator, dataset = evaluator_of(config, detector)
    against = results_against(other, dataset)
    if distributed.world_size() > 1:
        weights = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        distributed.check_same({**dataset.fingerprint(), "the checkpoint": weights})
    evaluation = evaluator(detector.model)
    return None if evaluation is None else Judged(evaluation.metrics, evaluation.results, dataset, against)


def evaluator_of(
    config: DictConfig, detector: Detector, *, one_by_one: bool = False
) -> tuple[CocoEvaluator, DetectionDataset]:
    """What compares a detector with annotations, and these. one_by_one: in batches of one image, without padding."""
    annotations, data = read_annotations(config, detector.config, masks=detector.has_masks)
    resized = transforms.evaluation(size=detector.size, max_size=detector.max_size, square=detector.square)
    if annotations.named and {one.name for one in annotations.categories} <= {one.name for one in detector.categories}:
        annotations = annotations.classified(detector.categories)  # readers of names number them anew
    categories = categories_of_data(detector.categories, annotations.categories, annotations.source)
    dataset = DetectionDataset(annotations, resized)
    logger.info("Evaluating on %d images: %s.", len(dataset), detector.resizing)
    options = {name: data[name] for name in ("batch_size", "workers", "pad_to")}
    if one_by_one or detector.one_by_one:
        options.update(batch_size=1, pad_to=1)
    panoptic = dataset.segments is not None and detector.has_segments
    if dataset.segments is not None and not panoptic:
        logger.warning("The panoptic quality is not measured: this model gives no segments.")
    evaluator = CocoEvaluator(
        loader=evaluation_loader(dataset, **options),
        annotations=dataset.ground_truth(),
        categories=categories,
        samples=0,
        panoptic=dataset.panoptic if panoptic else None,
        **config.evaluation,
    )
    return evaluator, dataset


def evaluate_results(config: DictConfig, other: Path | None) -> Judged:
    """Of detections that are there already, which need no model."""
    dataset = DetectionDataset(annotations_for(config))
    truth = dataset.ground_truth()
    results = read_results(config.results, truth)
    logger.info("Judging %d detections in %d images.", len(results), len(truth["images"]))
    metrics = box_and_mask_metrics(truth, results, config.evaluation.backend, config.evaluation.max_dets)
    return Judged(metrics, results, dataset, results_against(other, dataset))


def annotations_for(config: DictConfig) -> Annotations:
    """What results are judged by; with masks where both have them."""
    if holds_masks(config.results):
        try:
            return read_annotations(config, None, masks=True)[0]
        except UserError as error:
            logger.warning("Boxes alone are judged, not the masks of the results: %s", error)
    return read_annotations(config, None, masks=False)[0]


def read_annotations(
    config: DictConfig, trained: dict[str, Any] | None, *, masks: bool
) -> tuple[Annotations, dict[str, Any]]:
    """What to evaluate on, and the options of its data.

    trained: the checkpoint's configuration, where it has one. masks: read these too.
    """
    data = evaluation_data(config, trained)
    build(config.data.prepare, path="data.prepare")
    # The node may be the checkpoint's, which is not to be trusted with more.
    part = "val" if data["split"] is None else "train"
    allow = ("datasets.formats", *config.allow_targets)
    annotations = build_reader(data[part], path=f"data.{part}", masks=masks, allow=allow)
    if data["split"] is not None:
        _, annotations = hold_out(annotations, data["split"], data["split_seed"])
    return annotations, data


def best_threshold(metrics: CocoMetrics) -> str:
    if metrics.thresholds is None:
        return "No object is found at an IoU of 0.5, so no threshold is better than another."
    best = metrics.thresholds.overall
    return (
        f"Best F1 at one threshold for all classes: {best.f1:.3f} at {best.score:.3f}, with precision "
        f"{best.precision:.3f} and recall {best.recall:.3f}. metrics.json has one for each class."
    )


if __name__ == "__main__":
    main()
