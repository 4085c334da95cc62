"""From predictions to detections in image pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from detr import boxes as box_ops
from detr.errors import UserError
from detr.masks import Masks
from detr.types import Detections, Predictions, TensorContainer, exporting

PUBLISHED_PAIRS = 300  # of DINO; Conditional and Deformable DETR take 100
_MASKS = 8  # that are enlarged together


@dataclass(frozen=True)
class Ranked(TensorContainer):
    """The best pairs of query and class of each image of a batch, best score first.

    scores: (B, N) in [0, 1].
    labels: (B, N) contiguous class indices.
    boxes: (B, N, 4) as x1, y1, x2, y2 in [0, 1] of each image without its padding.
    queries: (B, N) index of the object query.
    masks: (B, Q, h, w) logits of the masks of all queries, as `Predictions` has them; None from models without.
    mask_size: (height, width) in pixels of the images with their padding, which masks cover.
    """

    scores: Float[Tensor, "batch n"]
    labels: Int64[Tensor, "batch n"]
    boxes: Float[Tensor, "batch n 4"]
    queries: Int64[Tensor, "batch n"]
    masks: Float[Tensor, "batch queries h w"] | None = None
    mask_size: tuple[int, int] | None = None


@torch.no_grad()
def ranked(predictions: Predictions, num_classes: int, max_dets: int = PUBLISHED_PAIRS) -> Ranked:
    """What the last layer found: no suppression of overlaps, as published.

    Where the last layer has an output for no object (C = K + 1), the best class of each of the Q queries with its
    softmax probability (DETR). Where not (C = K), the best `max_dets` of the Q * K pairs of query and class by their
    sigmoid, as in DINO.
    """
    logits = predictions.logits[-1].float()
    if logits.shape[-1] == num_classes:
        scores, pairs = _best(logits.sigmoid().flatten(1), max_dets)
        queries, labels = pairs // num_classes, pairs % num_classes
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, queries = scores.sort(dim=-1, descending=True, stable=True)
        labels = labels.gather(1, queries)
    boxes = box_ops.cxcywh_to_xyxy(predictions.boxes[-1].float())
    return Ranked(
        scores=scores,
        labels=labels,
        boxes=boxes.gather(1, queries[..., None].expand(-1, -1, 4)),
        queries=queries,
        masks=None if predictions.masks is None else predictions.masks[-1],
        mask_size=predictions.mask_size,
    )


def _best(scores: Float[Tensor, "batch pairs"], most: int) -> tuple[Float[Tensor, "batch n"], Int64[Tensor, "batch n"]]:
    """The highest, in order, and where they are; of equal ones, the first ones first."""
    if exporting():  # ONNX's TopK has this order, and takes a tenth of the time that sorting all takes
        found, places = scores.topk(min(most, scores.shape[1]), dim=-1)
        return found, places
    scores, places = scores.sort(dim=-1, descending=True, stable=True)
    return scores[:, :most], places[:, :most]


@torch.no_grad()
def postprocess(
    outputs: Predictions | Ranked,
    original_sizes: Sequence[tuple[int, int]],
    names: Sequence[str],
    max_dets: int = PUBLISHED_PAIRS,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    threshold: float | Float[Tensor, " classes"] = 0.0,
) -> list[Detections]:
    """Detections of each image, best score first, as `ranked` has them.

    original_sizes: (height, width) for each image. names: the K class names. sizes: (height, width) for each image as
    the model got it, without padding; needed for masks. threshold: as in `Detections.above`.
    Raises UserError where an exported file gives fewer detections than are asked for.
    """
    best = outputs if isinstance(outputs, Ranked) else ranked(outputs, len(names), max_dets)
    if best is outputs and best.scores.shape[1] == PUBLISHED_PAIRS < max_dets:
        raise UserError(
            f"max_dets: wanted at most {PUBLISHED_PAIRS}, as many as the exported file gives of an image, got "
            f"{max_dets}. Lower it, or use the checkpoint."
        )
    scale = torch.tensor([(w, h, w, h) for h, w in original_sizes], dtype=best.boxes.dtype, device=best.boxes.device)
    boxes = best.boxes * scale[:, None]
    columns = zip(boxes.cpu(), best.scores.cpu(), best.labels.cpu(), best.queries.cpu(), strict=True)
    found = [_detections(*image, names).above(threshold) for image in columns]
    if best.masks is None or best.mask_size is None:
        return found
    everything = zip(found, best.masks, sizes, original_sizes, strict=True)
    return [
        replace(detections, masks=_masks(detections.queries, logits, best.mask_size, size, original))
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


def non_finite(outputs: Predictions | Ranked) -> list[int]:
    """The images of a batch, by index, for which the last layer is NaN or infinite."""
    tensors = outputs.tensors().values()
    last = tensors if isinstance(outputs, Ranked) else [tensor[-1] for tensor in tensors]
    finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in last]).all(0)
    return (~finite).nonzero()[:, 0].tolist()


def _detections(boxes: Tensor, scores: Tensor, labels: Tensor, queries: Tensor, names: Sequence[str]) -> Detections:
    named = [names[label] for label in labels.tolist()]
    return Detections(boxes=boxes, scores=scores, labels=labels, names=named, queries=queries)
