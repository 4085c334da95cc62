"""The panoptic merge against the published code's, and its rules on small masks."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr.errors import UserError
from detr.panoptic import panoptic_segmentations
from detr.segments import colors_of_ids, ids_of_colors
from detr.types import Category, Predictions

CATEGORIES = [Category(label, str(label), is_thing=label <= 4) for label in range(8)]


def predictions(logits: torch.Tensor, masks: torch.Tensor) -> Predictions:
    return Predictions(logits=logits[None], boxes=torch.zeros(1, *logits.shape[:2], 4), masks=masks[None])


def test_segments_are_those_of_the_published_code(shared: Path) -> None:
    path = shared / "fixtures" / "detr" / "segmentation.pt"
    case = torch.load(path, weights_only=True)["postprocess_panoptic"]
    inputs = case["inputs"]
    assert case["is_thing_max_id"] == 4
    found = panoptic_segmentations(
        predictions(inputs["pred_logits"], inputs["pred_masks"]),
        [tuple(size) for size in case["processed_sizes"].tolist()],
        [tuple(size) for size in case["target_sizes"].tolist()],
        CATEGORIES,
        threshold=case["threshold"],
    )
    for one, expected in zip(found, case["preds"], strict=True):
        colors = np.array(Image.open(io.BytesIO(expected["png_string"])))
        assert np.array_equal(one.ids, ids_of_colors(colors)) and np.array_equal(colors_of_ids(one.ids), colors)
        assert one.rows(CATEGORIES) == expected["segments_info"]


def certain(*labels: int) -> torch.Tensor:
    return 20 * torch.nn.functional.one_hot(torch.tensor([labels]), 9).float()


def test_without_segments_there_is_a_map_of_none() -> None:
    for labels in ((8, 8), (8, 1)):
        logits = certain(*labels)
        logits[0, 1] /= 20  # a probability far below the threshold
        [found] = panoptic_segmentations(
            predictions(logits, torch.randn(1, 2, 5, 7)), [(20, 28)], [(41, 57)], CATEGORIES
        )
        assert found.segments == () and found.ids.shape == (41, 57) and not found.ids.any()


def test_stuff_is_merged_and_small_segments_are_dropped() -> None:
    masks = torch.full((1, 4, 8, 8), -5.0)
    masks[0, 0, :4] = 5  # stuff
    masks[0, 1, 4:] = 4  # a thing
    masks[0, 2, 4:, 4:] = 5  # another one
    masks[0, 3, 7, :2] = 5  # 2 pixels of a third one
    sizes = {"sizes": [(8, 8)], "original_sizes": [(8, 8)], "categories": CATEGORIES}
    [found] = panoptic_segmentations(predictions(certain(6, 1, 1, 2), masks), **sizes)
    assert [segment.label for segment in found.segments] == [6, 1, 1]
    assert [row["area"] for row in found.rows(CATEGORIES)] == [32, 16, 16]
    assert (found.ids[:4] == 0).all() and (found.ids[4:, :4] == 1).all() and (found.ids[4:, 4:] == 2).all()
    [merged] = panoptic_segmentations(predictions(certain(6, 1, 6, 6), masks), **sizes)
    assert [segment.label for segment in merged.segments] == [6, 1]
    assert len(np.unique(merged.ids)) == 2


def test_single_equals_batched() -> None:
    """With the size of the padded batch; as published, the masks of a smaller image would be squeezed."""
    torch.manual_seed(0)
    masks = 9 * torch.randn(2, 6, 12, 15)
    sizes, originals = [(48, 60), (32, 44)], [(97, 121), (65, 90)]
    batch = predictions(certain(0, 1, 6, 7, 3, 8).repeat(2, 1, 1), masks)
    together = panoptic_segmentations(batch, sizes, originals, CATEGORIES, padded_size=(48, 60))
    for index, both in enumerate(together):
        [alone] = panoptic_segmentations(
            batch.select(images=slice(index, index + 1)),
            sizes[index : index + 1],
            originals[index : index + 1],
            CATEGORIES,
            padded_size=(48, 60),
        )
        assert np.array_equal(alone.ids, both.ids) and alone.segments == both.segments
        assert both.ids.shape == originals[index] and len(both.segments) == 5
    [whole, squeezed] = panoptic_segmentations(batch, sizes, originals, CATEGORIES)
    assert np.array_equal(whole.ids, together[0].ids) and not np.array_equal(squeezed.ids, together[1].ids)
    visible = torch.nn.functional.interpolate(masks[1:, :5], (48, 60), mode="bilinear")[0, :, :32, :44].argmax(0)
    assert set(np.unique(together[1].ids)) == set(visible.unique().tolist())


def test_predictions_that_do_not_fit_are_refused() -> None:
    one = predictions(certain(1, 2), torch.zeros(1, 2, 4, 4))
    with pytest.raises(UserError, match=r"wanted predictions with masks and 7 logits, .* got 9 logits"):
        panoptic_segmentations(one, [(16, 16)], [(16, 16)], CATEGORIES[:7])
    boxes = Predictions(logits=one.logits, boxes=one.boxes)
    with pytest.raises(UserError, match=r"wanted predictions with masks and 8 logits, .* got no masks"):
        panoptic_segmentations(boxes, [(16, 16)], [(16, 16)], CATEGORIES)
