"""Attention with content and position apart (Conditional DETR: Meng et al., ICCV 2021)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.models.layers.mlp import MLP
from detr.models.layers.multihead import MultiHead
from detr.models.layers.positions import anchor_embedding
from detr.models.values import Memory, QueryPositions


class _Attention(MultiHead):
    def __init__(self, *, d_model: int, nhead: int, dropout: float) -> None:
        super().__init__(d_model=d_model, nhead=nhead, dropout=dropout)
        self.query_content, self.query_position = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.key_content, self.key_position = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.value, self.out_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        nn.init.zeros_(self.out_proj.bias)


class ConditionalSelfAttention(_Attention):
    """Self-attention among queries whose content and position have projections of their own."""

    def forward(
        self,
        x: Float[Tensor, "batch queries d_model"],
        positions: QueryPositions,
        keep: Bool[Tensor, "#batch 1 queries queries"] | None,
    ) -> Float[Tensor, "batch queries d_model"]:
        query = self.query_content(x) + self.query_position(positions.position)
        key = self.key_content(x) + self.key_position(positions.position)
        return self.mix(self.heads(query), self.heads(key), self.heads(self.value(x)), keep)


class ConditionalCrossAttention(_Attention):
    """Queries look at the memory by content and, beside it in each head, by where they expect their object's parts.

    first: of the decoder's layers. It alone adds the queries' positions to their content, which is empty there.
    """

    def __init__(self, *, d_model: int, nhead: int, dropout: float, first: bool) -> None:
        super().__init__(d_model=d_model, nhead=nhead, dropout=dropout)
        self.query_spatial = nn.Linear(d_model, d_model)
        self.first = first
        if not first:
            del self.query_position

    def forward(
        self, x: Float[Tensor, "batch queries d_model"], positions: QueryPositions, memory: Memory
    ) -> Float[Tensor, "batch queries d_model"]:
        return self.mix(*self._query_and_key(x, positions, memory), self.heads(self.value(memory.tokens)), memory.keep)

    def weights(self, x: Tensor, positions: QueryPositions, memory: Memory) -> Float[Tensor, "batch queries tokens"]:
        """How much each query takes from each token: mean over heads, 1 in sum."""
        return self.weigh(*self._query_and_key(x, positions, memory), memory.keep)

    def _query_and_key(self, x: Tensor, positions: QueryPositions, memory: Memory) -> tuple[Tensor, Tensor]:
        query, key = self.query_content(x), self.key_content(memory.tokens)
        key_position = self.key_position(memory.position)
        if self.first:
            query, key = query + self.query_position(positions.position), key + key_position
        query = torch.cat((self.heads(query), self.heads(self.query_spatial(positions.spatial))), dim=-1)
        return query, torch.cat((self.heads(key), self.heads(key_position)), dim=-1)


class SpatialQuery(nn.Module):
    """Where a query looks: its anchor's sine embedding, scaled feature by feature as the query's content says.

    modulate_sizes: the query also foresees its object's width and height, and looks the wider the larger its anchor is
        in comparison (DAB-DETR: Liu et al., ICLR 2022); needs anchors with a size.
    """

    def __init__(self, *, d_model: int, modulate_sizes: bool) -> None:
        super().__init__()
        self.scale = MLP(d_model, d_model, d_model, layers=2)
        self.size = MLP(d_model, d_model, 2, layers=2) if modulate_sizes else None

    def forward(
        self, x: Float[Tensor, "batch queries d_model"], anchors: Float[Tensor, "batch queries dims"], *, first: bool
    ) -> Float[Tensor, "batch queries d_model"]:
        """first: before the first layer, where the content says nothing yet."""
        embedding = anchor_embedding(anchors[..., :2], x.shape[-1] // 2)
        if not first:
            embedding = embedding * self.scale(x)
        if self.size is None:
            return embedding
        # The embedding is that of y, then x.
        ratio = (self.size(x).sigmoid() / anchors[..., 2:].clamp(min=1e-6)).flip(-1)
        return (embedding.unflatten(-1, (2, -1)) * ratio[..., None]).flatten(-2)
