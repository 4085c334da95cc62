"""Deformable attention (Zhu et al., ICLR 2021), in plain PyTorch."""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from detr.models.layers.multihead import check_heads
from detr.models.values import Memory, QueryPositions


class DeformableAttention(nn.Module):
    """Each head of each query looks at a few points of every level, which it places around the query's anchor.

    num_levels: feature maps in the memory. num_points: points a head samples in each of them.
    """

    def __init__(self, *, d_model: int, nhead: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        check_heads(self, d_model, nhead)
        self.nhead, self.num_levels, self.num_points = nhead, num_levels, num_points
        self.sampling_offsets = nn.Linear(d_model, nhead * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(d_model, nhead * num_levels * num_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start every head looks in a direction of its own, its points 1, 2, ... cells away, all alike."""
        angle = torch.arange(self.nhead) * (2 * math.pi / self.nhead)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None] * steps[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def attend(
        self,
        query: Float[Tensor, "batch queries d_model"],
        anchors: Float[Tensor, "batch queries dims"],
        memory: Memory,
    ) -> Float[Tensor, "batch queries d_model"]:
        """anchors: points (x, y) or boxes (cxcywh) in [0, 1] of the image without its padding.

        Offsets are in cells of a map around a point, and in half sizes of the box, over num_points, around a box.
        """
        value = self.value_proj(memory.tokens)
        if memory.mask is not None:
            value = value.masked_fill(memory.mask[..., None], 0.0)
        value = value.unflatten(-1, (self.nhead, -1))
        return self.output_proj(sample(value, memory.shapes, *self._points(query, anchors, memory)))

    def token_weights(self, query: Tensor, anchors: Tensor, memory: Memory) -> Float[Tensor, "batch queries tokens"]:
        """What `attend` weighs the tokens' values with: mean over heads. In sum 1, less what lies outside of maps."""
        weights = spread(memory.shapes, *self._points(query, anchors, memory)) / self.nhead
        return weights if memory.mask is None else weights.masked_fill(memory.mask[:, None], 0.0)

    def _points(self, query: Tensor, anchors: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Locations and weights, as `sample` takes them."""
        heads = (self.nhead, self.num_levels, self.num_points)
        weights = self.attention_weights(query).unflatten(-1, (self.nhead, -1)).softmax(-1).unflatten(-1, heads[1:])
        offsets = self.sampling_offsets(query).unflatten(-1, (*heads, 2))
        around = memory.on_levels(anchors)[:, :, None, :, None]
        if anchors.shape[-1] == 2:
            locations = around + offsets / memory.sizes[:, None]
        else:
            locations = around[..., :2] + offsets * around[..., 2:] * (0.5 / self.num_points)
        return locations, weights


class DeformableSelfAttention(DeformableAttention):
    """Every token looks at points around its cell, in all levels."""

    def forward(self, memory: Memory) -> Float[Tensor, "batch tokens d_model"]:
        return self.attend(memory.key, memory.centers, memory)

    def weights(self, memory: Memory, token: Int64[Tensor, " batch"]) -> Float[Tensor, "batch tokens"]:
        """How much one token of each image takes from each: mean over heads."""
        query, center = (x.take_along_dim(token[:, None, None], dim=1) for x in (memory.key, memory.centers))
        return self.token_weights(query, center, memory)[:, 0]


class DeformableCrossAttention(DeformableAttention):
    """Every query looks at points around its anchor, in all levels."""

    def forward(self, x: Tensor, positions: QueryPositions, memory: Memory) -> Float[Tensor, "batch queries d_model"]:
        assert positions.anchors is not None
        return self.attend(x + positions.position, positions.anchors, memory)

    def weights(self, x: Tensor, positions: QueryPositions, memory: Memory) -> Float[Tensor, "batch queries tokens"]:
        """How much each query takes from each token: mean over heads."""
        assert positions.anchors is not None
        return self.token_weights(x + positions.position, positions.anchors, memory)


def sample(
    value: Float[Tensor, "batch tokens heads features"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*features"]:
    """Bilinear samples of every head's maps, summed with their weights; zero outside of a map.

    shapes: (height, width) of each level. locations: (x, y) in [0, 1] of each map.
    """
    # Queries innermost: they are many, points are few, and work along few elements is slow.
    grid = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    weights = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in shapes], dim=-1)
    # Level by level: what all levels sample is by far the largest tensor of a model, and need not be there twice.
    mixed = sum(
        (F.grid_sample(level.unflatten(-1, shape), points, align_corners=False) * weight[:, None]).sum(-2)
        for level, shape, points, weight in zip(maps, shapes, grid, weights, strict=True)
    )
    return cast(Tensor, mixed).unflatten(0, (len(value), -1)).flatten(1, 2).transpose(1, 2)


def spread(
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries tokens"]:
    """What `sample` with the same arguments multiplies each token's value with, summed over heads.

    A bilinear sample takes from each cell by a tent in x times one in y, 1 high at its center and 0 at the next one's.
    """

    def tents(at: Tensor, size: int) -> Float[Tensor, "batch queries points cells"]:
        centers = torch.arange(size, device=at.device) + 0.5
        return (1 - (at[..., None] * size - centers).abs()).clamp(min=0).flatten(2, 3)

    levels = []
    for level, (height, width) in enumerate(shapes):
        x, y = locations[:, :, :, level].unbind(-1)
        rows = tents(y, height) * weights[:, :, :, level].flatten(2)[..., None]
        levels.append((rows.transpose(2, 3) @ tents(x, width)).flatten(2))
    return torch.cat(levels, dim=-1)
