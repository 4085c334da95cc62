"""Box formats and overlaps. All functions work elementwise over leading dimensions and broadcast.

`cxcywh` is center x, center y, width, height; `xyxy` is the left, top, right and bottom edge.
For overlaps between all pairs, broadcast: `giou(a[:, None], b[None, :])`.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def cxcywh_to_xyxy(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """A width or height below 0, of a box whose edges have passed one another, counts as 0."""
    center, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) * 0.5
    return torch.cat((center - half, center + half), dim=-1)


def xyxy_to_cxcywh(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) * 0.5, high - low), dim=-1)


def inverse_sigmoid(x: Float[Tensor, "*batch"], eps: float = 1e-5) -> Float[Tensor, "*batch"]:
    """Logits of shares in [0, 1], as published: the share and what it lacks of 1 each count as `eps` at least.

    eps: 1e-5 in Deformable and Conditional DETR and RT-DETR, 1e-3 in DAB-DETR, DN-DETR and DINO.
    """
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Area of xyxy boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Intersection over union of xyxy boxes, in [0, 1]."""
    intersection, union = _intersection_and_union(a, b)
    return intersection / union


def giou(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Generalized intersection over union of xyxy boxes, in [-1, 1] (Rezatofighi et al., CVPR 2019)."""
    intersection, union = _intersection_and_union(a, b)
    # One coordinate at a time: contiguous work that is much faster than slices of two on the CPU.
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    return intersection / union - (hull - union) / hull


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    return intersection, area(a) + area(b) - intersection
