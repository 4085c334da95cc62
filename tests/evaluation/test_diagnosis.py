"""The diagnosis, judged by pycocotools, by TIDE's own code, and by brute force."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask
import pytest

from detr.evaluation import CocoResults, coco_metrics
from detr.evaluation.backends import pycocotools_evaluation
from detr.evaluation.comparison import Comparison
from detr.evaluation.diagnosis import Diagnosis, diagnose
from detr.evaluation.diagnosis.intervals import resamples, weighted_metrics
from detr.evaluation.matching import match
from detr.evaluation.thresholds import best_thresholds
from tests.helpers.coco import KEYS, hard_case, synthetic


def scene(seed: int, images: int = 13, classes: int = 3, crowds: float = 0.0) -> tuple[dict[str, Any], CocoResults]:
    """Objects, and detections of which some are near them, with scores that say so."""
    rng = np.random.default_rng(seed)
    truth, found = [], []

    def box() -> np.ndarray:
        return np.concatenate((rng.uniform(0, 200, 2), np.exp(rng.uniform(2, 5, 2))))

    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 7))):
            place, label = box(), int(rng.integers(1, classes + 1))
            row = {"image_id": image, "category_id": label}
            crowd = int(rng.random() < crowds)
            area = float(place[2] * place[3])
            truth.append({**row, "id": len(truth) + 1, "bbox": place.tolist(), "area": area, "iscrowd": crowd})
            for _ in range(int(rng.integers(0, 4))):
                shaken = place + rng.normal(0, 0.15, 4) * place[[2, 3, 2, 3]] * rng.random()
                other = label if rng.random() < 0.7 else int(rng.integers(1, classes + 1))
                score = float(rng.beta(3, 2))
                found.append({**row, "category_id": other, "bbox": shaken.clip(1).tolist(), "score": score})
        for _ in range(3):
            label = int(rng.integers(1, classes + 1))
            score = float(rng.beta(1, 4))
            found.append({"image_id": image, "category_id": label, "bbox": box().tolist(), "score": score})
    listed = [
        {"id": n, "file_name": f"{n}.jpg", "width": 400, "height": 300, "weather": ("sun", "rain")[n % 2]}
        for n in range(1, images + 1)
    ]
    categories = [{"id": n, "name": f"class {n}"} for n in range(1, classes + 1)]
    return {"images": listed, "annotations": truth, "categories": categories}, CocoResults.from_rows(found)


def drawn(annotations: dict[str, Any], results: CocoResults, counts: Sequence[int]) -> dict[str, float]:
    """pycocotools' metrics of a data set in which each image is there so many times."""
    content: dict[str, Any] = {**annotations, "images": [], "annotations": []}
    rows = []
    for image, count in zip(annotations["images"], counts, strict=True):
        for _ in range(count):
            key = len(content["images"]) + 1
            content["images"].append({**image, "id": key})
            own = [row for row in annotations["annotations"] if row["image_id"] == image["id"]]
            content["annotations"] += [{**row, "image_id": key} for row in own]
            rows += [{**row, "image_id": key} for row in results.rows() if row["image_id"] == image["id"]]
    content["annotations"] = [{**row, "id": n} for n, row in enumerate(content["annotations"], start=1)]
    return coco_metrics(content, rows, backend="pycocotools").summary


@pytest.mark.parametrize("crowds", [0.0, 0.3])
def test_resamples_are_data_sets_with_repeated_images(crowds: float) -> None:
    annotations, results = scene(1, crowds=crowds)
    draws = resamples(13, 3, seed=4)
    assert (draws.sum(0) == 13).all() and draws.max() > 1
    found = weighted_metrics(match(Comparison(annotations, results, "bbox")), draws).summary()
    for column in range(3):
        expected = drawn(annotations, results, draws[:, column].tolist())
        assert {name: pytest.approx(v, abs=1e-12) for name, v in expected.items()} == {
            name: -1.0 if math.isnan(values[column]) else values[column] for name, values in found.items()
        }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_pycocotools(seed: int) -> None:
    annotations, rows = hard_case(seed, KEYS["negative"])
    matching = match(Comparison(annotations, rows, "bbox"), 11)
    found = weighted_metrics(matching, np.ones((matching.number_of_images, 1), dtype=np.int64)).summary(11)
    expected = coco_metrics(annotations, rows, backend="pycocotools", max_dets=11).summary
    assert {name: pytest.approx(value, abs=1e-9) for name, value in expected.items()} == {
        name: -1.0 if math.isnan(values[0]) else values[0] for name, values in found.items()
    }


