"""DETR's transformer (Vaswani et al., NeurIPS 2017; Carion et al., ECCV 2020), with exchangeable attention.

Sequences are (batch, tokens, d_model). Positions are added to queries and keys in every layer, never to values.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.conditional import ConditionalCrossAttention, ConditionalSelfAttention, SpatialQuery
from detr.models.deformable import DeformableAttention, DeformableCrossAttention, DeformableEncoderAttention
from detr.models.memory import Memory
from detr.models.mlp import MLP
from detr.models.multihead import MultiHead
from detr.models.queries import Place, Queries

Activation = Literal["relu", "gelu", "glu", "prelu"]
Attention = Literal["standard", "conditional", "deformable"]


class MultiHeadAttention(MultiHead):
    """Attention whose three input projections share one matrix, `in_proj`, rows in the order q, k, v."""

    def __init__(self, *, d_model: int, nhead: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, nhead=nhead, dropout=dropout)
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def attend(
        self,
        query: Float[Tensor, "batch targets d_model"],
        key: Float[Tensor, "batch sources d_model"],
        value: Float[Tensor, "batch sources d_model"],
        keep: Bool[Tensor, "#batch 1 _ sources"] | None = None,
    ) -> Float[Tensor, "batch targets d_model"]:
        """keep: True where a key may be attended to; None where all may."""
        d_model = query.shape[-1]
        q, k = self._project(query, key)
        v = F.linear(value, self.in_proj.weight[2 * d_model :], self.in_proj.bias[2 * d_model :])
        return self.mix(q, k, self.heads(v), keep)

    def token_weights(
        self,
        query: Float[Tensor, "batch targets d_model"],
        key: Float[Tensor, "batch sources d_model"],
        keep: Bool[Tensor, "#batch 1 _ sources"] | None = None,
    ) -> Float[Tensor, "batch targets sources"]:
        """What `attend` weighs the values with: mean over heads, 1 in sum."""
        return self.weigh(*self._project(query, key), keep)

    def _project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        d_model = query.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        if query is key:
            q, k = F.linear(query, weight[: 2 * d_model], bias[: 2 * d_model]).chunk(2, dim=-1)
        else:
            q = F.linear(query, weight[:d_model], bias[:d_model])
            k = F.linear(key, weight[d_model : 2 * d_model], bias[d_model : 2 * d_model])
        return self.heads(q), self.heads(k)


class FeedForward(nn.Module):
    """Two linear layers with an activation between; `glu` gates one half of the features with the other,
    `prelu` learns its slope."""

    def __init__(self, *, d_model: int, dim_feedforward: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        activations: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}
        self.activation = nn.PReLU() if activation == "prelu" else activations[activation]
        self.linear1 = nn.Linear(d_model, dim_feedforward * (2 if activation == "glu" else 1))
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderAttention(MultiHeadAttention):
    """Every token looks at all tokens."""

    def forward(self, memory: Memory) -> Float[Tensor, "batch tokens d_model"]:
        key = memory.key
        return self.attend(key, key, memory.tokens, memory.keep)

    def weights(self, memory: Memory, token: Int64[Tensor, " batch"]) -> Float[Tensor, "batch tokens"]:
        """How much one token of each image takes from each: mean over heads, 1 in sum."""
        query = memory.key.take_along_dim(token[:, None, None], dim=1)
        return self.token_weights(query, memory.key, memory.keep)[:, 0]


class SelfAttention(MultiHeadAttention):
    """Every query looks at all queries that it may attend to."""

    def forward(self, x: Tensor, place: Place, keep: Tensor | None) -> Float[Tensor, "batch queries d_model"]:
        query = x + place.position
        return self.attend(query, query, x, keep)


class CrossAttention(MultiHeadAttention):
    """Every query looks at all tokens of the memory."""

    def forward(self, x: Tensor, place: Place, memory: Memory) -> Float[Tensor, "batch queries d_model"]:
        return self.attend(x + place.position, memory.key, memory.tokens, memory.keep)

    def weights(self, x: Tensor, place: Place, memory: Memory) -> Float[Tensor, "batch queries tokens"]:
        """How much each query takes from each token: mean over heads, 1 in sum."""
        return self.token_weights(x + place.position, memory.key, memory.keep)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and a layer norm."""

    def __init__(self, *, self_attn: nn.Module, ffn: FeedForward, d_model: int, dropout: float, norm_first: bool):
        super().__init__()
        self.norm_first = norm_first
        self.self_attn, self.ffn = self_attn, ffn
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
    """Self-attention among queries, cross-attention from queries to the encoder's memory, feed-forward network."""

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        cross_attn: nn.Module,
        ffn: FeedForward,
        d_model: int,
        dropout: float,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn, self.cross_attn, self.ffn = self_attn, cross_attn, ffn
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, place: Place, memory: Memory, keep: Tensor | None
    ) -> Float[Tensor, "batch queries d_model"]:
        """keep: as in Queries."""

        def attend(x: Tensor) -> Tensor:
            return self.dropout(self.self_attn(x, place, keep))

        def look(x: Tensor) -> Tensor:
            return self.dropout(self.cross_attn(x, place, memory))

        def feed(x: Tensor) -> Tensor:
            return self.dropout(self.ffn(x))

        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + look(self.norm2(x))
            return x + feed(self.norm3(x))
        x = self.norm1(x + attend(x))
        x = self.norm2(x + look(x))
        return self.norm3(x + feed(x))


