"""DETR's transformer (Vaswani et al., NeurIPS 2017; Carion et al., ECCV 2020).

Sequences are (batch, tokens, d_model). Positions are added to queries and keys in every layer, never to values.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError

Activation = Literal["relu", "gelu", "glu"]


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(d_head)) v over `nhead` heads, through scaled_dot_product_attention.

    The three input projections share one matrix, `in_proj`, rows in the order q, k, v.
    """

    def __init__(self, *, d_model: int, nhead: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % nhead:
            raise UserError(f"MultiHeadAttention: wanted d_model as a multiple of nhead, got {d_model} and {nhead}.")
        self.nhead, self.dropout = nhead, dropout
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "batch targets d_model"],
        key: Float[Tensor, "batch sources d_model"],
        value: Float[Tensor, "batch sources d_model"],
        keep: Bool[Tensor, "batch 1 1 sources"] | None = None,
    ) -> Float[Tensor, "batch targets d_model"]:
        """keep: True where a key may be attended to; None where all may, which lets faster kernels run."""
        d_model = query.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        if query is key:
            q, k = F.linear(query, weight[: 2 * d_model], bias[: 2 * d_model]).chunk(2, dim=-1)
        else:
            q = F.linear(query, weight[:d_model], bias[:d_model])
            k = F.linear(key, weight[d_model : 2 * d_model], bias[d_model : 2 * d_model])
        v = F.linear(value, weight[2 * d_model :], bias[2 * d_model :])
        q, k, v = (x.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with an activation between; `glu` gates one half of the features with the other."""

    def __init__(self, *, d_model: int, dim_feedforward: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        activations: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}
        self.activation = activations[activation]
        self.linear1 = nn.Linear(d_model, dim_feedforward * (2 if activation == "glu" else 1))
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and a layer norm."""

    def __init__(
        self,
        *,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = MultiHeadAttention(d_model=d_model, nhead=nhead, dropout=dropout)
        self.ffn = FeedForward(d_model=d_model, dim_feedforward=dim_feedforward, dropout=dropout, activation=activation)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, keep: Tensor | None) -> Float[Tensor, "batch tokens d_model"]:
        def attend(x: Tensor) -> Tensor:
            q = x + position
            return self.dropout(self.self_attn(q, q, x, keep))

        def feed(x: Tensor) -> Tensor:
            return self.dropout(self.ffn(x))

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
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = MultiHeadAttention(d_model=d_model, nhead=nhead, dropout=dropout)
        self.cross_attn = MultiHeadAttention(d_model=d_model, nhead=nhead, dropout=dropout)
        self.ffn = FeedForward(d_model=d_model, dim_feedforward=dim_feedforward, dropout=dropout, activation=activation)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, memory_key: Tensor, keep: Tensor | None
    ) -> Float[Tensor, "batch queries d_model"]:
        """memory_key: the memory with its positions added, the same for all layers."""

        def attend(x: Tensor) -> Tensor:
            q = x + query_position
            return self.dropout(self.self_attn(q, q, x))

        def look(x: Tensor) -> Tensor:
            return self.dropout(self.cross_attn(x + query_position, memory_key, memory, keep))

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
    """A stack of encoder layers, with a final norm where the layers normalise first."""

    def __init__(self, *, layer: EncoderLayer, num_layers: int, d_model: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model) if layer.norm_first else nn.Identity()

    def forward(self, x: Tensor, position: Tensor, keep: Tensor | None) -> Float[Tensor, "batch tokens d_model"]:
        for layer in self.layers:
            x = layer(x, position, keep)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers. One final norm serves the outputs of all of them."""

    def __init__(self, *, layer: DecoderLayer, num_layers: int, d_model: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self, query_position: Tensor, memory: Tensor, position: Tensor, keep: Tensor | None
    ) -> Float[Tensor, "layers batch queries d_model"]:
        memory_key = memory + position
        x = torch.zeros_like(query_position)
        outputs = []
        for layer in self.layers:
            x = layer(x, query_position, memory, memory_key, keep)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """Encoder over the feature map's cells, decoder from object queries to boxes-to-be.

    Options have the names of torch.nn.Transformer.

    d_model: features of every token.
    nhead: attention heads, a divisor of d_model.
    num_encoder_layers, num_decoder_layers: depth of the two stacks; 0 encoder layers hand the features on.
    dim_feedforward: hidden features of the feed-forward networks.
    dropout: on attention weights, hidden features and residual branches, in training.
    activation: relu, gelu or glu.
    norm_first: normalise before each sub-layer instead of after it.
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
    ) -> None:
        super().__init__()
        if num_decoder_layers < 1:
            raise UserError(f"Transformer: wanted num_decoder_layers of at least 1, got {num_decoder_layers}.")
        self.d_model = d_model
        options: dict[str, Any] = {
            "d_model": d_model,
            "nhead": nhead,
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "norm_first": norm_first,
        }
        self.encoder = Encoder(layer=EncoderLayer(**options), num_layers=num_encoder_layers, d_model=d_model)
        self.decoder = Decoder(layer=DecoderLayer(**options), num_layers=num_decoder_layers, d_model=d_model)
        # Each copied layer gets its own values here.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        features: Float[Tensor, "batch d_model height width"],
        position: Float[Tensor, "batch d_model height width"],
        mask: Bool[Tensor, "batch height width"] | None,
        queries: Float[Tensor, "queries d_model"],
    ) -> tuple[Float[Tensor, "layers batch queries d_model"], Float[Tensor, "batch d_model height width"]]:
        """mask: True = padding, None where there is none. Returns the decoder layers' outputs and the memory."""
        x = features.flatten(2).transpose(1, 2)
        position = position.flatten(2).transpose(1, 2)
        keep = None if mask is None else ~mask.flatten(1)[:, None, None, :]
        memory = self.encoder(x, position, keep)
        query_position = queries.expand(len(features), -1, -1)
        decoded = self.decoder(query_position, memory, position, keep)
        return decoded, memory.transpose(1, 2).unflatten(2, features.shape[2:])
