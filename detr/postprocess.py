"""From predictions to detections in image pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detr import boxes as box_ops
from detr.types import Detections, Predictions


@torch.no_grad()
def postprocess(
    predictions: Predictions, original_sizes: Sequence[tuple[int, int]], names: Sequence[str]
) -> list[Detections]:
    """Always Q detections an image, best score first: no threshold and no suppression of overlaps, as published.

    Where the last layer has an output for no object (C = K + 1), the best class of each query with its softmax
    probability (DETR); where not (C = K), the best of all pairs of query and class by their sigmoid (Deformable DETR).
    original_sizes: (height, width) for each image. names: the K class names.
    """
    logits, num_classes = predictions.logits[-1].float(), len(names)
    if logits.shape[-1] == num_classes:
        scores, pairs = logits.sigmoid().flatten(1).sort(dim=-1, descending=True, stable=True)
        scores, pairs = scores[:, : logits.shape[1]], pairs[:, : logits.shape[1]]
        queries, labels = pairs // num_classes, pairs % num_classes
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, queries = scores.sort(dim=-1, descending=True, stable=True)
        labels = labels.gather(1, queries)
    boxes = box_ops.cxcywh_to_xyxy(predictions.boxes[-1].float())
    boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    scale = torch.tensor([(w, h, w, h) for h, w in original_sizes], dtype=boxes.dtype, device=boxes.device)
    boxes = boxes * scale[:, None]
    scores, labels, boxes = scores.cpu(), labels.cpu(), boxes.cpu()
    return [_detections(*image, names) for image in zip(boxes, scores, labels, strict=True)]


def _detections(boxes: Tensor, scores: Tensor, labels: Tensor, names: Sequence[str]) -> Detections:
    return Detections(boxes=boxes, scores=scores, labels=labels, names=[names[label] for label in labels.tolist()])
