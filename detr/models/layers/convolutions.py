"""Convolutional blocks of encoders, and their plain form for inference."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNorm(nn.Module):
    """A convolution that keeps the size of the map, or divides it by its stride, batch norm, and SiLU.

    groups: of channels that do not mix. activation: false leaves SiLU out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)
        self.activation = nn.SiLU() if activation else nn.Identity()

    def forward(self, x: Float[Tensor, "batch _ _ _"]) -> Float[Tensor, "batch _ _ _"]:
        return self.activation(self.norm(self.conv(x)))

    def fold(self) -> None:
        """Make one convolution of convolution and norm, which they are in evaluation, in place."""
        self.conv, self.norm = self.folded(), nn.Identity()

    def folded(self) -> nn.Conv2d:
        """The one convolution that convolution and norm are in evaluation."""
        return fuse_conv_bn_eval(self.conv, cast(nn.BatchNorm2d, self.norm))


class RepVGGBlock(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, added up (RepVGG: Ding et al., CVPR 2021), and SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = ConvNorm(channels, channels, kernel_size=3, activation=False)
        self.point = ConvNorm(channels, channels, activation=False)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return F.silu(self.square(x) + self.point(x))

    def deployed(self) -> nn.Module:
        """The one convolution that the two are in evaluation, and SiLU."""
        square, point = self.square.folded(), self.point.folded()
        assert square.bias is not None and point.bias is not None
        with torch.no_grad():
            square.weight += F.pad(point.weight, (1, 1, 1, 1))
            square.bias += point.bias
        return nn.Sequential(square, nn.SiLU())


class CSPRepLayer(nn.Module):
    """RepVGG blocks on one projection of a map, added to another one (CSPNet: Wang et al., 2020; as in RT-DETR).

    hidden: channels between the projections. depth: number of blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, *, hidden: int, depth: int) -> None:
        super().__init__()
        self.main = ConvNorm(in_channels, hidden)
        self.skip = ConvNorm(in_channels, hidden)
        self.blocks = nn.ModuleList(RepVGGBlock(hidden) for _ in range(depth))
        self.out = ConvNorm(hidden, out_channels) if hidden != out_channels else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch _ height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch _ height width"]:
        """mask: True = padding, which is kept at zero as beyond the edge of a map; None where there is none."""
        main = self.main(x)
        for block in self.blocks:
            main = block(without_padding(main, mask))
        return self.out(main + self.skip(x))


class ELANLayer(nn.Module):
    """A projection of a map, and what two CSP layers in a row make of one half of it, side by side (D-FINE's neck).

    It is GELAN's block (YOLOv9: Wang et al., ECCV 2024) with RepVGG blocks inside.

    hidden: channels of the CSP layers. depth: RepVGG blocks in each.
    """

    def __init__(self, in_channels: int, out_channels: int, *, hidden: int, depth: int) -> None:
        super().__init__()
        self.expand = ConvNorm(in_channels, 2 * out_channels)
        self.csp = nn.ModuleList(
            CSPRepLayer(channels, hidden, hidden=hidden, depth=depth) for channels in (out_channels, hidden)
        )
        self.convs = nn.ModuleList(ConvNorm(hidden, hidden, kernel_size=3) for _ in range(2))
        self.out = ConvNorm(2 * out_channels + 2 * hidden, out_channels)

    def forward(
        self, x: Float[Tensor, "batch _ height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch _ height width"]:
        """mask: as in CSPRepLayer."""
        parts = [*self.expand(x).chunk(2, dim=1)]
        for csp, conv in zip(self.csp, self.convs, strict=True):
            parts.append(conv(without_padding(csp(parts[-1], mask), mask)))
        return self.out(torch.cat(parts, dim=1))


class Down(ConvNorm):
    """Halves a map, rounding up, by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)

    def forward(
        self, x: Float[Tensor, "batch channels _ _"], mask: Bool[Tensor, "batch _ _"] | None = None
    ) -> Float[Tensor, "batch channels _ _"]:
        """mask: as in CSPRepLayer."""
        return super().forward(without_padding(x, mask))


class SeparableDown(nn.Module):
    """Halves a map, rounding up: channels are mixed, then each is halved by itself (YOLOv10: Wang et al., 2024)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = ConvNorm(channels, channels, activation=False)
        self.halve = ConvNorm(channels, channels, kernel_size=3, stride=2, groups=channels, activation=False)

    def forward(
        self, x: Float[Tensor, "batch channels _ _"], mask: Bool[Tensor, "batch _ _"] | None = None
    ) -> Float[Tensor, "batch channels _ _"]:
        """mask: as in CSPRepLayer."""
        return self.halve(without_padding(self.mix(x), mask))


def without_padding(x: Tensor, mask: Tensor | None) -> Float[Tensor, "batch channels height width"]:
    """A map with zeros where there is padding."""
    return x if mask is None else x.masked_fill(mask[:, None], 0.0)
