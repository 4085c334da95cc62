"""From predictions to panoptic segmentations, as published for DETR (Carion et al., ECCV 2020)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from detr.errors import UserError
from detr.postprocess import Ranked
from detr.segments import Panoptic, Segment
from detr.types import Category, Predictions

PUBLISHED_THRESHOLD = 0.85
_LEAST = 4  # pixels; what has no more is dropped


@torch.no_grad()
def panoptic_segmentations(
    predictions: Predictions | Ranked,
    sizes: Sequence[tuple[int, int]],
    original_sizes: Sequence[tuple[int, int]],
    categories: Sequence[Category],
    *,
    padded_size: tuple[int, int] | None = None,
    threshold: float = PUBLISHED_THRESHOLD,
) -> list[Panoptic]:
    """The segmentation of each image; its segments have the ids 0, 1, ...

    Each pixel goes to the query of the largest mask logit, among those whose best class is not 'no object' and has a
    probability above the threshold: by softmax where there is an output for no object, as published, else by sigmoid.
    Segments of one class of stuff are one. Where segments of at most 4 pixels are
    left, those merged into others among them, they are dropped, and the pixels are shared anew among the rest.

    predictions: with masks.
    sizes, original_sizes: (height, width) of each image as the model got it, without padding, and of its file.
    categories: the K classes, by label.
    padded_size: (height, width) of the batch with its padding, which masks cover. None: as published, where masks are
        taken to cover each image alone, which is right only for images without padding.
    Raises UserError for predictions without masks, or of another number of classes.
    """
    if isinstance(predictions, Ranked):
        raise UserError("Segments need the logits of all queries. Export the model again with postprocess=false.")
    outputs = predictions.logits.shape[-1]
    if predictions.masks is None or outputs - len(categories) not in (0, 1):
        has = "no masks" if predictions.masks is None else f"{outputs} logits"
        raise UserError(
            f"panoptic_segmentations: wanted predictions with masks and {len(categories)} logits, one for each class, "
            f"or one more for no object, got {has}. Use a model with model/masks=detr or dot_product."
        )
    things = torch.tensor([category.is_thing for category in categories])
    segmentations = []
    columns = (predictions.logits[-1].float(), predictions.masks[-1].float(), sizes, original_sizes)
    for logits, small, size, original_size in zip(*columns, strict=True):
        scores, labels = (logits.sigmoid() if outputs == len(categories) else logits.softmax(-1)).max(-1)
        kept = (labels < len(categories)) & (scores > threshold)
        masks = F.interpolate(small[kept][:, None], padded_size or size, mode="bilinear")[:, 0]
        visible = masks[:, : size[0], : size[1]]
        segmentations.append(_merged(visible, labels[kept].cpu(), things, original_size))
    return segmentations


def _merged(
    masks: Float[Tensor, "n height width"], labels: Int64[Tensor, " n"], things: Tensor, original_size: tuple[int, int]
) -> Panoptic:
    first = _first_of_stuff(labels, things)
    while True:
        ids = _resized(_owners(masks, first), original_size)
        large = torch.from_numpy(np.bincount(ids.ravel(), minlength=len(labels))[: len(labels)] > _LEAST)
        if large.all():
            segments = tuple(Segment(number, label) for number, label in enumerate(labels.tolist()))
            return Panoptic(ids=ids, segments=segments)
        masks, labels = masks[large.to(masks.device)], labels[large]
        first = torch.arange(len(labels))  # one of each stuff class is left, with its own mask alone, as published


def _first_of_stuff(labels: Int64[Tensor, " n"], things: Tensor) -> Int64[Tensor, " n"]:
    """Of each query the first one of its class where that is stuff, and otherwise itself."""
    same = (labels[:, None] == labels) & ~things[labels]
    return torch.where(same.any(1), same.int().argmax(1), torch.arange(len(labels))) if len(labels) else labels


def _owners(masks: Float[Tensor, "n height width"], first: Int64[Tensor, " n"]) -> Int64[Tensor, "height width"]:
    if not len(masks):
        return torch.zeros(masks.shape[1:], dtype=torch.int64)
    return first[masks.softmax(0).argmax(0).cpu()]


def _resized(ids: Int64[Tensor, "height width"], size: tuple[int, int]) -> Int64[np.ndarray, "h w"]:
    """By Pillow, whose nearest pixels are the published ones."""
    image = Image.fromarray(ids.numpy().astype(np.int32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)
