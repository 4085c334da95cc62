"""What every encoder is."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.values import Memory


class Encoder(nn.Module):
    """From the neck's feature maps to the memory.

    d_model: features of the memory's tokens.
    in_channels: of the maps that come in; as many as d_model unless an encoder says otherwise.
    num_levels: how many maps come in.
    layers: the modules that make up nearly all activations, which activation checkpointing computes twice. Where they
        have one, `self_attn.weights(memory, token)` of the last shows where a token looks.
    """

    d_model: int
    num_levels: int
    layers: nn.ModuleList

    @property
    def in_channels(self) -> int:
        return self.d_model

    def forward(
        self,
        maps: Sequence[Float[Tensor, "batch channels _ _"]],
        masks: Sequence[Bool[Tensor, "batch _ _"]],
        *,
        padded: bool = True,
    ) -> Memory:
        """The memory of these maps, largest first. masks: True = padding; padded: whether they hold any True."""
        raise NotImplementedError


class StackedEncoder(Encoder):
    """Layers of self-attention over the tokens of all maps, one after the other.

    position: padding mask (B, h, w) to encodings (B, d_model, h, w).
    layers: each takes a Memory and gives its new tokens.
    norm: of the last layer's tokens.
    level_embedding: learn an embedding of each map, which is added to its positions.
    position_scale: scales each token's position as its content says, before each layer; None leaves it as it is.
    """

    def __init__(
        self,
        *,
        position: nn.Module,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        d_model: int,
        num_levels: int,
        level_embedding: bool,
        position_scale: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (features := getattr(position, "d_model", d_model)) != d_model:
            raise UserError(f"position.d_model: wanted {d_model}, as the encoder has, got {features}.")
        self.d_model, self.num_levels = d_model, num_levels
        self.position = position
        self.layers = nn.ModuleList(layers)
        self.norm, self.position_scale = norm, position_scale
        self.level_embed = nn.Parameter(torch.randn(num_levels, d_model)) if level_embedding else None

    def forward(
        self,
        maps: Sequence[Float[Tensor, "batch d_model _ _"]],
        masks: Sequence[Bool[Tensor, "batch _ _"]],
        *,
        padded: bool = True,
    ) -> Memory:
        positions = [self.position(mask) for mask in masks]
        if self.level_embed is not None:
            levels = self.level_embed[:, :, None, None]
            positions = [position + level for position, level in zip(positions, levels, strict=True)]
        return self.encode(Memory.from_maps(maps, positions, masks, padded=padded))

    def encode(self, memory: Memory) -> Memory:
        """What the layers make of the maps' tokens."""
        for layer in self.layers:
            seen = memory
            if self.position_scale is not None:
                seen = replace(memory, position=memory.position * self.position_scale(memory.tokens))
            memory = replace(memory, tokens=layer(seen))
        return replace(memory, tokens=self.norm(memory.tokens))
