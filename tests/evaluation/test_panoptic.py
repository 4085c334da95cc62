"""The panoptic quality against a slow version with sets of pixels, and against hotcoco's of files."""

import json
from pathlib import Path
from typing import Any

import hotcoco.panoptic
import numpy as np
import pytest
from PIL import Image

from detr.errors import UserError
from detr.evaluation import PanopticQuality
from detr.segments import Panoptic, Segment, colors_of_ids, ids_of_colors
from detr.types import Category

CATEGORIES = [
    Category(3, "cat"),
    Category(7, "dog"),
    Category(9, "sky", is_thing=False),
    Category(11, "sea", is_thing=False),
    Category(20, "never there"),
]
SIZE = (37, 53)


def scene(rng: np.random.Generator) -> tuple[Panoptic, Panoptic]:
    """Rectangles over one another on void, and a disturbed copy of them with other ids."""
    ids = np.zeros(SIZE, np.int64)
    segments = []
    for number in range(1, 11):
        (top, left), (rows, columns) = rng.integers(0, 25, 2), rng.integers(5, 25, 2)
        key = 1000 * number + 256**2 * int(rng.integers(255))
        ids[top : top + rows, left : left + columns] = key
        segments.append(Segment(key, int(rng.integers(4)), crowd=False))
    seen = [segment for segment in segments if (ids == segment.id).any()]
    for label in range(2):  # at most one crowd a class, as in COCO
        own = [place for place, segment in enumerate(seen) if segment.label == label]
        if own and rng.random() < 0.8:
            seen[own[0]] = Segment(seen[own[0]].id, label, crowd=True)
    truth = Panoptic(ids, tuple(seen))

    found = np.zeros(SIZE, np.int64)
    moved = np.roll(ids, rng.integers(-3, 4, 2).tolist(), axis=(0, 1))
    labels: dict[int, int] = {}
    for number, segment in enumerate(seen, start=1):
        pixels = moved == segment.id
        if rng.random() < 0.1:
            continue
        key = 5 * number
        found[pixels] = key
        labels[key] = segment.label if rng.random() < 0.8 else int(rng.integers(4))
        if pixels.sum() > 100 and rng.random() < 0.3:
            left = pixels & (np.arange(SIZE[1]) < np.median(pixels.nonzero()[1]))
            found[left], labels[key + 1] = key + 1, labels[key]
    found[(found == 0) & (rng.random(SIZE) < 0.7)] = 200  # on void
    labels[200] = int(rng.integers(4))
    there = [Segment(key, label) for key, label in labels.items() if (found == key).any()]
    return truth, Panoptic(found, tuple(there))


def judged(scenes: list[tuple[Panoptic, Panoptic]]) -> list[list[float]]:
    """IoU sum, true positives, false positives and false negatives of each class, as the paper has them."""
    totals = [[0.0, 0, 0, 0] for _ in CATEGORIES]
    for truth, found in scenes:
        pixels = [(row, column) for row in range(SIZE[0]) for column in range(SIZE[1])]
        void = {place for place in pixels if truth.ids[place] not in {segment.id for segment in truth.segments}}
        of_truth = {one.id: {place for place in pixels if truth.ids[place] == one.id} for one in truth.segments}
        of_found = {one.id: {place for place in pixels if found.ids[place] == one.id} for one in found.segments}
        used: set[int] = set()
        for wanted in truth.segments:
            hit = None
            for one in found.segments:
                if one.label == wanted.label and not wanted.crowd:
                    mine = of_found[one.id] - void
                    overlap = len(mine & of_truth[wanted.id]) / len(mine | of_truth[wanted.id])
                    if overlap > 0.5:
                        assert hit is None
                        hit, best = one.id, overlap
            if hit is not None:
                used.add(hit)
                totals[wanted.label][0] += best
                totals[wanted.label][1] += 1
            elif not wanted.crowd:
                totals[wanted.label][3] += 1
        for one in found.segments:
            crowds = [of_truth[w.id] for w in truth.segments if w.crowd and w.label == one.label]
            forgiven = void.union(*crowds) & of_found[one.id]
            if one.id not in used and not len(forgiven) > len(of_found[one.id]) / 2:
                totals[one.label][2] += 1
    return totals


def expected(totals: list[list[float]], labels: list[int]) -> tuple[float, float, float]:
    rows = []
    for overlap, hits, wrong, missed in (totals[label] for label in labels):
        if hits + wrong + missed:
            rows.append(
                (
                    overlap / (hits + wrong / 2 + missed / 2),
                    overlap / hits if hits else 0,
                    hits / (hits + wrong / 2 + missed / 2),
                )
            )
    return tuple(np.mean(rows, axis=0)) if rows else (-1, -1, -1)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Panoptic, Panoptic]]:
    rng = np.random.default_rng(0)
    return [scene(rng) for _ in range(20)]


