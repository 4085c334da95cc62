"""Metrics of boxes and masks from one set of detections, against pycocotools called directly for each."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch

from datasets import evaluation_loader
from detr.errors import UserError
from detr.evaluation import CocoEvaluator, CocoResults, box_and_mask_metrics, evaluator, read_results
from detr.masks import Masks, encode_segmentation
from detr.postprocess import postprocess
from detr.types import Category, Detections, Predictions
from tests.helpers.coco import judged, masked
from tests.helpers.data import shapes_set
from tests.helpers.oracle import Oracle

BACKENDS = ["hotcoco", "pycocotools"]
SIZE = (47, 61)


def boxed(segmentation: Any) -> list[float]:
    encoding = {"size": list(SIZE), "counts": encode_segmentation(segmentation, SIZE)}
    return pycocotools.mask.toBbox(encoding).tolist()


def annotated() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and results with boxes and masks, as JSON has them."""
    annotations, rows = masked(3, "both")
    for number, image in enumerate(annotations["images"]):
        image["file_name"] = f"{number}.jpg"
    for row in annotations["annotations"]:
        if isinstance(row["segmentation"], dict) and isinstance(row["segmentation"]["counts"], bytes):
            row["segmentation"]["counts"] = row["segmentation"]["counts"].decode()
        row["bbox"] = boxed(row["segmentation"])
    for row in rows:
        if isinstance(row["segmentation"]["counts"], bytes):
            row["segmentation"] = {**row["segmentation"], "counts": row["segmentation"]["counts"].decode()}
    return annotations, rows


def detections(annotations: dict[str, Any], rows: list[dict[str, Any]]) -> CocoResults:
    """Rows by way of `Detections`, image by image."""
    parts = []
    for image in annotations["images"]:
        own = [row for row in rows if row["image_id"] == image["id"]]
        boxes = torch.tensor([row["bbox"] for row in own], dtype=torch.float64).reshape(-1, 4)
        found = Detections(
            boxes=torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1),
            scores=torch.tensor([row["score"] for row in own], dtype=torch.float64),
            labels=torch.tensor([row["category_id"] + 1 for row in own], dtype=torch.int64),
            names=["ab"[row["category_id"]] for row in own],
            queries=torch.arange(len(own)),
            masks=Masks(SIZE, tuple(row["segmentation"]["counts"].encode() for row in own)),
        )
        parts.append(CocoResults.from_detections(found, image["id"], [None, Category(0, "a"), Category(1, "b")]))
    return CocoResults.concatenate(parts)


