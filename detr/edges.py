"""Edges of boxes as distributions of how far they are from those of another box (D-FINE: Peng et al., ICLR 2025).

The unit of distance is the width of the box (left and right) or its height (top and bottom), divided by `reg_scale`.
Positive distances are outwards. N + 1 bins stand for distances from -2 * up * reg_scale to 2 * up * reg_scale, densest
around 0; those next to the ends stand for half as much.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from detr.boxes import xyxy_to_cxcywh


def bin_distances(
    reg_max: int, up: Float[Tensor, ""] | float, reg_scale: Float[Tensor, ""] | float
) -> Float[Tensor, " bins"]:
    """The distance that each of N + 1 bins stands for, the weighting function W(n). reg_max: N, even, at least 4."""
    reach = torch.as_tensor(up).abs() * torch.as_tensor(reg_scale).abs()
    powers = torch.arange(1, reg_max // 2, device=reach.device)
    outward = (reach + 1) ** (2 * powers / (reg_max - 2)) - 1
    right = torch.cat((outward, 2 * reach[None]))
    return torch.cat((-right.flip(0), right.new_zeros(1), right))


def expected_distances(
    distributions: Float[Tensor, "*batch bins"], bins: Float[Tensor, " bins"]
) -> Float[Tensor, "*batch"]:
    """The mean of the distances that bins stand for. distributions: logits; autocast does not lower their precision."""
    with torch.autocast(distributions.device.type, enabled=False):
        return distributions.softmax(-1) @ bins.to(distributions)


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
    """How far the left, top, right and bottom edges of boxes (cxcywh) have to move to be those of others (xyxy)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    reach = torch.cat((center - wanted[..., :2], wanted[..., 2:] - center), dim=-1)
    unit = size / abs(reg_scale) + 1e-16  # some boxes have no size
    return reach / torch.cat((unit, unit), dim=-1) - 0.5 * abs(reg_scale)


def between_bins(
    distances: Float[Tensor, "*batch"], bins: Float[Tensor, " bins"]
) -> tuple[Int64[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The bin below each distance, and which share of the distance belongs to the bin above, by interpolation.

    Distances beyond the first or last bin count as that bin's.
    """
    left = (torch.bucketize(distances, bins, right=True) - 1).clamp(0, len(bins) - 2)
    right = (distances - bins[left]) / (bins[left + 1] - bins[left])
    return left, right.clamp(0, 1)
