"""Deformable attention (Zhu et al., ICLR 2021), in plain PyTorch."""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.layers.multihead import check_heads
from detr.models.values import Memory, QueryPositions

Sampling = Literal["bilinear", "discrete", "discrete_square"]


class DeformableAttention(nn.Module):
    """Each head of each query looks at a few points of every level, which it places around the query's anchor.

    num_levels: feature maps in the memory. num_points: points a head samples in each of them, or a list of how many in
        each (RT-DETRv2: Lv et al., 2024).
    sampling: `bilinear` between cells, or `discrete`: of the cell that a point rounds to, the last one where it lies
        beyond the map (RT-DETRv2, for devices that cannot interpolate). Then the offsets have no gradient and stay as
        they are. `discrete_square` takes the last row for the last column too, as published, which is wrong for maps
        that are not square.
    projections: of the tokens before and of the samples after; without them each head samples its share of the tokens'
        features (D-FINE: Peng et al., ICLR 2025).
    """

    def __init__(
        self,
        *,
        d_model: int,
        nhead: int,
        num_levels: int,
        num_points: int | Sequence[int],
        sampling: Sampling = "bilinear",
        projections: bool = True,
    ) -> None:
        super().__init__()
        check_heads(self, d_model, nhead)
        points = [num_points] * num_levels if isinstance(num_points, int) else [*num_points]
        if len(points) != num_levels or min(points) < 1:
            raise UserError(
                f"{type(self).__name__}: wanted num_points as a number of at least 1, or as one for each of "
                f"{num_levels} levels, got {num_points}."
            )
        self.nhead, self.num_levels, self.points, self.sampling = nhead, num_levels, points, sampling
        total = sum(points)
        self.sampling_offsets = nn.Linear(d_model, nhead * total * 2)
        self.attention_weights = nn.Linear(d_model, nhead * total)
        self.value_proj = nn.Linear(d_model, d_model) if projections else nn.Identity()
        self.output_proj = nn.Linear(d_model, d_model) if projections else nn.Identity()
        if sampling != "bilinear":
            self.sampling_offsets.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start every head looks in a direction of its own, its points 1, 2, ... cells away, all alike."""
        angle = torch.arange(self.nhead) * (2 * math.pi / self.nhead)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, count + 1) for count in self.points])
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def attend(
        self,
        query: Float[Tensor, "batch queries d_model"],
        anchors: Float[Tensor, "batch queries dims"],
        memory: Memory,
    ) -> Float[Tensor, "batch queries d_model"]:
        """anchors: points (x, y) or boxes (cxcywh) in [0, 1] of the image without its padding.

        Offsets are in cells of a map around a point, and in half sizes of the box, over its points, around a box.
        """
        value = self.value_proj(memory.tokens)
        if memory.mask is not None:
            value = value.masked_fill(memory.mask[..., None], 0.0)
        value = value.unflatten(-1, (self.nhead, -1))
        locations, weights = self._points(query, anchors, memory)
        if self.sampling == "bilinear":
            return self.output_proj(sample(value, memory.shapes, locations, weights))
        return self.output_proj(sample_cells(value, memory.shapes, locations, weights, self._last_cells(memory)))

    def token_weights(self, query: Tensor, anchors: Tensor, memory: Memory) -> Float[Tensor, "batch queries tokens"]:
        """What `attend` weighs the tokens' values with: mean over heads. In sum 1, less what lies outside of maps."""
        locations, weights = self._points(query, anchors, memory)
        if self.sampling != "bilinear":  # the centers of cells, between which there is nothing
            cells = cells_at(locations, memory.shapes, self._last_cells(memory))
            locations = [(cell + 0.5) / size for cell, size in zip(cells, memory.sizes, strict=True)]
        on_tokens = spread(memory.shapes, locations, weights) / self.nhead
        return on_tokens if memory.mask is None else on_tokens.masked_fill(memory.mask[:, None], 0.0)

    def _points(self, query: Tensor, anchors: Tensor, memory: Memory) -> tuple[list[Tensor], list[Tensor]]:
        """Locations and weights of each level, as `sample` takes them."""
        weights = self.attention_weights(query).unflatten(-1, (self.nhead, -1)).softmax(-1)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.nhead, -1, 2))
        locations = []
        levels = memory.on_levels(anchors)[:, :, None, None].unbind(4)
        for level, (around, offset) in enumerate(zip(levels, offsets.split(self.points, dim=3), strict=True)):
            if anchors.shape[-1] == 2:
                locations.append(around + offset / memory.sizes[level])
            else:
                locations.append(around[..., :2] + offset * around[..., 2:] * (0.5 / self.points[level]))
        return locations, [*weights.split(self.points, dim=3)]

    def _last_cells(self, memory: Memory) -> Int64[Tensor, "batch levels 2"]:
        """The column and row that no sample of a cell goes beyond."""
        if self.sampling == "discrete_square":
            return memory.sizes[:, 1:].expand(memory.tokens.shape[0], -1, 2) - 1
        return (memory.valid_ratios * memory.sizes).round().long() - 1


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
    locations: Sequence[Float[Tensor, "batch queries heads _ 2"]],
    weights: Sequence[Float[Tensor, "batch queries heads _"]],
) -> Float[Tensor, "batch queries heads*features"]:
    """Bilinear samples of every head's maps, summed with their weights; zero outside of a map.

    shapes: (height, width) of each level. locations: (x, y) in [0, 1] of each map, of the points in each level.
    """
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in shapes], dim=-1)
    # Level by level: what all levels sample is by far the largest tensor of a model, and need not be there twice.
    # Queries innermost: they are many, points are few, and work along few elements is slow.
    mixed = sum(
        (
            F.grid_sample(level.unflatten(-1, shape), _queries_last(2 * at - 1), align_corners=False)
            * _queries_last(weight)[:, None]
        ).sum(-2)
        for level, shape, at, weight in zip(maps, shapes, locations, weights, strict=True)
    )
    return cast(Tensor, mixed).unflatten(0, (value.shape[0], -1)).flatten(1, 2).transpose(1, 2)


