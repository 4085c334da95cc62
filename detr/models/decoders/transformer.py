"""DETR's decoder: every query looks at all tokens (Carion et al., ECCV 2020)."""

from torch import nn

from detr.models.decoders.base import Decoder
from detr.models.layers.transformer import (
    Activation,
    DecoderCrossAttention,
    DecoderLayer,
    DecoderSelfAttention,
    initialize,
)


class TransformerDecoder(Decoder):
    """Cross-attention of every query to all tokens.

    Options have the names of torch.nn.TransformerDecoderLayer, where that has them.

    d_model: features of every token and query. nhead: attention heads, a divisor of d_model.
    num_layers: depth, at least 1.
    dim_feedforward: hidden features of the feed-forward networks.
    dropout: on attention weights, hidden features and residual branches, in training.
    activation: relu, gelu, glu or prelu.
    norm_first: normalize before each sub-layer instead of after it.
    final_norm: normalize the outputs of all layers.
    """

    def __init__(
        self,
        *,
        d_model: int = 256,
        nhead: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        norm_first: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__(
            layers=[
                DecoderLayer(
                    self_attn=DecoderSelfAttention(d_model=d_model, nhead=nhead, dropout=dropout),
                    cross_attn=DecoderCrossAttention(d_model=d_model, nhead=nhead, dropout=dropout),
                    d_model=d_model,
                    dim_feedforward=dim_feedforward,
                    dropout=dropout,
                    activation=activation,
                    norm_first=norm_first,
                )
                for _ in range(num_layers)
            ],
            norm=nn.LayerNorm(d_model) if final_norm else nn.Identity(),
            d_model=d_model,
        )
        initialize(self)
