"""COCO metrics against published numbers and between the two back ends; a model's results counted once each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import DetectionDataset, evaluation_loader
from detr.errors import UserError
from detr.evaluation import CocoEvaluator, MatchingDiagnostics, coco_metrics, evaluate_coco
from detr.losses import HungarianMatcher
from detr.types import ImageBatch, Predictions
from tests.helpers.data import shapes_set


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
@pytest.mark.parametrize("case", ["A_bbox", "A_segm", "C_bbox_crowd_ignore"])
def test_published_numbers(shared: Path, case: str, backend: Any) -> None:
    folder = shared / "fixtures" / "coco_eval"
    expected = json.loads((folder / "expected.json").read_text())[case]
    annotations, results = (folder / name for name in expected["files"])
    metrics = coco_metrics(annotations, results, expected["iou_type"], backend)
    assert metrics.summary == pytest.approx(expected["pycocotools_2_0_11"], abs=1e-9)
    for name, value in expected["published"].items():
        assert metrics.summary[name] == pytest.approx(value, abs=expected["published_tolerance"]), name
    categories = json.loads(annotations.read_text())["categories"]
    names = {str(category["id"]): category["name"] for category in categories}
    for identity, value in expected["per_category_AP"].items():
        assert metrics.per_class[names[identity]]["AP"] == pytest.approx(value, abs=1e-9), identity


def synthetic(seed: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)

    def box() -> list[float]:
        return [*rng.uniform(0, 100, 2).tolist(), *rng.uniform(5, 150, 2).tolist()]

    images = [{"id": 7 * number} for number in range(11)]
    truth = [
        {"id": n + 1, "image_id": 7 * int(rng.integers(8)), "category_id": int(rng.choice([2, 5])), "bbox": box()}
        for n in range(60)
    ]  # without area and iscrowd, which many exporters leave out
    found = []
    for _ in range(detections):
        entry = truth[rng.integers(len(truth))]
        shaken = (np.array(entry["bbox"]) + rng.normal(0, 6, 4)).clip(1).tolist()
        found.append({**entry, "bbox": shaken, "score": float(rng.choice([0.1, 0.5, 0.5, rng.random()]))})
        found[-1].pop("id")
    categories = [{"id": 2, "name": "a"}, {"id": 5, "name": "b"}, {"id": 9, "name": "never there"}]
    return {"images": images, "annotations": truth, "categories": categories}, found


@pytest.mark.parametrize("max_dets", [100, 300])
@pytest.mark.parametrize("detections", [0, 13, 2000])
def test_back_ends_agree(detections: int, max_dets: int) -> None:
    annotations, results = synthetic(detections, detections)
    faster = coco_metrics(annotations, results, backend="faster", max_dets=max_dets)
    reference = coco_metrics(annotations, results, backend="pycocotools", max_dets=max_dets)
    assert faster.summary == pytest.approx(reference.summary, abs=1e-9)
    assert faster.summary.keys() == {
        *["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "ARs", "ARm", "ARl"],
        f"AR{max_dets}",
    }
    assert faster.per_class.keys() == {"a", "b", "never there"}
    for name, values in faster.per_class.items():
        assert values == pytest.approx(reference.per_class[name], abs=1e-9)
    assert faster.per_class["never there"]["AP"] == -1


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_an_annotation_may_have_the_id_zero(backend: Any) -> None:
    box = {"image_id": 7, "category_id": 2, "bbox": [1, 1, 50, 50]}
    truth = {"images": [{"id": 7}], "annotations": [{"id": 0, **box}], "categories": [{"id": 2, "name": "a"}]}
    assert evaluate_coco(truth, [{**box, "score": 0.9}], backend=backend)["AP"] == pytest.approx(1.0)


def test_categories_of_one_name_are_told_apart() -> None:
    annotations, results = synthetic(1, 20)
    annotations["categories"][1]["name"] = "a"
    assert coco_metrics(annotations, results).per_class.keys() == {"a (2)", "a (5)", "never there"}


def test_inputs_are_left_as_they_are() -> None:
    annotations, results = synthetic(1, 20)
    before = json.dumps([annotations, results])
    evaluate_coco(annotations, results)
    assert json.dumps([annotations, results]) == before


def test_results_of_other_images_are_refused() -> None:
    annotations, results = synthetic(1, 20)
    results[3]["image_id"] = 12345
    with pytest.raises(UserError, match="such as 12345, are not in the annotations"):
        evaluate_coco(annotations, results)
    with pytest.raises(UserError, match="wanted max_dets above 10"):
        evaluate_coco(annotations, results[:2], max_dets=10)


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
