"""The best thresholds by class, judged by pycocotools' matches and by trying every score."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.errors import UserError
from detr.evaluation import Threshold, Thresholds, best_thresholds, read_thresholds
from detr.evaluation.backends import pycocotools_evaluation
from detr.evaluation.comparison import Comparison
from detr.evaluation.matching import match
from detr.types import Category
from tests.helpers.coco import KEYS, hard_case, synthetic


def judged(comparison: Comparison, max_dets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What pycocotools matches at an IoU of 0.5: the annotation of each detection, what counts, what is wanted."""
    found, count = len(comparison.found.scores), len(comparison.truth.scores)
    annotations, counted, wanted = np.full(found, -1), np.zeros(found, bool), np.zeros(count, bool)
    for image in pycocotools_evaluation(comparison, max_dets).evalImgs:
        if image is not None and image["aRng"] == [0, 1e10]:
            detections, objects = np.array(image["dtIds"], int) - 1, np.array(image["gtIds"], int) - 1
            annotations[detections] = image["dtMatches"][0].astype(int) - 1
            counted[detections] = ~image["dtIgnore"][0].astype(bool)
            wanted[objects] = ~np.array(image["gtIgnore"], bool)
    return annotations, counted, wanted


@pytest.mark.parametrize("max_dets", [11, 100])
@pytest.mark.parametrize("seed", range(7))
def test_matches_are_those_of_pycocotools(seed: int, max_dets: int) -> None:
    comparison = Comparison(*hard_case(seed, KEYS["negative"]), "bbox")
    matching = match(comparison, max_dets, thresholds=[0.5], sizes=False)
    annotations, counted, wanted = judged(comparison, max_dets)
    np.testing.assert_array_equal(matching.at(0.5), annotations[matching.rows])
    np.testing.assert_array_equal(matching.counted(0.5), counted[matching.rows])
    np.testing.assert_array_equal(matching.wanted[0], wanted)
    left_out = np.delete(np.arange(len(counted)), matching.rows)
    assert not counted[left_out].any() and (annotations >= 0).any() and not counted.all() and not wanted.all()


def f1_of(comparison: Comparison) -> Callable[[float, int | None], float]:
    """F1 of one category, or of all, when detections with at least a score are kept."""
    annotations, counted, wanted = judged(comparison, 100)
    found, truth = comparison.found, comparison.truth

    def f1_at(score: float, category: int | None) -> float:
        kept = counted & (found.scores >= score) & ((found.categories == category) | (category is None))
        objects = wanted & ((truth.categories == category) | (category is None))
        return 2 * (kept & (annotations >= 0)).sum() / (kept.sum() + objects.sum())

    return f1_at


@pytest.mark.parametrize("seed", range(5))
def test_no_other_score_is_better(seed: int) -> None:
    comparison = Comparison(*hard_case(seed, KEYS["from 0"]), "bbox")
    f1_at = f1_of(comparison)
    scores = [*np.unique(comparison.found.scores), 3]
    overall = max(scores, key=lambda score: f1_at(score, None))
    common = best_thresholds(comparison, least_objects=10**6).per_class
    thresholds = best_thresholds(comparison, least_objects=1)
    own = thresholds.per_class
    assert thresholds.overall.f1 == pytest.approx(f1_at(overall, None))
    assert own.keys() == common.keys() == {"0", "1", "2"}
    for number, name in enumerate(comparison.names):
        best = max(f1_at(score, number) for score in scores)
        assert own[name].f1 == pytest.approx(best if best else 0)
        assert f1_at(own[name].score, number) == pytest.approx(own[name].f1)
        assert f1_at(common[name].score, number) == pytest.approx(common[name].f1)
        assert f1_at(common[name].score, None) == f1_at(overall, None)


def scene(*found: tuple[int, float, bool], objects: dict[int, int]) -> Comparison:
    """Detections (category, score, whether it finds an object), and the number of objects of each category."""
    rows = [(category, 20 * place) for category, count in objects.items() for place in range(count)]
    truth = [
        {"id": n, "image_id": 1, "category_id": c, "bbox": [x, 100 * c, 9, 9], "area": 81, "iscrowd": 0}
        for n, (c, x) in enumerate(rows, start=1)
    ]
    free = {category: iter(range(count)) for category, count in objects.items()}
    results = [
        {"image_id": 1, "category_id": c, "bbox": [20 * next(free[c]) if hit else 9e3, 100 * c, 9, 9], "score": score}
        for c, score, hit in found
    ]
    categories = [{"id": category, "name": f"class {category}"} for category in objects]
    return Comparison({"images": [{"id": 1}], "annotations": truth, "categories": categories}, results, "bbox")


