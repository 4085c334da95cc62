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
    """The best class of every query of the last layer, its softmax probability and its box, best score first.

    Always Q detections an image: no threshold and no suppression of overlaps, as in published DETR.
    original_sizes: (height, width) for each image. names: the class names.
    """
    scores, labels = predictions.logits[-1].float().softmax(-1)[..., :-1].max(-1)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    labels = labels.gather(1, order)
    boxes = box_ops.cxcywh_to_xyxy(predictions.boxes[-1].float())
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    scale = torch.tensor([(w, h, w, h) for h, w in original_sizes], dtype=boxes.dtype, device=boxes.device)
    boxes = boxes * scale[:, None]
    scores, labels, boxes = scores.cpu(), labels.cpu(), boxes.cpu()
    return [_detections(*image, names) for image in zip(boxes, scores, labels, strict=True)]


def _detections(boxes: Tensor, scores: Tensor, labels: Tensor, names: Sequence[str]) -> Detections:
    return Detections(boxes=boxes, scores=scores, labels=labels, names=[names[label] for label in labels.tolist()])