class Encoder(nn.Module):
    """A stack of encoder layers, with a final norm where the layers normalise first.

    position_scale: scales each token's position as its content says, before each layer (DAB-DETR).
    """

    def __init__(self, *, layers: Sequence[EncoderLayer], norm: nn.Module, position_scale: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm, self.position_scale = norm, position_scale

    def forward(self, memory: Memory) -> Memory:
        for layer in self.layers:
            seen = memory
            if self.position_scale is not None:
                seen = replace(memory, position=memory.position * self.position_scale(memory.tokens))
            memory = replace(memory, tokens=layer(seen))
        return replace(memory, tokens=self.norm(memory.tokens))


class Decoder(nn.Module):
    """A stack of decoder layers. One final norm serves the outputs of all of them.

    spatial: makes the spatial queries of conditional attention.
    """

    def __init__(self, *, layers: Sequence[DecoderLayer], norm: nn.Module, spatial: SpatialQuery | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm, self.spatial = norm, spatial
        self.modulates = spatial is not None and spatial.size is not None

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        refine: Callable[[int, Tensor, Tensor | None], Tensor] | None = None,
        *,
        look_forward_twice: bool = False,
    ) -> tuple[Float[Tensor, "layers batch queries d_model"], list[Tensor | None]]:
        """The layers' outputs, and for each layer the anchors (B, Q, 2 or 4) that its boxes are offsets from.

        refine: from a layer's index, output and anchors to the next layer's anchors; None leaves them as they are.
        look_forward_twice: a layer's boxes also train the offsets of the layer before (Zhang et al., ICLR 2023).
        """
        x, anchors = queries.content, queries.anchors
        reference = anchors
        outputs: list[Tensor] = []
        references: list[Tensor | None] = []
        for index, layer in enumerate(self.layers):
            spatial = None if self.spatial is None else self.spatial(x, anchors, first=index == 0)
            place = Place(position=queries.position(anchors), anchors=anchors, spatial=spatial)
            x = layer(x, place, memory, queries.keep)
            outputs.append(self.norm(x))
            references.append(reference)
            if refine is not None and index + 1 < len(self.layers):
                # As published, from what the layer put out; before normalising first, that is not normalised at all.
                with torch.set_grad_enabled(look_forward_twice and torch.is_grad_enabled()):
                    reference = refine(index, outputs[-1] if layer.norm_first else x, anchors)
                anchors = reference.detach()
        return torch.stack(outputs), references


class Transformer(nn.Module):
    """Encoder over the feature maps' cells, decoder from object queries to boxes-to-be.

    Options have the names of torch.nn.Transformer, where that has them.

    d_model: features of every token.
    nhead: attention heads, a divisor of d_model.
    num_encoder_layers, num_decoder_layers: depth of the two stacks; 0 encoder layers hand the features on.
    dim_feedforward: hidden features of the feed-forward networks.
    dropout: on attention weights, hidden features and residual branches, in training.
    activation: relu, gelu, glu or prelu.
    norm_first: normalise before each sub-layer instead of after it.
    encoder_attention: standard, or deformable (Zhu et al., ICLR 2021), whose cost grows with the number of tokens
        instead of its square.
    cross_attention: of the decoder, standard, conditional (Meng et al., ICCV 2021) or deformable.
    num_levels: feature maps that come in. num_points: points that deformable attention samples in each of them.
    modulate: conditional attention as in DAB-DETR (Liu et al., ICLR 2022), by the anchors' sizes, and encoder
        positions scaled by content.
    decoder_norm: the final norm of the decoder.
    """

    def __init__(
        self,
        *,
        d_model: int = 256,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        norm_first: bool = False,
        encoder_attention: Literal["standard", "deformable"] = "standard",
        cross_attention: Attention = "standard",
        num_levels: int = 1,
        num_points: int = 4,
        modulate: bool = False,
        decoder_norm: bool = True,
    ) -> None:
        super().__init__()
        if num_decoder_layers < 1:
            raise UserError(f"Transformer: wanted num_decoder_layers of at least 1, got {num_decoder_layers}.")
        if modulate and cross_attention != "conditional":
            raise UserError(
                f"Transformer: modulate needs conditional cross-attention, got {cross_attention}. Set "
                "model.transformer.modulate=false or model.transformer.cross_attention=conditional."
            )
        self.d_model, self.num_levels, self.cross_attention = d_model, num_levels, cross_attention
        several = num_levels > 1 or "deformable" in (encoder_attention, cross_attention)
        self.level_embed = nn.Parameter(torch.zeros(num_levels, d_model)) if several else None
        conditional = cross_attention == "conditional"

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model)

        def ffn() -> FeedForward:
            return FeedForward(d_model=d_model, dim_feedforward=dim_feedforward, dropout=dropout, activation=activation)

        def deformable(kind: type[DeformableAttention]) -> nn.Module:
            return kind(d_model=d_model, nhead=nhead, num_levels=num_levels, num_points=num_points)

        def look_around() -> nn.Module:
            if encoder_attention == "deformable":
                return deformable(DeformableEncoderAttention)
            return EncoderAttention(d_model=d_model, nhead=nhead, dropout=dropout)

        def attend() -> nn.Module:
            kind = ConditionalSelfAttention if conditional else SelfAttention
            return kind(d_model=d_model, nhead=nhead, dropout=dropout)

        def look(first: bool) -> nn.Module:
            if cross_attention == "deformable":
                return deformable(DeformableCrossAttention)
            if conditional:
                return ConditionalCrossAttention(d_model=d_model, nhead=nhead, dropout=dropout, first=first)
            return CrossAttention(d_model=d_model, nhead=nhead, dropout=dropout)

        self.encoder = Encoder(
            layers=[
                EncoderLayer(
                    self_attn=look_around(), ffn=ffn(), d_model=d_model, dropout=dropout, norm_first=norm_first
                )
                for _ in range(num_encoder_layers)
            ],
            norm=norm() if norm_first else nn.Identity(),
            position_scale=MLP(d_model, d_model, d_model, layers=2) if modulate else None,
        )
        self.decoder = Decoder(
            layers=[
                DecoderLayer(
                    self_attn=attend(),
                    cross_attn=look(first=index == 0),
                    ffn=ffn(),
                    d_model=d_model,
                    dropout=dropout,
                    norm_first=norm_first,
                )
                for index in range(num_decoder_layers)
            ],
            norm=norm() if decoder_norm else nn.Identity(),
            spatial=SpatialQuery(d_model=d_model, modulate_size=modulate) if conditional else None,
        )
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if self.level_embed is not None:
            nn.init.normal_(self.level_embed)

    def encode(
        self,
        maps: Sequence[Float[Tensor, "batch d_model _ _"]],
        positions: Sequence[Float[Tensor, "batch d_model _ _"]],
        masks: Sequence[Bool[Tensor, "batch _ _"]],
        *,
        padded: bool = True,
    ) -> Memory:
        """The memory that the encoder makes of the maps. masks: True = padding; padded: whether they hold any."""
        if len(maps) != self.num_levels:
            raise UserError(
                f"Transformer: wanted num_levels={len(maps)}, the number of maps that come in, got {self.num_levels}. "
                "Leave model.transformer.num_levels to follow model.neck.num_levels."
            )
        if self.level_embed is not None:
            levels = self.level_embed[:, :, None, None]
            positions = [position + level for position, level in zip(positions, levels, strict=True)]
        return self.encoder(Memory.from_maps(maps, positions, masks, padded=padded))