def without(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in copy.deepcopy(rows)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_are_as_with_pycocotools_alone(tmp_path: Path, backend: Any) -> None:
    annotations, rows = annotated()
    results = detections(annotations, rows)
    metrics = box_and_mask_metrics(annotations, results, backend)
    content = json.loads(metrics.as_json())
    assert list(content["bbox"].values()) == pytest.approx(judged(annotations, rows), abs=1e-9)
    assert list(content["segm"].values()) == pytest.approx(judged(annotations, without(rows, "bbox"), "segm"), abs=1e-9)
    assert content["segm"] != content["bbox"] and content["segm"].keys() == content["bbox"].keys()
    assert metrics.summary["mask_AP"] == content["segm"]["AP"] > 0
    per_class = [row["mask_AP50"] for row in content["per_class"].values()]
    assert np.mean(per_class) == pytest.approx(content["segm"]["AP50"])
    first, second, header, *_ = metrics.table().splitlines()
    assert first.startswith("Boxes: AP 0.") and second.startswith("Masks: AP 0.")
    assert "mask_AR100" in header.split()

    file = tmp_path / "detections.json"
    file.write_text(json.dumps(results.rows()))
    assert box_and_mask_metrics(annotations, read_results(file, annotations), backend) == metrics
    masks_alone = [{key: value for key, value in row.items() if key != "bbox"} for row in results.rows()]
    file.write_text(json.dumps(masks_alone))
    assert box_and_mask_metrics(annotations, read_results(file, annotations), backend) == metrics


def test_masks_on_one_side_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    annotations, rows = annotated()
    results = detections(annotations, rows)
    assert set(box_and_mask_metrics(annotations, CocoResults.from_rows(rows)).summary) == {
        *["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    }
    annotations["annotations"][4].pop("segmentation")
    metrics = box_and_mask_metrics(annotations, results)
    assert metrics == box_and_mask_metrics(annotations, CocoResults.from_rows(rows))
    assert "Masks are not compared, because 1 of 41 annotations have no segmentation." in caplog.text
    assert "segm" not in json.loads(metrics.as_json()) and "Masks" not in metrics.table()


def test_results_of_images_without_detections_have_masks() -> None:
    annotations, rows = annotated()
    nothing = detections(annotations, [])
    assert nothing.masks == [] and box_and_mask_metrics(annotations, nothing).summary["mask_AP"] == 0
    both = CocoResults.concatenate([CocoResults.concatenate([]), detections(annotations, rows)])
    assert both.rows() == detections(annotations, rows).rows()
    assert CocoResults.concatenate([CocoResults.concatenate([])]).masks is None


def test_an_evaluator_compares_masks(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that finds every object, with a mask that lacks the lower half of its box."""
    dataset = shapes_set(shapes_root, "val")
    truth = dataset.ground_truth()
    for row in truth["annotations"]:
        x, y, width, height = row["bbox"]
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]

    def with_masks(predictions: Predictions, originals: Any, *rest: Any, **options: Any) -> list[Detections]:
        found = postprocess(predictions, originals, *rest)
        for (height, width), one in zip(originals, found, strict=True):
            pixels = torch.zeros(len(one), height, width, dtype=torch.bool)
            for mask, (left, top, right, bottom) in zip(pixels, one.boxes.tolist(), strict=True):
                mask[round(top) : round(top + 0.6 * (bottom - top)), round(left) : round(right)] = True
            object.__setattr__(one, "masks", Masks.encode(pixels))
        return found

    monkeypatch.setattr(evaluator, "postprocess", with_masks)
    evaluate = CocoEvaluator(
        loader=evaluation_loader(dataset, batch_size=3, workers=0), annotations=truth, categories=dataset.categories
    )
    summary = evaluate(Oracle(dataset)).metrics.summary
    assert summary["AP"] == pytest.approx(1)
    assert summary["mask_AP50"] > 0.8 and summary["mask_AP75"] == 0


def test_encodings_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (47, 61), (211, 7), (640, 480)):
        for share in (0, 0.01, 0.5, 1):
            pixels = np.asfortranarray(rng.random((height, width)) < share, dtype=np.uint8)
            pixels[: height // 2] *= rng.random() < 0.5
            encoding = pycocotools.mask.encode(pixels)
            text = {"size": [height, width], "counts": encoding["counts"].decode()}
            assert encode_segmentation(text, (height, width)) == encoding["counts"]
            flat = pixels.T.ravel()
            edges = np.flatnonzero(np.diff(np.concatenate(([0], flat)))).tolist()
            runs = np.diff([0, *edges, flat.size]).tolist()
            assert encode_segmentation({**text, "counts": runs}, (height, width)) == encoding["counts"]
    polygons = [[1, 1, 30.5, 2, 20, 40], [40, 5, 70, 5, 60, 60.0, 40, 50]]
    expected = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *SIZE))["counts"]
    assert encode_segmentation(polygons, SIZE) == expected


GOOD = pycocotools.mask.encode(np.asfortranarray(np.eye(*SIZE, dtype=np.uint8)))["counts"].decode()


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (3, "wanted polygons or a run-length encoding, got 3"),
        ([3], "wanted polygons of at least three points"),
        ([[1, 2, 3, 4]], "wanted polygons of at least three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "wanted polygons of at least three points"),
        ([[1, 2, 3, 4, 5, "6"]], "in pixels of the image 61 x 47"),
        ([[1, 2, 3, 4, 5, 1e9]], "in pixels of the image 61 x 47"),
        ([[1, 2, 3, 4, 5, float("nan")]], "in pixels of the image 61 x 47"),
        ({"counts": GOOD}, r"wanted the size \[47, 61\] of the image, got None"),
        ({"size": [61, 47], "counts": GOOD}, r"got \[61, 47\]"),
        ({"size": [47, 61]}, "wanted counts as a list or as text, got None"),
        ({"size": [47, 61], "counts": "é"}, "wanted counts as a list or as text"),
        ({"size": [47, 61], "counts": GOOD[:-1]}, "damaged|wanted compressed counts"),
        ({"size": [47, 61], "counts": GOOD[:20]}, "damaged|wanted compressed counts"),
        ({"size": [47, 61], "counts": GOOD + "1"}, "wanted counts of 2867 pixels"),
        ({"size": [47, 61], "counts": "oooooooooooo0"}, "wanted compressed counts"),
        ({"size": [47, 61], "counts": "\x10" + GOOD}, "wanted compressed counts"),
        ({"size": [47, 61], "counts": "garbage"}, "wanted compressed counts|damaged"),
        ({"size": [47, 61], "counts": [2866]}, "wanted counts of 2867 pixels"),
        ({"size": [47, 61], "counts": [2868, -1]}, "wanted counts of 2867 pixels"),
        ({"size": [47, 61], "counts": [2**70]}, "wanted counts of 2867 pixels"),
        ({"size": [47, 61], "counts": [2866.0, 1]}, "wanted whole numbers"),
    ],
)
def test_damaged_masks_are_refused(tmp_path: Path, segmentation: Any, words: str) -> None:
    annotations, rows = annotated()
    file = tmp_path / "detections.json"
    file.write_text(json.dumps([*rows[:2], {**rows[2], "segmentation": segmentation}]))
    with pytest.raises(UserError, match=f"row 2 has a damaged segmentation: .*({words})"):
        read_results(file, annotations)


def test_boxes_stand_for_missing_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotations, rows = annotated()
    file = tmp_path / "detections.json"
    file.write_text(json.dumps([{**rows[0], "segmentation": []}, *rows[1:]]))
    results = read_results(file, annotations)
    assert "1 of 307 rows have no segmentation; their boxes stand for their masks." in caplog.text
    assert results.masks[0] is None and results.areas[0] == rows[0]["bbox"][2] * rows[0]["bbox"][3]
    assert "segmentation" not in results.rows()[0] and results.rows()[1] == rows[1]
    file.write_text(json.dumps([{**row, "segmentation": None} for row in rows]))
    assert read_results(file, annotations).masks is None