def test_figures_of_the_page_are_those_of_pycocotools() -> None:
    annotations, results = scene(2, crowds=0.1)
    other = scene(3)[1]
    diagnosis = diagnose(annotations, results, against=other)
    expected = coco_metrics(annotations, results, backend="pycocotools")
    assert {name: found.value for name, found in diagnosis.metrics.items()} == pytest.approx(expected.summary, abs=1e-9)
    assert diagnosis.resamples == 1000
    for found in diagnosis.metrics.values():
        assert found.low is not None and found.high is not None and found.low < found.high
    for row in diagnosis.classes:
        assert row.ap.value == pytest.approx(expected.per_class[row.name]["AP"], abs=1e-9)
        assert row.ap50 == pytest.approx(expected.per_class[row.name]["AP50"], abs=1e-9)
    judge = pycocotools_evaluation(Comparison(annotations, results, "bbox"), 100).eval["precision"]
    np.testing.assert_allclose(diagnosis.curves["0.75"], judge[5, :, :, 0, 2].mean(1), atol=1e-9)
    for area, size in enumerate(("small", "medium", "large"), start=1):
        for label, row in enumerate(diagnosis.classes):
            assert (row.sizes[size] or 0) == pytest.approx(judge[:, :, label, area, 2].mean().clip(0), abs=1e-9)

    difference = diagnosis.difference
    assert difference is not None
    theirs = coco_metrics(annotations, other, backend="pycocotools").summary
    assert difference.other == pytest.approx(theirs, abs=1e-9)
    assert difference.metrics["AP"].value == pytest.approx(expected.summary["AP"] - theirs["AP"], abs=1e-9)


def test_intervals_of_a_difference_are_paired() -> None:
    annotations, results = scene(2)
    same = diagnose(annotations, results, against=results).difference
    assert same is not None
    assert all((found.value, found.low, found.high) == (0, 0, 0) for found in same.metrics.values())


def test_slices_are_evaluations_of_their_images() -> None:
    annotations, results = scene(5, images=16)
    found = {part.value: part for part in diagnose(annotations, results).slices if part.attribute == "weather"}
    assert set(found) == {"sun", "rain"}
    for value, part in found.items():
        counts = [int(image["weather"] == value) for image in annotations["images"]]
        assert part.images == sum(counts)
        assert part.ap.value == pytest.approx(drawn(annotations, results, counts)["AP"], abs=1e-9)


def average_precision(points: Any) -> float:
    """TIDE's, with the recalls of pycocotools: TIDE has k/100, which differs by rounding where a recall is one."""
    if points.num_gt_positives == 0:
        return 0.0
    right = np.array([point[1] for point in sorted(points.data_points.values(), key=lambda point: -point[0])], bool)
    true = right.cumsum()
    precision = np.maximum.accumulate((true / np.arange(1, len(true) + 1))[::-1])[::-1]
    places = np.searchsorted(true / points.num_gt_positives, np.linspace(0, 1, 101))
    return 100 * float(np.append(precision, 0)[places].mean())


@pytest.mark.parametrize("seed", range(5))
def test_errors_cost_what_tide_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tidecv = pytest.importorskip("tidecv")
    monkeypatch.setattr("tidecv.ap.APDataObject.get_ap", average_precision)
    annotations, results = scene(seed, images=19)
    truth, found = tidecv.Data("truth"), tidecv.Data("found")
    for image in annotations["images"]:
        truth.add_image(image["id"], image["file_name"])
    for row in annotations["annotations"]:
        truth.add_ground_truth(row["image_id"], row["category_id"], row["bbox"])
    for row in results.rows():
        found.add_detection(row["image_id"], row["category_id"], row["score"], row["bbox"])
    run = tidecv.TIDE().evaluate(truth, found, mode="bbox")
    keys = {
        "Cls": "class",
        "Loc": "localization",
        "Both": "class and localization",
        "Dupe": "duplicate",
        "Bkg": "background",
        "Miss": "missed",
    }
    costs = {keys[error.short_name]: cost / 100 for error, cost in run.fix_main_errors().items()}
    counts = {keys[error.short_name]: count for error, count in run.count_errors().items()}
    errors = diagnose(annotations, results).errors
    assert {error.name: error.cost for error in errors} == pytest.approx(costs, abs=1e-9)
    assert {error.name: error.count for error in errors} == counts
    assert [error.cost for error in errors] == sorted((error.cost for error in errors), reverse=True)


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    shape = (len(first), len(second))
    return np.asarray(pycocotools.mask.iou(first, second, [0] * len(second))).reshape(shape)


