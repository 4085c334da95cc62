"""A model's results counted once each, and collected as `to_results` lists them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import DetectionDataset, evaluation_loader
from detr.evaluation import CocoEvaluator, CocoResults, MatchingDiagnostics, to_results
from detr.losses import HungarianMatcher
from detr.types import Category, Detections, ImageBatch, Predictions
from tests.helpers.data import shapes_set


class Oracle(torch.nn.Module):
    """Knows the answers: a first query for each object, the rest no object. It counts the images it is shown."""

    def __init__(self, dataset: DetectionDataset) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dataset, self.seen = dataset, 0

    def forward(self, batch: ImageBatch) -> Predictions:
        logits = torch.full((1, len(batch), 5, 4), -9.0)
        logits[..., 3] = 9
        boxes = torch.full((1, len(batch), 5, 4), 0.5)
        for row in range(len(batch)):
            record = self.dataset.records[self.seen]
            height, width = record.size
            for query, ((x, y, w, h), label) in enumerate(zip(record.boxes, record.labels, strict=True)):
                logits[0, row, query, 3], logits[0, row, query, label] = -9, 9
                boxes[0, row, query] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
            self.seen += 1
        return Predictions(logits=logits, boxes=boxes)


def test_a_perfect_model_scores_one(shapes_root: Path) -> None:
    dataset = shapes_set(shapes_root, "val")
    evaluator = CocoEvaluator(
        loader=evaluation_loader(dataset, batch_size=3, workers=0),
        annotations=dataset.ground_truth(),
        categories=dataset.categories,
        samples=4,
        diagnostics=MatchingDiagnostics(HungarianMatcher()),
    )
    oracle = Oracle(dataset)
    evaluation = evaluator(oracle)
    assert oracle.seen == len(dataset) == 7
    assert evaluation.metrics.summary["AP"] == pytest.approx(1.0)
    assert len(evaluation.results) == 7 * 5 and len(evaluation.samples) == 4
    diagnostics = {"matching/iou": 1.0, "matching/recall": 1.0, "matching/duplicates": 0.0}
    assert evaluation.diagnostics == pytest.approx(diagnostics, abs=1e-5)
    image, detections = evaluation.samples[0]
    assert image.shape == (3, 48, 48)
    boxes = dataset.records[0].boxes + np.pad(dataset.records[0].boxes[:, :2], ((0, 0), (2, 0)))  # to xyxy
    torch.testing.assert_close(
        detections.above(0.5).boxes.sort(0).values, torch.from_numpy(boxes).float().sort(0).values
    )


def test_columns_are_the_rows_of_coco() -> None:
    """Of images with several detections, none and one; ids of any size."""
    categories = [Category(id=-3, name="a"), Category(id=2**70, name="b")]
    counts = {2**63: 3, -5: 0, 7: 1}
    found = {
        image: Detections(
            boxes=torch.rand(count, 4).cumsum(1) * 100,
            scores=torch.rand(count),
            labels=torch.arange(count) % 2,
            names=["a", "b", "a"][:count],
            queries=torch.arange(count),
        )
        for image, count in counts.items()
    }
    rows = [row for image, detections in found.items() for row in to_results(detections, image, categories)]
    assert [(row["image_id"], row["category_id"]) for row in rows] == [
        (2**63, -3),
        (2**63, 2**70),
        (2**63, -3),
        (7, -3),
    ]
    left, top, right, bottom = found[7].boxes[0].tolist()
    assert rows[3]["bbox"] == pytest.approx([left, top, right - left, bottom - top])
    columns = CocoResults.concatenate(
        [CocoResults.from_detections(detections, image, categories) for image, detections in found.items()]
    )
    again = CocoResults.from_rows(rows)
    assert len(columns) == len(again) == 4
    for name in ("image_ids", "category_ids", "boxes", "scores"):
        assert getattr(columns, name).tolist() == getattr(again, name).tolist(), name
    assert len(CocoResults.concatenate([])) == 0
