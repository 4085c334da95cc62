"""Detections from softmax and sigmoid outputs, against a search pair by pair."""

from dataclasses import replace

import pytest
import torch

from detr.errors import UserError
from detr.postprocess import non_finite, postprocess, ranked
from detr.types import Predictions

NAMES, SIZES = ["ant", "bee", "cat"], [(100, 200), (50, 30)]


def random_predictions(outputs: int) -> Predictions:
    torch.manual_seed(4)
    return Predictions(logits=torch.randn(2, 2, 5, outputs), boxes=torch.rand(2, 2, 5, 4))


@pytest.mark.parametrize("most", [1, 5, 11, 15, 300])
def test_sigmoid_takes_the_best_pairs_of_query_and_class(most: int) -> None:
    predictions = random_predictions(outputs=3)
    for image, found in enumerate(postprocess(predictions, SIZES, NAMES, most)):
        pairs = [(float(predictions.logits[-1, image, q, c].sigmoid()), q, c) for q in range(5) for c in range(3)]
        best = sorted(pairs, reverse=True)[:most]
        assert len(best) == len(found) == min(most, 5 * 3)
        assert found.labels.tolist() == [c for *_, c in best] and found.names == [NAMES[c] for *_, c in best]
        assert found.queries.tolist() == [q for _, q, _ in best]
        torch.testing.assert_close(found.scores, torch.tensor([score for score, *_ in best]))
        height, width = SIZES[image]
        x, y, w, h = predictions.boxes[-1, image, [q for _, q, _ in best]].unbind(-1)
        corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1)
        torch.testing.assert_close(found.boxes, corners * torch.tensor([width, height, width, height]))


def test_sigmoid_keeps_the_order_of_ties() -> None:
    predictions = random_predictions(outputs=3)
    predictions.logits[:] = 0
    found = postprocess(predictions, SIZES, NAMES, 5)[0]
    assert found.labels.tolist() == [0, 1, 2, 0, 1] and torch.equal(found.boxes[0], found.boxes[2])


def test_softmax_takes_the_best_class_of_each_query() -> None:
    predictions = random_predictions(outputs=4)
    for image, found in enumerate(postprocess(predictions, SIZES, NAMES)):
        probabilities = predictions.logits[-1, image].softmax(-1)[:, :3]
        best = sorted(((float(row.max()), int(row.argmax())) for row in probabilities), reverse=True)
        torch.testing.assert_close(found.scores, torch.tensor([score for score, _ in best]))
        assert found.labels.tolist() == [label for _, label in best]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_with_predictions_that_are_not_finite_are_found(value: float) -> None:
    for field in ("logits", "boxes"):
        predictions = random_predictions(outputs=3)
        assert non_finite(predictions) == []
        getattr(predictions, field)[-1, 1, 4, 2] = value
        assert non_finite(predictions) == [1]


def test_an_image_may_have_masks_and_no_detection() -> None:
    predictions = replace(random_predictions(outputs=3), masks=torch.randn(1, 2, 5, 4, 6), mask_size=(16, 24))
    for threshold, count in ((0.0, 15), (1.0, 0)):
        found = postprocess(predictions, SIZES, NAMES, sizes=[(12, 24), (16, 10)], threshold=threshold)
        assert [len(one.masks) for one in found] == [count, count]
        assert [one.masks.size for one in found] == SIZES


def test_more_than_an_exported_file_gives_is_refused() -> None:
    best = ranked(Predictions(logits=torch.randn(1, 1, 200, 3), boxes=torch.rand(1, 1, 200, 4)), num_classes=3)
    assert len(postprocess(best, [(10, 10)], ["a", "b", "c"], 300)[0]) == 300
    with pytest.raises(UserError, match=r"max_dets: wanted at most 300, .* exported file gives .*, got 301"):
        postprocess(best, [(10, 10)], ["a", "b", "c"], 301)
    few = ranked(Predictions(logits=torch.randn(1, 1, 9, 3), boxes=torch.rand(1, 1, 9, 4)), num_classes=3)
    assert len(postprocess(few, [(10, 10)], ["a", "b", "c"], 301)[0]) == 27