def test_the_middle_of_two_scores_is_taken() -> None:
    comparison = scene((1, 0.9, True), (1, 0.75, True), (1, 0.25, False), (1, 0.1, False), objects={1: 2})
    expected = Threshold(score=0.5, f1=1.0, precision=1.0, recall=1.0, objects=2)
    assert best_thresholds(comparison, least_objects=1) == Thresholds(expected, {"class 1": expected})


def test_the_lowest_score_is_its_own_threshold() -> None:
    comparison = scene((1, 0.75, True), (1, 0.25, True), objects={1: 4})
    expected = Threshold(score=0.25, f1=4 / 6, precision=1.0, recall=0.5, objects=4)
    assert best_thresholds(comparison, least_objects=1) == Thresholds(expected, {"class 1": expected})


def test_of_equal_thresholds_the_highest_is_taken() -> None:
    found = [(1, 0.75, True), *[(1, 0.5, False)] * 2, (1, 0.25, True)]  # F1 is 2/3 at 0.75 and at 0.25
    assert best_thresholds(scene(*found, objects={1: 2}), least_objects=1).overall.score == 0.625


def test_classes_with_few_objects_or_without_any_found_share_a_threshold() -> None:
    found = [*[(1, 0.75, True)] * 3, (1, 0.25, False), (2, 0.5, True), (3, 0.875, False)]
    thresholds = best_thresholds(scene(*found, objects={1: 3, 2: 1, 3: 3, 4: 0}), least_objects=2)
    assert thresholds.per_class == {
        "class 1": Threshold(score=0.5, f1=1.0, precision=1.0, recall=1.0, objects=3),
        "class 2": Threshold(score=0.375, f1=1.0, precision=1.0, recall=1.0, objects=1),
        "class 3": Threshold(score=0.375, f1=0.0, precision=0.0, recall=0.0, objects=3),
        "class 4": Threshold(score=0.375, f1=-1.0, precision=-1.0, recall=-1.0, objects=0),
    }


def test_a_class_of_which_little_is_found_has_no_threshold_of_its_own() -> None:
    """One hit among noise: its best F1 would keep all of the noise."""
    found = [*[(1, 0.75, True)] * 3, *[(2, 0.125, False)] * 9, (2, 0.0625, True)]
    own = best_thresholds(scene(*found, objects={1: 3, 2: 5}), least_objects=2).per_class
    assert (own["class 1"].score, own["class 2"].score) == (0.75, 0.4375)


@pytest.mark.parametrize("results", [[], [{"image_id": 0, "category_id": 1, "bbox": [900, 9, 5, 5], "score": 1.0}]])
def test_where_nothing_is_found_there_is_none(results: list[dict[str, Any]]) -> None:
    annotations, _ = synthetic(1, 20)
    assert best_thresholds(Comparison(annotations, results, "bbox")) is None


def test_thresholds_are_read_as_they_were_written(tmp_path: Path) -> None:
    thresholds = best_thresholds(Comparison(*hard_case(1, KEYS["from 0"]), "bbox"), least_objects=1)
    (tmp_path / "metrics.json").write_text(json.dumps({"thresholds": thresholds.content()}))
    assert read_thresholds(tmp_path / "metrics.json") == thresholds


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "wanted a number, best, or a metrics.json"),
        ("[1]", "wanted a number, best, or a metrics.json"),
        ('{"bbox": {}}', "wanted a number, best, or a metrics.json"),
        ('{"thresholds": {"overall": {"score": "x"}}}', "holds 'x' as overall.score, wanted a number"),
    ],
)
def test_files_without_thresholds_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_thresholds(tmp_path / "metrics.json")


def test_every_label_has_a_score() -> None:
    """Also where two classes share a name, and where the data had no such class."""
    a, b, overall = (Threshold(score, 1.0, 1.0, 1.0, 30) for score in (0.25, 0.5, 0.75))
    thresholds = Thresholds(overall=overall, per_class={"cat": a, "dog (7)": b})
    categories = [Category(7, "dog"), Category(8, "bird"), Category(3, "cat")]
    assert thresholds.scores(categories) == [0.5, 0.75, 0.25]
