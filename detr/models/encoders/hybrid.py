"""RT-DETR's encoder: attention inside the coarsest map, and convolutions across maps (Zhao et al., CVPR 2024)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.encoders.base import Encoder
from detr.models.layers.convolutions import ConvNorm, CSPRepLayer, Down, ELANLayer, SeparableDown
from detr.models.layers.transformer import Activation, EncoderLayer, EncoderSelfAttention, initialize
from detr.models.values import Memory

_BLOCKS = 3  # of a fusion at depth 1


class HybridEncoder(Encoder):
    """Self-attention among the tokens of the last map (AIFI), then fusion from coarse to fine and back (CCFF).

    The memory has no positions: its tokens know theirs, and deformable cross-attention needs none. Padding is zero for
    every convolution that looks beyond a cell, as if the map ended there, and attention leaves it out.

    An encoder with other convolutions overrides `lateral`, `fusion`, `down` and `projection`.

    position: padding mask (B, h, w), True = padding, to positional encodings (B, channels, h, w).
    d_model: features of the memory's tokens.
    channels: of the maps that come in and are fused; d_model unless given.
    nhead, num_layers, dim_feedforward, dropout, activation, norm_first: of the attention, as in TransformerEncoder.
    num_levels: maps that come in, each of half the size of the one before.
    expansion: hidden channels of a fusion, as a multiple of `channels`. depth: of a fusion, as a multiple of 3 blocks.
    """

    def __init__(
        self,
        *,
        position: nn.Module,
        d_model: int = 256,
        channels: int | None = None,
        nhead: int = 8,
        num_layers: int = 1,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        activation: Activation = "gelu",
        norm_first: bool = False,
        num_levels: int = 3,
        expansion: float = 1.0,
        depth: float = 1.0,
    ) -> None:
        super().__init__()
        self.d_model, self.num_levels = d_model, num_levels
        self.channels = channels = channels or d_model
        if (features := getattr(position, "d_model", channels)) != channels:
            raise UserError(f"position.d_model: wanted {channels}, as the encoder's maps have, got {features}.")
        self.position = position
        self.layers = nn.ModuleList(
            EncoderLayer(
                self_attn=EncoderSelfAttention(d_model=channels, nhead=nhead, dropout=dropout),
                d_model=channels,
                dim_feedforward=dim_feedforward,
                dropout=dropout,
                activation=activation,
                norm_first=norm_first,
            )
            for _ in range(num_layers)
        )
        initialize(self.layers)
        self.expansion, self.depth = expansion, depth
        # From the coarsest map to the finest, and back.
        self.laterals = nn.ModuleList(self.lateral(channels) for _ in range(num_levels - 1))
        self.top_down = nn.ModuleList(self.fusion(channels) for _ in range(num_levels - 1))
        self.downs = nn.ModuleList(self.down(channels) for _ in range(num_levels - 1))
        self.bottom_up = nn.ModuleList(self.fusion(channels) for _ in range(num_levels - 1))
        self.proj = nn.ModuleList(self.projection(channels, d_model) for _ in range(num_levels))

    @property
    def in_channels(self) -> int:
        return self.channels

    def lateral(self, channels: int) -> nn.Module:
        """What a map passes before it is enlarged."""
        return ConvNorm(channels, channels)

    def fusion(self, channels: int) -> nn.Module:
        """From two maps in a row of channels, (B, 2 * channels, h, w), and their padding mask, to one."""
        hidden = int(channels * self.expansion)
        return CSPRepLayer(2 * channels, channels, hidden=hidden, depth=round(_BLOCKS * self.depth))

    def down(self, channels: int) -> nn.Module:
        """Halves a map, rounding up; called with its padding mask too."""
        return Down(channels)

    def projection(self, channels: int, d_model: int) -> nn.Module:
        """From a fused map to the memory."""
        return ConvNorm(channels, d_model, activation=False)

    def forward(
        self,
        maps: Sequence[Float[Tensor, "batch channels _ _"]],
        masks: Sequence[Bool[Tensor, "batch _ _"]],
        *,
        padded: bool = True,
    ) -> Memory:
        *finer, coarsest = maps
        fused = self.fuse([*finer, self.attend(coarsest, masks[-1], padded=padded)], masks if padded else None)
        projected = [proj(x) for proj, x in zip(self.proj, fused, strict=True)]
        return Memory.from_maps(projected, None, masks, padded=padded)

    def attend(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"], *, padded: bool
    ) -> Float[Tensor, "batch channels height width"]:
        """A map after attention among its cells."""
        memory = Memory.from_maps([x], [self.position(mask)], [mask], padded=padded)
        for layer in self.layers:
            memory = replace(memory, tokens=layer(memory))
        return memory.tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    def fuse(
        self,
        maps: Sequence[Float[Tensor, "batch channels _ _"]],
        masks: Sequence[Bool[Tensor, "batch _ _"]] | None,
    ) -> list[Float[Tensor, "batch channels _ _"]]:
        """Maps that know of one another, largest first. masks: None where there is no padding."""
        padding = cast(Sequence[Tensor | None], [None] * len(maps) if masks is None else masks)
        levels = range(len(maps))
        fused = [*maps]
        for step, level in enumerate(reversed(levels[:-1])):
            coarse = fused[level + 1] = self.laterals[step](fused[level + 1])
            fine = fused[level]
            enlarged = F.interpolate(coarse, scale_factor=2)[..., : fine.shape[2], : fine.shape[3]]
            fused[level] = self.top_down[step](_side_by_side(enlarged, fine), padding[level])
        for level in levels[1:]:
            halved = self.downs[level - 1](fused[level - 1], padding[level - 1])
            fused[level] = self.bottom_up[level - 1](_side_by_side(halved, fused[level]), padding[level])
        return fused


class FineHybridEncoder(HybridEncoder):
    """D-FINE's encoder (Peng et al., ICLR 2025): fusions of two halves, separable down-sampling, laterals without SiLU.

    Options are those of HybridEncoder; `expansion` is of half the channels.
    """

    def lateral(self, channels: int) -> nn.Module:
        return ConvNorm(channels, channels, activation=False)

    def fusion(self, channels: int) -> nn.Module:
        hidden = round(channels * self.expansion // 2)
        return ELANLayer(2 * channels, channels, hidden=hidden, depth=round(_BLOCKS * self.depth))

    def down(self, channels: int) -> nn.Module:
        return SeparableDown(channels)

    def projection(self, channels: int, d_model: int) -> nn.Module:
        return nn.Identity() if channels == d_model else super().projection(channels, d_model)


def _side_by_side(x: Tensor, other: Tensor) -> Float[Tensor, "batch channels height width"]:
    """Raises UserError where one is not twice the size of the other, or that less a cell."""
    if x.shape != other.shape:
        raise UserError(
            f"HybridEncoder: wanted maps of which each has half the size of the one before, rounded up; a map of "
            f"{other.shape[2]} x {other.shape[3]} cells does not fit. Set model.backbone.features to strides that "
            "double, such as [8, 16, 32]."
        )
    return torch.cat((x, other), dim=1)
