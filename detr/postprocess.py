"""From predictions to detections in image pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detr import boxes as box_ops
from detr.types import Detections, Predictions

PUBLISHED_PAIRS = 300  # of DINO; Conditional and Deformable DETR take 100


@torch.no_grad()
def postprocess(
    predictions: Predictions,
    original_sizes: Sequence[tuple[int, int]],
    names: Sequence[str],
    max_dets: int = PUBLISHED_PAIRS,
) -> list[Detections]:
    """Detections of each image, best score first: no threshold and no suppression of overlaps, as published.

    Where the last layer has an output for no object (C = K + 1), the best class of each of the Q queries with its
    softmax probability (DETR). Where not (C = K), the best `max_dets` of the Q * K pairs of query and class by their
    sigmoid, as in DINO. original_sizes: (height, width) for each image. names: the K class names.
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
    found = predictions.layers(slice(-1, None)).gather(queries)
    boxes = box_ops.cxcywh_to_xyxy(found.boxes[-1].float())
    scale = torch.tensor([(w, h, w, h) for h, w in original_sizes], dtype=boxes.dtype, device=boxes.device)
    boxes = boxes * scale[:, None]
    images = zip(boxes.cpu(), scores.cpu(), labels.cpu(), queries.cpu(), strict=True)
    return [_detections(*image, names) for image in images]


def non_finite(predictions: Predictions) -> list[int]:
    """The images of a batch, by index, for which the last layer is NaN or infinite."""
    last = predictions.layers(slice(-1, None)).tensors().values()
    finite = torch.stack([tensor[0].isfinite().flatten(1).all(1) for tensor in last]).all(0)
    return (~finite).nonzero()[:, 0].tolist()


def _detections(boxes: Tensor, scores: Tensor, labels: Tensor, queries: Tensor, names: Sequence[str]) -> Detections:
    named = [names[label] for label in labels.tolist()]
    return Detections(boxes=boxes, scores=scores, labels=labels, names=named, queries=queries)
