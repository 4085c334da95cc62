"""COCO metrics against published numbers, between the two back ends, and against pycocotools called directly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.errors import UserError
from detr.evaluation import CocoResults, coco_metrics, evaluate_coco
from detr.evaluation.backends import check_backend
from tests.helpers.coco import KEYS, hard_case, judged, masked, synthetic

BACKENDS = ["hotcoco", "pycocotools"]


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("max_dets", [100, 300])
@pytest.mark.parametrize("detections", [0, 13, 2000])
def test_back_ends_agree(detections: int, max_dets: int) -> None:
    annotations, results = synthetic(detections, detections)
    metrics = coco_metrics(annotations, results, backend="hotcoco", max_dets=max_dets)
    reference = coco_metrics(annotations, results, backend="pycocotools", max_dets=max_dets)
    assert metrics.summary == pytest.approx(reference.summary, abs=1e-9)
    assert metrics.summary.keys() == {
        *["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "ARs", "ARm", "ARl"],
        f"AR{max_dets}",
    }
    assert metrics.per_class.keys() == {"a", "b", "never there"}
    for name, values in metrics.per_class.items():
        assert values == pytest.approx(reference.per_class[name], abs=1e-9)
    assert metrics.per_class["never there"]["AP"] == -1


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("seed", range(5))
def test_hard_cases_are_as_with_pycocotools_alone(seed: int, key: Any, backend: Any) -> None:
    annotations, results = hard_case(seed, key)
    metrics = coco_metrics(annotations, results, backend=backend)
    assert list(metrics.summary.values()) == pytest.approx(judged(annotations, results), abs=1e-9)
    assert 0 < metrics.summary["AP"] < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_and_rows_give_the_same(backend: Any) -> None:
    annotations, results = hard_case(1, KEYS["negative"])
    columns = CocoResults(
        image_ids=np.array([row["image_id"] for row in results]),
        category_ids=np.array([row["category_id"] for row in results]),
        boxes=np.array([row["bbox"] for row in results]),
        scores=np.array([row["score"] for row in results]),
    )
    assert coco_metrics(annotations, columns, backend=backend) == coco_metrics(annotations, results, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["images", "annotations", "categories"])
def test_without_any_there_is_nothing_to_find(empty: str, backend: Any) -> None:
    annotations, results = synthetic(1, 20)
    metrics = coco_metrics({**annotations, empty: []}, [] if empty == "images" else results, backend=backend)
    assert set(metrics.summary.values()) == {-1}
    assert len(metrics.per_class) == (0 if empty == "categories" else 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["masks", "boxes", "both"])
def test_masks_are_as_with_pycocotools_alone(kind: str, backend: Any) -> None:
    annotations, results = masked(3, kind)
    before = repr([annotations, results])
    metrics = coco_metrics(annotations, results, "segm", backend)
    assert repr([annotations, results]) == before
    assert list(metrics.summary.values()) == pytest.approx(judged(annotations, results, "segm"), abs=1e-9)
    assert metrics.summary["AP"] > 0
    assert coco_metrics(annotations, [], "segm", backend).summary["AP"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("column", "value"), [("score", np.nan), ("bbox", [1, 1, np.inf, 5]), ("bbox", [np.nan] * 4)])
def test_results_that_are_not_finite_are_refused(column: str, value: Any, backend: Any) -> None:
    annotations, results = synthetic(1, 20)
    results[3][column] = value
    with pytest.raises(UserError, match=f"1 results, such as one of image {results[3]['image_id']}, .* not a finite"):
        evaluate_coco(annotations, results, backend=backend)


@pytest.mark.parametrize("backend", ["faster", "fast"])
def test_an_unknown_back_end_is_refused(backend: str) -> None:
    with pytest.raises(UserError, match=f"wanted backend 'hotcoco' or 'pycocotools', got '{backend}'") as error:
        check_backend(backend, "evaluate_coco: wanted backend")
    assert ("write 'hotcoco'" in str(error.value)) == (backend == "faster")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_printed(backend: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where categories have no name, or results are of others; and with other limits than COCO's."""
    annotations, results = synthetic(1, 20)
    nameless = {**annotations, "categories": [{"id": 2}]}
    assert evaluate_coco(nameless, results, backend=backend, max_dets=300)["AP"] > 0
    assert capfd.readouterr() == ("", "")