def test_confusion_and_images_are_those_of_brute_force() -> None:
    annotations, results = scene(7, images=31)
    comparison = Comparison(annotations, results, "bbox")
    thresholds = best_thresholds(comparison)
    assert thresholds is not None
    least = np.array([thresholds.per_class[name].score for name in comparison.names])
    truth, found = comparison.truth, comparison.found
    matrix = np.zeros((4, 4), dtype=int)
    errors, suspects = {}, set()
    for image in range(31):
        rows = np.flatnonzero((found.images == image) & (found.scores >= least[found.categories]))
        rows, own = rows[np.argsort(-found.scores[rows])], np.flatnonzero(truth.images == image)
        iou = overlaps(found.boxes[rows], truth.boxes[own])
        same = found.categories[rows][:, None] == truth.categories[own]
        taken, hits, right = set(), set(), set()
        for place, row in enumerate(rows):  # whatever the class
            free = [(iou[place, at], at) for at in range(len(own)) if at not in taken and iou[place, at] >= 0.5]
            taken |= {max(free)[1]} if free else set()
            matrix[truth.categories[own[max(free)[1]]] if free else 3, found.categories[row]] += 1
        for at in set(range(len(own))) - taken:
            matrix[truth.categories[own[at]], 3] += 1
        for place in range(len(rows)):  # as COCO
            free = [
                (iou[place, at], at)
                for at in range(len(own))
                if at not in hits and same[place, at] and iou[place, at] >= 0.5
            ]
            if free:
                hits.add(max(free)[1])
                right.add(place)
        errors[image + 1] = (len(rows) - len(right), len(own) - len(hits))
        for place in set(range(len(rows))) - right:
            score = float(found.scores[rows[place]])
            if not len(own) or iou[place].max() < 0.1:
                suspects.add(("not annotated", score))
            elif any(not same[place, at] and at not in hits and iou[place, at] >= 0.5 for at in range(len(own))):
                suspects.add(("another class", score))

    diagnosis = diagnose(annotations, results)
    np.testing.assert_array_equal(diagnosis.confusion.matrix, matrix)
    counts = sorted((pair.count for pair in diagnosis.confusion.pairs), reverse=True)
    assert counts == [pair.count for pair in diagnosis.confusion.pairs]
    assert sum(counts) == matrix[:3, :3].sum() - np.trace(matrix[:3, :3])
    order = sorted(errors, key=lambda image: (-sum(errors[image]), image))
    assert [(image.image_id, image.wrong, image.missed) for image in diagnosis.worst] == [
        (image, *errors[image]) for image in order[:8] if sum(errors[image])
    ]
    for image in diagnosis.worst:
        assert sum(not box.right for box in image.found) == image.wrong
        assert sum(not box.right for box in image.truth) == image.missed
    assert len(suspects) > 3
    best = sorted(suspects, key=lambda suspect: -suspect[1])[:12]
    assert [(suspect.kind, suspect.found.score) for suspect in diagnosis.suspects] == best


def test_calibration_is_that_of_brute_force() -> None:
    annotations, results = scene(8)
    comparison = Comparison(annotations, results, "bbox")
    right = match(comparison).at(0.5) >= 0
    scores = match(comparison).scores
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = [abs(right[bins == n].mean() - scores[bins == n].mean()) * (bins == n).sum() for n in set(bins.tolist())]
    found = diagnose(annotations, results).calibration
    assert found.error == pytest.approx(sum(gaps) / len(scores), abs=1e-12)
    assert sum(part.count for part in found.bins) == len(scores)


def without(annotations: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**annotations, **{name: [] for name in names}}


EMPTY = CocoResults.from_rows([])


@pytest.mark.parametrize(
    "annotations, results",
    [
        (scene(1)[0], EMPTY),
        (without(scene(1)[0], "annotations"), scene(1)[1]),
        (without(scene(1)[0], "annotations"), EMPTY),
        (without(scene(1)[0], "annotations", "images"), EMPTY),
        scene(2, images=1),
        scene(3, images=2, classes=9),
        scene(4, images=5, crowds=1.0),
        (
            synthetic(1, 80)[0] | {"images": [{"id": 7 * n} for n in range(11)]},
            CocoResults.from_rows(synthetic(1, 80)[1]),
        ),
    ],
    ids=["nothing found", "no objects", "nothing", "no images", "one image", "few objects", "crowds", "bare images"],
)
def test_what_is_missing_has_no_value(annotations: dict[str, Any], results: CocoResults) -> None:
    diagnosis = diagnose(annotations, results, against=results)
    assert isinstance(diagnosis, Diagnosis)
    text = diagnosis.as_json()
    assert "NaN" not in text and "Infinity" not in text
    content = json.loads(text)
    expected = coco_metrics(annotations, results).summary["AP"] if annotations["images"] else -1
    assert content["metrics"]["AP"]["value"] == (None if expected < 0 else pytest.approx(expected))
