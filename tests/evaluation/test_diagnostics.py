"""Diagnostics of the matching against cases worked out by hand, and against loops over images, targets and queries."""

import pytest
import torch
from torch import Tensor

from detr.evaluation import MatchingDiagnostics
from detr.losses import HungarianMatcher
from detr.postprocess import postprocess
from detr.types import Detections, Matches, Predictions, Target
from tests.helpers import make_target, random_targets

NAMES = ["a", "b", "c"]


def evaluate(diagnostics: MatchingDiagnostics, *batches: tuple[Predictions, list[Target]]) -> dict[str, float]:
    measured = []
    for predictions, targets in batches:
        found = postprocess(predictions, [target.original_size for target in targets], NAMES)
        measured.append(diagnostics.measure(predictions, targets, found))
    return diagnostics.summarize(measured)


def predicted(classes: list[list[int]], boxes: Tensor) -> Predictions:
    """One image. classes: of the queries in each layer, 3 for no object, all of them sure. boxes: (Q, 4)."""
    logits = torch.nn.functional.one_hot(torch.tensor(classes), 4).float()[:, None] * 20
    return Predictions(logits=logits, boxes=boxes.expand(len(classes), 1, -1, -1))


# Two objects of the classes 0 and 1; a third of class 2 that no box is near.
TARGETS = [
    make_target(
        torch.tensor([0, 1, 2]), torch.tensor([[0.25, 0.5, 0.2, 0.4], [0.7, 0.5, 0.4, 0.4], [0.05, 0.05, 0.1, 0.1]])
    )
]
BOXES = torch.tensor(
    [
        [0.25, 0.5, 0.2, 0.4],  # the first object exactly
        [0.25, 0.5, 0.2, 0.36],  # and with an IoU of 0.9
        [0.7, 0.5, 0.4, 0.24],  # the second with 0.6
        [0.7, 0.5, 0.4, 0.36],  # and with 0.9
        [0.5, 0.9, 0.1, 0.1],  # nothing at all
    ]
)


def test_a_case_by_hand() -> None:
    """The first layer is sure of queries 1 and 2, the last of 0, 1 and 3; the third object gets query 4 in both."""
    predictions = predicted([[3, 0, 1, 3, 2], [0, 3, 3, 1, 2], [0, 0, 3, 1, 2]], BOXES)
    diagnostics = MatchingDiagnostics(HungarianMatcher(class_cost=10.0))
    assert evaluate(diagnostics, (predictions, TARGETS)) == pytest.approx(
        {
            "matching/layer_stability": 1 / 3,
            "matching/iou": (1 + 0.9 + 0) / 3,
            "matching/recall": 2 / 3,
            "matching/duplicates": 1
            / 2,  # query 1 repeats the first object, nothing the second; the third is not found
        },
        abs=1e-6,
    )


def test_stability_compares_with_the_evaluation_before() -> None:
    diagnostics = MatchingDiagnostics(HungarianMatcher(class_cost=10.0))
    classes = [[0, 3, 3, 1, 2], [0, 3, 1, 3, 2], [3, 0, 3, 1, 2], [3, 0, 3, 1, 2]]
    found = [evaluate(diagnostics, (predicted([row], BOXES), TARGETS)) for row in classes]
    assert "matching/stability" not in found[0]
    assert [values["matching/stability"] for values in found[1:]] == pytest.approx([2 / 3, 1 / 3, 1])
    assert all("matching/layer_stability" not in values for values in found), "one layer has none to compare with"


def by_loops(
    matches: Matches, predictions: Predictions, targets: list[Target], found: list[Detections]
) -> dict[str, list[float]]:
    def overlap(a: list[float], b: list[float]) -> float:
        sides = [
            max(0.0, min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2))
            for i in (0, 1)
        ]
        shared = sides[0] * sides[1]
        return shared / (a[2] * a[3] + b[2] * b[3] - shared)

    pairs = [dict(zip(t.tolist(), q.tolist(), strict=True)) for t, q in zip(matches.target, matches.query, strict=True)]
    values: dict[str, list[float]] = {"layer_stability": [], "iou": [], "recall": [], "duplicates": []}
    number = 0
    for image, target in enumerate(targets):
        boxes = predictions.boxes[-1, image].tolist()
        for label, wanted in zip(target.labels.tolist(), target.boxes.tolist(), strict=True):
            if number in pairs[-1]:
                values["layer_stability"].append(pairs[0].get(number) == pairs[-1][number])
                values["iou"].append(overlap(boxes[pairs[-1][number]], wanted))
            values["recall"].append(any(overlap(box, wanted) >= 0.5 for box in boxes))
            count = 0
            for box, score, other in zip(found[image].boxes, found[image].scores, found[image].labels, strict=True):
                x1, y1, x2, y2 = (box / 100).tolist()
                centered = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
                count += bool(score >= 0.3 and other == label and overlap(centered, wanted) >= 0.7)
            if count:
                values["duplicates"].append(count - 1)
            number += 1
    return values


def test_loops_give_the_same() -> None:
    """Several batches; images without targets, and with more of them than queries."""
    generator, matcher = torch.Generator().manual_seed(2), HungarianMatcher()
    batches, expected = [], {}
    for seed, counts in enumerate([[3, 0, 13], [0, 5], [1, 2, 4]]):
        targets = random_targets(counts, 3, seed)
        boxes = torch.rand(5, len(counts), 11, 4, generator=generator) * 0.4 + 0.2
        for image, target in enumerate(targets):  # some queries near their target
            for query in range(min(2 * len(target), 11)):
                noise = torch.rand(5, 4, generator=generator) * 0.1
                boxes[:, image, query] = target.boxes[query // 2] * (1 + noise)
        predictions = Predictions(
            logits=torch.randn(5, len(counts), 11, 4, generator=generator) * 3, boxes=boxes.clamp(max=0.9)
        )
        batches.append((predictions, targets))
        found = postprocess(predictions, [(100, 100)] * len(targets), NAMES)
        for name, values in by_loops(matcher(predictions, targets), predictions, targets, found).items():
            expected.setdefault(f"matching/{name}", []).extend(values)
    assert {len(values) for values in expected.values()} == {26, 28, len(expected["matching/duplicates"])}
    assert sum(expected["matching/duplicates"]) > 0
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    assert evaluate(MatchingDiagnostics(matcher), *batches) == pytest.approx(means, abs=1e-6)


def test_without_any_target_there_is_nothing_to_report() -> None:
    diagnostics = MatchingDiagnostics(HungarianMatcher())
    batch = (predicted([[0, 1, 2, 3, 3]] * 2, BOXES), random_targets([0], 3))
    assert evaluate(diagnostics, batch) == evaluate(diagnostics, batch) == {}
