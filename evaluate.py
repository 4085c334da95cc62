"""Evaluate a checkpoint: python evaluate.py checkpoint=PATH data=coco data.root=DIR"""

import hashlib
import logging
from pathlib import Path

import torch
from omegaconf import DictConfig

from datasets import DetectionDataset, evaluation_loader, transforms
from detr import distributed
from detr.cli import command, pick_device, run_directory
from detr.config import build, evaluation_data
from detr.detector import Detector
from detr.evaluation import CocoEvaluator

logger = logging.getLogger(__name__)


@command("evaluate", unread=("data", "train"))
def main(config: DictConfig) -> None:
    device = pick_device(config.device)
    with distributed.process_group(device), run_directory(config) as run_dir:
        evaluate(config, run_dir, device)


def evaluate(config: DictConfig, run_dir: Path, device: torch.device) -> None:
    detector = Detector.from_checkpoint(
        config.checkpoint, device, model=config.model, allow_targets=config.allow_targets
    )
    data = evaluation_data(config, detector.config)
    build(config.data.prepare, path="data.prepare")
    size = {"size": data.get("size") or detector.size, "max_size": data.get("max_size") or detector.max_size}
    # The node may be the checkpoint's, which is not to be trusted with more.
    annotations = build(data["val"], path="data.val", allow=("datasets.formats", *config.allow_targets))
    dataset = DetectionDataset(annotations, transforms.evaluation(**size), categories=detector.categories)
    if distributed.world_size() > 1:
        weights = hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest()[:12]
        distributed.check_same({**dataset.fingerprint(), "the checkpoint": weights})
    logger.info("Evaluating on %d images with a short side of %d pixels.", len(dataset), size["size"])

    evaluator = CocoEvaluator(
        loader=evaluation_loader(dataset, **{name: data[name] for name in ("batch_size", "workers", "pad_to")}),
        annotations=dataset.ground_truth(),
        categories=detector.categories,
        **config.evaluation,
    )
    evaluation = evaluator(detector.model)
    if evaluation is None:  # process 0 reports
        return
    print(evaluation.metrics.table())
    evaluation.metrics.save(run_dir / "evaluation" / "metrics.json")
    logger.info("Metrics are in %s.", run_dir / "evaluation" / "metrics.json")


if __name__ == "__main__":
    main()
