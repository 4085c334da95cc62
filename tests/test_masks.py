"""Run-length encodings, judged by the pixels that they stand for."""

import numpy as np
import torch

from detr.masks import Masks


def test_masks_are_what_they_were_encoded_from() -> None:
    pixels = torch.rand((7, 13, 11), generator=torch.Generator().manual_seed(0)) > 0.6
    masks = Masks.encode(pixels)
    assert torch.equal(masks.decode(), pixels)
    assert np.array_equal(masks.areas(), pixels.sum((1, 2)).numpy())
    assert torch.equal(masks.select(torch.tensor([5, 0])).decode(), pixels[[5, 0]])


def test_there_may_be_many() -> None:
    pixels = torch.rand((300, 5, 4), generator=torch.Generator().manual_seed(0)) > 0.5
    masks = Masks.encode(pixels)
    assert np.array_equal(masks.areas(), pixels.sum((1, 2)).numpy())
    assert torch.equal(masks.decode(), pixels)


def test_no_masks_have_a_size_too() -> None:
    masks = Masks.encode(torch.zeros((0, 13, 11), dtype=torch.bool))
    assert len(masks) == len(masks.areas()) == 0
    assert masks.decode().shape == (0, 13, 11)
