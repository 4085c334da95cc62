"""From predictions to detections in image pixels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from detr import boxes as box_ops
from detr.masks import Masks
from detr.types import Detections, Predictions

PUBLISHED_PAIRS = 300  # of DINO; Conditional and Deformable DETR take 100
_MASKS = 8  # that are enlarged together


@torch.no_grad()
def postprocess(
    predictions: Predictions,
    original_sizes: Sequence[tuple[int, int]],
    names: Sequence[str],
    max_dets: int = PUBLISHED_PAIRS,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    threshold: float | Float[Tensor, " classes"] = 0.0,
) -> list[Detections]:
    """Detections of each image, best score first: no suppression of overlaps, as published.

    Where the last layer has an output for no object (C = K + 1), the best class of each of the Q queries with its
    softmax probability (DETR). Where not (C = K), the best `max_dets` of the Q * K pairs of query and class by their
    sigmoid, as in DINO.

    original_sizes: (height, width) for each image. names: the K class names. sizes: (height, width) for each image as
    the model got it, without padding; needed for masks. threshold: as in `Detections.above`.
    """
    logits, num_classes = predictions.logits[-1].float(), len(names)
    if logits.shape[-1] == num_classes:
        scores, pairs = logits.sigmoid().flatten(1).sort(dim=-1, descending=True, stable=True)
        scores, pairs = scores[:, :max_dets], pairs[:, :max_dets]
        queries, labels = pairs // num_classes, pairs % num_classes
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, queries = scores.sort(dim=-1, descending=True, stable=True)
        labels = labels.gather(1, queries)
    images = torch.arange(len(queries), device=queries.device)[:, None]
    boxes = box_ops.cxcywh_to_xyxy(predictions.boxes[-1, images, queries].float())
    scale = torch.tensor([(w, h, w, h) for h, w in original_sizes], dtype=boxes.dtype, device=boxes.device)
    boxes = boxes * scale[:, None]
    columns = zip(boxes.cpu(), scores.cpu(), labels.cpu(), queries.cpu(), strict=True)
    found = [_detections(*image, names).above(threshold) for image in columns]
    if predictions.masks is None or predictions.mask_size is None:
        return found
    everything = zip(found, predictions.masks[-1], sizes, original_sizes, strict=True)
    return [
        replace(detections, masks=_masks(detections.queries, logits, predictions.mask_size, size, original))
        for detections, logits, size, original in everything
    ]


def _masks(
    queries: Int64[Tensor, " n"],
    logits: Float[Tensor, "all_queries h w"],
    padded: tuple[int, int],
    size: tuple[int, int],
    original: tuple[int, int],
) -> Masks:
    """As published: enlarged to the padded image, at least a half each, without padding, as large as the original.

    A few at a time, and each query once, however often it was found: those of a photograph take gigabytes.
    """
    height, width = size
    unique, place = queries.unique(return_inverse=True)
    parts = []
    for chosen in unique.to(logits.device).split(_MASKS) if len(unique) else ():  # torch enlarges no empty tensor
        enlarged = F.interpolate(logits[None, chosen].float(), size=padded, mode="bilinear")[0, :, :height, :width]
        pixels = (enlarged > 0)[None].byte()  # the logits of a half
        parts.append(Masks.encode(F.interpolate(pixels, size=original, mode="nearest")[0].bool()))
    return Masks(size=original, counts=tuple(count for part in parts for count in part.counts)).select(place)


def non_finite(predictions: Predictions) -> list[int]:
    """The images of a batch, by index, for which the last layer is NaN or infinite."""
    last = predictions.layers(slice(-1, None)).tensors().values()
    finite = torch.stack([tensor[0].isfinite().flatten(1).all(1) for tensor in last]).all(0)
    return (~finite).nonzero()[:, 0].tolist()


def _detections(boxes: Tensor, scores: Tensor, labels: Tensor, queries: Tensor, names: Sequence[str]) -> Detections:
    named = [names[label] for label in labels.tolist()]
    return Detections(boxes=boxes, scores=scores, labels=labels, names=named, queries=queries)
