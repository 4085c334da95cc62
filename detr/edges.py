"""Edges of boxes as distributions of how far they are from those of another box (D-FINE: Peng et al., ICLR 2025).

A distance is in parts of the box's width or height, of which `reg_scale` make up the whole; positive ones enlarge the
box. N + 1 bins stand for distances that are dense around 0. `up` is the last but one of them, as a part of `reg_scale`;
the last is twice as far.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from detr.boxes import xyxy_to_cxcywh


def bin_distances(
    reg_max: int, up: Float[Tensor, ""] | float, reg_scale: Float[Tensor, ""] | float
) -> Float[Tensor, " bins"]:
    """The distance that each bin stands for, the weighting function W(n). reg_max: N, even."""
    reach = torch.as_tensor(up).abs() * torch.as_tensor(reg_scale).abs()
    powers = torch.arange(1, reg_max // 2, device=reach.device)
    outward = (reach + 1) ** (2 * powers / (reg_max - 2)) - 1
    right = torch.cat((outward, 2 * reach[None]))
    return torch.cat((-right.flip(0), right.new_zeros(1), right))


def move_edges(
    boxes: Float[Tensor, "*batch 4"], distances: Float[Tensor, "*batch 4"], reg_scale: Float[Tensor, ""]
) -> Float[Tensor, "*batch 4"]:
    """Boxes (cxcywh) whose left, top, right and bottom edges are moved outwards by these distances."""
    center, size = boxes[..., :2], boxes[..., 2:]
    scale = reg_scale.abs()
    low, high = ((0.5 * scale + part) * (size / scale) for part in distances.chunk(2, dim=-1))
    return xyxy_to_cxcywh(torch.cat((center - low, center + high), dim=-1))


def edge_distances(
    boxes: Float[Tensor, "*batch 4"], wanted: Float[Tensor, "*batch 4"], reg_scale: float
) -> Float[Tensor, "*batch 4"]:
    """How far the edges of boxes (cxcywh) have to move to be those of others (xyxy)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    reach = torch.cat((center - wanted[..., :2], wanted[..., 2:] - center), dim=-1)
    part = size / abs(reg_scale) + 1e-16  # of boxes without a size
    return reach / part.repeat(*[1] * (part.dim() - 1), 2) - 0.5 * abs(reg_scale)


def between_bins(
    distances: Float[Tensor, "*batch"], bins: Float[Tensor, " bins"]
) -> tuple[Int64[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The bin at the left of each distance, and how much of it belongs to the one at the right.

    Distances beyond the bins count as the first or the last.
    """
    left = (torch.bucketize(distances, bins, right=True) - 1).clamp(0, len(bins) - 2)
    right = (distances - bins[left]) / (bins[left + 1] - bins[left])
    return left, right.clamp(0, 1)
