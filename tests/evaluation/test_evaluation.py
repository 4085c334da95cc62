"""A model's results counted once each, and collected as `to_results` lists them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import evaluation_loader
from detr.errors import NonFiniteError
from detr.evaluation import CocoEvaluator, CocoResults, MatchingDiagnostics, to_results
from detr.losses import HungarianMatcher
from detr.types import Category, Detections, ImageBatch, Predictions, Target
from tests.helpers.data import shapes_set
from tests.helpers.oracle import Oracle


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
    sample = evaluation.samples[0]
    assert sample.image.shape == (3, 48, 48)
    boxes = dataset.records[0].boxes + np.pad(dataset.records[0].boxes[:, :2], ((0, 0), (2, 0)))  # to xyxy
    boxes = torch.from_numpy(boxes).float()
    torch.testing.assert_close(sample.truth.boxes, boxes)
    torch.testing.assert_close(sample.found.above(0.5).boxes.sort(0).values, boxes.sort(0).values)
    assert sample.truth.names == [dataset.categories[label].name for label in dataset.records[0].labels]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [None, 4])
def test_samples_are_from_all_over(shapes_root: Path, batch_size: int, limit: int | None) -> None:
    dataset = shapes_set(shapes_root, "val")
    evaluator = CocoEvaluator(
        loader=evaluation_loader(dataset, batch_size=batch_size, workers=0),
        annotations=dataset.ground_truth(),
        categories=dataset.categories,
        samples=2,
        limit=limit,
    )
    first, second = evaluator(Oracle(dataset)).samples
    assert torch.equal(first.image, dataset[0][0])
    [place] = [index for index in range(7) if torch.equal(second.image, dataset[index][0])]
    evaluated = 7 if limit is None else min(-(-limit // batch_size) * batch_size, 7)
    assert place == (1 if batch_size >= evaluated else pytest.approx(evaluated / 2, abs=batch_size / 2 + 0.5))


class Crowded(torch.nn.Module):
    """Finds each of 600 objects in a grid, all of one class, with a query of its own and a sigmoid score."""

    def __init__(self, boxes: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.boxes = torch.nn.Parameter(torch.zeros(1)), boxes

    def forward(self, batch: ImageBatch) -> Predictions:
        logits = torch.linspace(9, 8, len(self.boxes))[None, None, :, None]
        return Predictions(logits=logits, boxes=self.boxes[None, None])


@pytest.mark.parametrize(("max_dets", "recall"), [(100, 1 / 6), (300, 1 / 2), (600, 1.0), (1000, 1.0)])
def test_sigmoid_detections_follow_max_dets(max_dets: int, recall: float) -> None:
    grid = torch.stack(torch.meshgrid(torch.arange(30), torch.arange(20), indexing="ij"), -1).flatten(0, 1)
    rows = [
        {"id": n, "image_id": 3, "category_id": 5, "bbox": [10 * x + 1, 10 * y + 1, 8, 8], "area": 64, "iscrowd": 0}
        for n, (x, y) in enumerate(grid.tolist(), start=1)
    ]
    boxes = torch.cat(
        ((grid * 10 + 5) / torch.tensor([300, 200]), torch.tensor([[8 / 300, 8 / 200]]).expand(600, 2)), 1
    )
    annotations = {
        "images": [{"id": 3, "file_name": "a.jpg", "width": 300, "height": 200}],
        "annotations": rows,
        "categories": [{"id": 5, "name": "sheep"}],
    }
    image = torch.zeros(1, 3, 20, 30, dtype=torch.uint8)
    target = Target(
        labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4), image_id=3, original_size=(200, 300)
    )
    evaluator = CocoEvaluator(
        loader=[(ImageBatch(images=image, mask=image[:, 0] > 0), [target])],
        annotations=annotations,
        categories=[Category(id=5, name="sheep")],
        max_dets=max_dets,
    )
    assert evaluator(Crowded(boxes)).metrics.summary[f"AR{max_dets}"] == pytest.approx(recall, abs=1e-6)


def test_predictions_that_are_not_finite_are_an_error(shapes_root: Path) -> None:
    dataset = shapes_set(shapes_root, "val")
    loader = evaluation_loader(dataset, batch_size=3, workers=0)
    evaluator = CocoEvaluator(loader=loader, annotations=dataset.ground_truth(), categories=dataset.categories)
    oracle = Oracle(dataset)
    oracle.register_forward_hook(lambda model, given, found: found.map(lambda tensor: tensor * float("nan")))
    with pytest.raises(NonFiniteError, match=r"predictions became NaN or infinite, for image ids \[0, 1, 2\]"):
        evaluator(oracle)


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