def test_a_slow_version_says_the_same(scenes: list[tuple[Panoptic, Panoptic]]) -> None:
    parts = [PanopticQuality(CATEGORIES) for _ in range(3)]
    for number, (truth, found) in enumerate(scenes):
        parts[number % 3].add(truth, found)
    quality = PanopticQuality(CATEGORIES)
    quality.totals = sum(part.totals for part in parts)
    totals = judged(scenes)
    np.testing.assert_allclose(quality.totals, totals, atol=1e-9)
    assert (quality.totals[:4] > 0).all()  # every rule was needed
    metrics = quality.metrics()
    for kind, labels in {"": [0, 1, 2, 3, 4], "_th": [0, 1, 4], "_st": [2, 3]}.items():
        own = [metrics.summary[f"{name}{kind}"] for name in ("PQ", "SQ", "RQ")]
        assert own == pytest.approx(expected(totals, labels), abs=1e-9)
    for label, category in enumerate(CATEGORIES):
        own = list(metrics.per_class[category.name].values())
        assert own == pytest.approx(expected(totals, [label]), abs=1e-9)


def test_files_give_the_same_by_hotcoco(scenes: list[tuple[Panoptic, Panoptic]], tmp_path: Path) -> None:
    categories = [{"id": one.id, "name": one.name, "isthing": int(one.is_thing)} for one in CATEGORIES]
    images = [{"id": number, "file_name": f"{number}.jpg", "height": 37, "width": 53} for number in range(20)]
    for side in range(2):
        folder = tmp_path / "ab"[side]
        folder.mkdir()
        rows = []
        for number, pair in enumerate(scenes):
            Image.fromarray(colors_of_ids(pair[side].ids)).save(folder / f"{number}.png")
            infos: list[dict[str, Any]] = pair[side].rows(CATEGORIES)
            for info, segment in zip(infos, pair[side].segments, strict=True):
                info["iscrowd"] = int(segment.crowd)
            rows.append({"image_id": number, "file_name": f"{number}.png", "segments_info": infos})
        content = {"images": images, "categories": categories, "annotations": rows}
        folder.with_suffix(".json").write_text(json.dumps(content))
    judge = hotcoco.panoptic.PanopticEval(tmp_path / "a.json", tmp_path / "b.json")
    judge.evaluate()
    found = judge.results()
    quality = PanopticQuality(CATEGORIES)
    for pair in scenes:
        quality.add(*pair)
    summary = quality.metrics().summary
    for theirs, ours in {"All": "", "Things": "_th", "Stuff": "_st"}.items():
        for name in ("pq", "sq", "rq"):
            assert summary[f"{name.upper()}{ours}"] == pytest.approx(found[theirs][name], abs=1e-9), (theirs, name)


def test_perfect_and_nothing() -> None:
    rng = np.random.default_rng(1)
    truth, _ = scene(rng)
    quality = PanopticQuality(CATEGORIES)
    assert set(quality.metrics().summary.values()) == {-1}
    quality.add(truth, truth)
    assert quality.metrics().summary["PQ"] == 1
    nothing = PanopticQuality(CATEGORIES)
    nothing.add(truth, Panoptic(np.zeros(SIZE, np.int64), ()))
    assert nothing.metrics().summary["PQ"] == 0
    nothing.add(Panoptic(np.zeros(SIZE, np.int64), ()), truth)  # all on void
    assert nothing.totals[:, 2].sum() == 0


def test_a_segment_may_have_the_id_of_void() -> None:
    """As the first one that DETR finds has."""
    ids = np.zeros(SIZE, np.int64)
    ids[:10] = 1
    quality = PanopticQuality(CATEGORIES)
    truth = Panoptic(ids + 1, (Segment(1, 0), Segment(2, 2)))
    quality.add(truth, Panoptic(ids, (Segment(0, 0), Segment(1, 2))))
    assert quality.metrics().summary["PQ"] == 1


def test_what_does_not_fit_is_refused() -> None:
    ids = np.full(SIZE, 4, np.int64)
    one, other = Panoptic(ids, (Segment(4, 0),)), Panoptic(ids[1:], (Segment(4, 0),))
    with pytest.raises(UserError, match=r"two maps of one size, got \(37, 53\) of the annotations and \(36, 53\)"):
        PanopticQuality(CATEGORIES).add(one, other)
    for segments in ((), (Segment(3, 0),), (Segment(5, 0),)):
        with pytest.raises(UserError, match="the map of the predictions has the id 4, which is none of its segments"):
            PanopticQuality(CATEGORIES).add(one, Panoptic(ids, segments))


def test_colors_are_ids() -> None:
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 256**3 - 1, 700_000]])
    colors = colors_of_ids(ids)
    assert colors[1, 2].tolist() == [255, 255, 255] and colors[0, 3].tolist() == [0, 1, 0]
    assert ids_of_colors(colors).tolist() == ids.tolist()
