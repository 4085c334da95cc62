"""Evaluate a checkpoint: python evaluate.py checkpoint=PATH data=coco data.root=DIR"""

import hashlib
import json
import logging
from pathlib import Path

import torch
from omegaconf import DictConfig

from datasets import DetectionDataset, evaluation_loader, hold_out, transforms
from detr import distributed
from detr.cli import command, pick_device, run_directory
from detr.config import as_yaml, build, evaluation_data
from detr.detector import Detector
from detr.evaluation import CocoEvaluator, categories_of_data
from detr.reporting import OutputFolder
from detr.weights import weights_file

logger = logging.getLogger(__name__)
CONFIG, METRICS, DETECTIONS = "evaluate.yaml", "evaluation/metrics.json", "evaluation/detections.json"


def unread(data: DictConfig) -> str | None:
    """The split that is not needed: that of training, unless it overrides what the checkpoint held out a part of."""
    if data.split is not None:
        return "val"
    return "train" if "_target_" in (data.train or {}) else None


@command("evaluate", unread=unread)
def main(config: DictConfig) -> None:
    device = pick_device(config.device)
    with distributed.process_group(device), run_directory(config) as run_dir:
        evaluate(config, run_dir, device)


def evaluate(config: DictConfig, run_dir: Path, device: torch.device) -> None:
    names = [METRICS, DETECTIONS, CONFIG]
    output = distributed.by_first(
        lambda: OutputFolder(run_dir, names, overwrite=config.overwrite, option="run_dir=PATH")
    )
    with distributed.first_on_machine():
        file = weights_file(config.checkpoint)
    detector = Detector.from_checkpoint(
        config.checkpoint, device, model=config.model, allow_targets=config.allow_targets
    )
    data = evaluation_data(config, detector.config)
    build(config.data.prepare, path="data.prepare")
    detector.resize_to(config.data.size, config.data.max_size, config.data.square)
    resized = transforms.evaluation(size=detector.size, max_size=detector.max_size, square=detector.square)
    # The node may be the checkpoint's, which is not to be trusted with more.
    part = "val" if data["split"] is None else "train"
    annotations = build(data[part], path=f"data.{part}", allow=("datasets.formats", *config.allow_targets))
    if data["split"] is not None:
        _, annotations = hold_out(annotations, data["split"], data["split_seed"])
    if annotations.named and {one.name for one in annotations.categories} <= {one.name for one in detector.categories}:
        annotations = annotations.classified(detector.categories)  # readers of names number them anew
    categories = categories_of_data(detector.categories, annotations.categories, annotations.source)
    dataset = DetectionDataset(annotations, resized)
    if distributed.world_size() > 1:
        weights = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        distributed.check_same({**dataset.fingerprint(), "the checkpoint": weights})
    logger.info("Evaluating on %d images: %s.", len(dataset), detector.resizing)

    evaluator = CocoEvaluator(
        loader=evaluation_loader(dataset, **{name: data[name] for name in ("batch_size", "workers", "pad_to")}),
        annotations=dataset.ground_truth(),
        categories=categories,
        samples=0,
        **config.evaluation,
    )
    evaluation = evaluator(detector.model)
    if evaluation is None:  # process 0 reports
        return
    output.write(METRICS, evaluation.metrics.as_json().encode())
    output.write(DETECTIONS, json.dumps(evaluation.results.rows()).encode())
    output.write(CONFIG, as_yaml(config).encode())
    print(evaluation.metrics.table())
    logger.info("Metrics are in %s, detections in %s.", output.folder / METRICS, output.folder / DETECTIONS)


if __name__ == "__main__":
    main()
