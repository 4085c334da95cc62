"""Layers of DETR's transformer (Vaswani et al., NeurIPS 2017; Carion et al., ECCV 2020), whose attention is passed in.

Sequences are (batch, tokens, d_model). Positions are added to queries and keys in every layer, never to values.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from detr.models.layers.deformable import DeformableAttention
from detr.models.layers.multihead import MultiHeadAttention
from detr.models.values import Memory, QueryPositions

Activation = Literal["relu", "gelu", "silu", "glu", "prelu"]


class FeedForward(nn.Module):
    """Two linear layers with an activation between; `glu` gates one half of the features with the other,
    `prelu` learns its slope."""

    def __init__(self, *, d_model: int, dim_feedforward: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        activations: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": F.relu,
            "gelu": F.gelu,
            "silu": F.silu,
            "glu": F.glu,
        }
        self.activation = nn.PReLU() if activation == "prelu" else activations[activation]
        self.linear1 = nn.Linear(d_model, dim_feedforward * (2 if activation == "glu" else 1))
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderSelfAttention(MultiHeadAttention):
    """Every token looks at all tokens."""

    def forward(self, memory: Memory) -> Float[Tensor, "batch tokens d_model"]:
        key = memory.key
        return self.attend(key, key, memory.tokens, memory.keep)

    def weights(self, memory: Memory, token: Int64[Tensor, " batch"]) -> Float[Tensor, "batch tokens"]:
        """How much one token of each image takes from each: mean over heads, 1 in sum."""
        query = memory.key.take_along_dim(token[:, None, None], dim=1)
        return self.token_weights(query, memory.key, memory.keep)[:, 0]


class DecoderSelfAttention(MultiHeadAttention):
    """Every query looks at all queries that it may attend to."""

    def forward(
        self, x: Tensor, positions: QueryPositions, keep: Tensor | None
    ) -> Float[Tensor, "batch queries d_model"]:
        query = x + positions.position
        return self.attend(query, query, x, keep)


class DecoderCrossAttention(MultiHeadAttention):
    """Every query looks at all tokens of the memory."""

    def forward(self, x: Tensor, positions: QueryPositions, memory: Memory) -> Float[Tensor, "batch queries d_model"]:
        return self.attend(x + positions.position, memory.key, memory.tokens, memory.keep)

    def weights(self, x: Tensor, positions: QueryPositions, memory: Memory) -> Float[Tensor, "batch queries tokens"]:
        """How much each query takes from each token: mean over heads, 1 in sum."""
        return self.token_weights(x + positions.position, memory.key, memory.keep)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and a layer norm.

    self_attn: from a Memory to its new tokens, before the residual connection.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        d_model: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.norm_first, self.self_attn = norm_first, self_attn
        self.ffn = FeedForward(d_model=d_model, dim_feedforward=dim_feedforward, dropout=dropout, activation=activation)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory: Memory) -> Float[Tensor, "batch tokens d_model"]:
        def attend(x: Tensor) -> Tensor:
            return self.dropout(self.self_attn(replace(memory, tokens=x)))

        def feed(x: Tensor) -> Tensor:
            return self.dropout(self.ffn(x))

        x = memory.tokens
        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + feed(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + feed(x))


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention from queries to the encoder's memory, feed-forward network.

    self_attn: called with the queries, their positions and the mask of who sees whom. cross_attn: called with the
    queries, their positions and the memory.
    gate: called with the queries and what cross-attention found; replaces their sum and its norm (D-FINE). Without
        norm_first only.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        cross_attn: nn.Module,
        d_model: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        norm_first: bool,
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm_first, self.self_attn, self.cross_attn = norm_first, self_attn, cross_attn
        self.ffn = FeedForward(d_model=d_model, dim_feedforward=dim_feedforward, dropout=dropout, activation=activation)
        self.norm1 = nn.LayerNorm(d_model)
        if gate is None:
            self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.gate = gate
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, positions: QueryPositions, memory: Memory, keep: Tensor | None
    ) -> Float[Tensor, "batch queries d_model"]:
        """keep: as in Queries."""

        def attend(x: Tensor) -> Tensor:
            return self.dropout(self.self_attn(x, positions, keep))

        def look(x: Tensor) -> Tensor:
            return self.dropout(self.cross_attn(x, positions, memory))

        def feed(x: Tensor) -> Tensor:
            return self.dropout(self.ffn(x))

        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + look(self.norm2(x))
            return x + feed(self.norm3(x))
        x = self.norm1(x + attend(x))
        x = self.norm2(x + look(x)) if self.gate is None else self.gate(x, look(x))
        return self.norm3(x + feed(x))


class Gate(nn.Module):
    """Weighs what there was and what is new against each other, feature by feature, and normalizes their sum.

    The target gating layer of D-FINE (Peng et al., ICLR 2025).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(2 * d_model, 2 * d_model)
        self.norm = nn.LayerNorm(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start both weigh one half."""
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)

    def forward(
        self, x: Float[Tensor, "batch queries d_model"], found: Float[Tensor, "batch queries d_model"]
    ) -> Float[Tensor, "batch queries d_model"]:
        old, new = self.weigh(torch.cat((x, found), dim=-1)).sigmoid().chunk(2, dim=-1)
        return self.norm(old * x + new * found)


def initialize(part: nn.Module) -> None:
    """Xavier for every matrix of a stack of layers, as published; deformable attention and gates have their own."""
    for parameter in part.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in part.modules():
        if isinstance(module, DeformableAttention | Gate):
            module.reset_parameters()
