"""Residual attention (Wang et al., CVPR 2017)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.masked import precise
from detr.models.attention.views import SoftMask
from detr.models.values import extents

Activation = Literal["mixed", "channel", "spatial"]


class ResidualAttention(nn.Module):
    """A trunk times 1 + a soft mask, which comes from a branch that goes down in scale and up again.

    One unit before, two in the trunk, one for each step of the mask branch and two at its bottom, one after: p = 1,
    t = 2 and r = 1 of the paper. Units are pre-activation bottlenecks (He et al., ECCV 2016); in training the
    statistics of their batch norms count padding as zeros.

    depth: how often the mask branch halves the map: 3, 2 and 1 in the paper's three stages.
    activation: of the mask: `mixed` sigmoid; `channel` each position's features divided by their norm; `spatial` each
        channel standardized over positions, then sigmoid.
    variant: `authors`, their published graph, or `port`, which adds the map of each size again after interpolation.
    identity_start: the result is added to the map, times a factor that starts at 0; without it, it replaces the map.
    """

    def __init__(
        self,
        channels: int,
        *,
        depth: int = 2,
        activation: Activation = "mixed",
        variant: Literal["authors", "port"] = "authors",
        identity_start: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise UserError(f"ResidualAttention: wanted depth of at least 1, got {depth}.")
        self.activation, self.adds_again = activation, variant == "port"

        def units(number: int) -> nn.ModuleList:
            return nn.ModuleList(Unit(channels) for _ in range(number))

        self.first, self.trunk, self.last = units(1), units(2), units(1)
        self.down = nn.ModuleList(units(1 if level + 1 < depth else 2) for level in range(depth))
        self.skip = nn.ModuleList(units(1) for _ in range(depth - 1))
        self.up = nn.ModuleList(units(1) for _ in range(depth - 1))
        self.mask = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
        )
        self.gamma = nn.Parameter(torch.zeros(1)) if identity_start else None

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        trunk, soft = self._branches(x, mask)
        out = _through(self.last, (1 + soft) * trunk, mask)
        return out if self.gamma is None else x + self.gamma.to(x.dtype) * out

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> SoftMask:
        """The soft mask, mean over channels."""
        _, soft = self._branches(x, mask)
        return SoftMask(soft.mean(1).masked_fill(mask, 0.0))

    def _branches(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Trunk and soft mask."""
        start = x.masked_fill(mask[:, None], 0.0)
        start = _through(self.first, start, mask)
        trunk = _through(self.trunk, start, mask)
        soft = self._soft(start, mask, 0)
        soft = self.mask(soft + trunk if self.adds_again else soft)
        return trunk, activate(soft, mask, self.activation)

    def _soft(self, x: Tensor, mask: Tensor, level: int) -> Tensor:
        """The mask branch from one scale down and back up to it."""
        small = F.max_pool2d(x.masked_fill(mask[:, None], torch.finfo(x.dtype).min), 3, stride=2, padding=1)
        small_mask = mask[:, ::2, ::2]
        small = _through(self.down[level], small.masked_fill(small_mask[:, None], 0.0), small_mask)
        if level < len(self.up):
            soft = self._soft(small, small_mask, level + 1) + _through(self.skip[level], small, small_mask)
            small = _through(self.up[level], soft + small if self.adds_again else soft, small_mask)
        return _enlarge(small, small_mask, mask)


class Unit(nn.Module):
    """x + three convolutions, 1x1, 3x3 and 1x1, each after batch norm and ReLU, a quarter of the channels between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 4, 1)
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, inner, kernel_size=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, inner, kernel_size=3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(inner), nn.Conv2d(inner, channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Float[Tensor, "batch channels height width"]:
        inner = self.bn2(self.conv1(self.bn1(x).relu())).relu()
        inner = self.conv2(inner.masked_fill(mask[:, None], 0.0))  # as beyond the edge of the map
        return x + self.conv3(self.bn3(inner).relu())


def _through(units: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    for unit in units.children():
        x = unit(x, mask)
    return x


def _enlarge(x: Tensor, mask: Tensor, target_mask: Tensor) -> Float[Tensor, "batch channels height width"]:
    """Bilinear, corner to corner of what is not padding in each image."""
    source, shape = precise(x), target_mask.shape

    def places(axis: int) -> Tensor:
        """Of the target's cells on x or y, in [-1, 1] of the map."""
        ends, target_ends = (extents(m)[:, axis, None].to(source.dtype) - 1 for m in (mask, target_mask))
        at = torch.arange(shape[2 - axis], device=x.device) * ends / target_ends.clamp(min=1)
        return (2 * at + 1) / x.shape[3 - axis] - 1

    points = torch.stack((places(0)[:, None].expand(shape), places(1)[:, :, None].expand(shape)), dim=-1)
    return F.grid_sample(source, points, padding_mode="border", align_corners=False).to(x.dtype)


def activate(x: Tensor, mask: Tensor, activation: Activation) -> Tensor:
    if activation == "mixed":
        return x.sigmoid()
    if activation == "channel":
        return F.normalize(x, dim=1)
    values, valid = precise(x), (~mask)[:, None]
    count = valid.sum((2, 3), keepdim=True).clamp(min=1)
    centered = values - (values * valid).sum((2, 3), keepdim=True) / count
    variance = (centered * valid).square().sum((2, 3), keepdim=True) / count
    # Limited before the root, whose slope is infinite at 0, where only one position is valid.
    return (centered / variance.clamp(min=1e-24).sqrt()).sigmoid().to(x.dtype)