def sample_cells(
    value: Float[Tensor, "batch tokens heads features"],
    shapes: Sequence[tuple[int, int]],
    locations: Sequence[Float[Tensor, "batch queries heads _ 2"]],
    weights: Sequence[Float[Tensor, "batch queries heads _"]],
    last: Int64[Tensor, "batch levels 2"],
) -> Float[Tensor, "batch queries heads*features"]:
    """As `sample`, of the cells that locations round to, the outermost ones where these are outside of a map."""
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in shapes], dim=-1)
    cells = cells_at(locations, shapes, last)
    mixed = []
    for level, (_, width), cell, weight in zip(maps, shapes, cells, weights, strict=True):
        x, y = _queries_last(cell).unbind(-1)
        token = (y * width + x).flatten(1)[:, None]
        found = level.take_along_dim(token, dim=2).unflatten(-1, x.shape[1:])
        mixed.append((found * _queries_last(weight)[:, None]).sum(-2))
    return torch.stack(mixed).sum(0).unflatten(0, (value.shape[0], -1)).flatten(1, 2).transpose(1, 2)


def cells_at(
    locations: Sequence[Float[Tensor, "batch queries heads _ 2"]],
    shapes: Sequence[tuple[int, int]],
    last: Int64[Tensor, "batch levels 2"],
) -> list[Int64[Tensor, "batch queries heads _ 2"]]:
    """Column and row of each location's cell, as published: half a cell further than the one that it lies in."""
    cells = []
    for level, ((height, width), at) in enumerate(zip(shapes, locations, strict=True)):
        cell = (at * torch.tensor([width, height], device=at.device) + 0.5).long()
        cells.append(torch.minimum(cell.clamp(min=0), last[:, level, None, None, None]))
    return cells


def _queries_last(x: Shaped[Tensor, "batch queries heads points ..."]) -> Shaped[Tensor, "maps points queries ..."]:
    return x.movedim(1, 3).flatten(0, 1)


def spread(
    shapes: Sequence[tuple[int, int]],
    locations: Sequence[Float[Tensor, "batch queries heads _ 2"]],
    weights: Sequence[Float[Tensor, "batch queries heads _"]],
) -> Float[Tensor, "batch queries tokens"]:
    """What `sample` with the same arguments multiplies each token's value with, summed over heads.

    A bilinear sample takes from each cell by a tent in x times one in y, 1 high at its center and 0 at the next one's.
    """

    def tents(at: Tensor, size: int) -> Float[Tensor, "batch queries points cells"]:
        centers = torch.arange(size, device=at.device) + 0.5
        return (1 - (at[..., None] * size - centers).abs()).clamp(min=0).flatten(2, 3)

    levels = []
    for (height, width), at, weight in zip(shapes, locations, weights, strict=True):
        x, y = at.unbind(-1)
        rows = tents(y, height) * weight.flatten(2)[..., None]
        levels.append((rows.transpose(2, 3) @ tents(x, width)).flatten(2))
    return torch.cat(levels, dim=-1)
