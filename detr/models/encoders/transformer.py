"""DETR's encoder: every token looks at all others (Carion et al., ECCV 2020)."""

from torch import nn

from detr.models.encoders.base import StackedEncoder
from detr.models.layers.mlp import MLP
from detr.models.layers.transformer import Activation, EncoderLayer, EncoderSelfAttention, initialize


class TransformerEncoder(StackedEncoder):
    """Self-attention of every token to all tokens. Its cost grows with the square of their number.

    Options have the names of torch.nn.TransformerEncoderLayer, where that has them.

    position: padding mask (B, h, w), True = padding, to positional encodings (B, d_model, h, w).
    d_model: features of every token. nhead: attention heads, a divisor of d_model.
    num_layers: depth; 0 hands the maps on as they are.
    dim_feedforward: hidden features of the feed-forward networks.
    dropout: on attention weights, hidden features and residual branches, in training.
    activation: relu, gelu, glu or prelu.
    norm_first: normalize before each sub-layer instead of after it.
    num_levels: feature maps that come in.
    scale_positions: scale each token's position as its content says, before each layer (DAB-DETR: Liu et al., ICLR
        2022).
    """

    def __init__(
        self,
        *,
        position: nn.Module,
        d_model: int = 256,
        nhead: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        norm_first: bool = False,
        num_levels: int = 1,
        scale_positions: bool = False,
    ) -> None:
        super().__init__(
            position=position,
            layers=[
                EncoderLayer(
                    self_attn=EncoderSelfAttention(d_model=d_model, nhead=nhead, dropout=dropout),
                    d_model=d_model,
                    dim_feedforward=dim_feedforward,
                    dropout=dropout,
                    activation=activation,
                    norm_first=norm_first,
                )
                for _ in range(num_layers)
            ],
            norm=nn.LayerNorm(d_model) if norm_first else nn.Identity(),
            d_model=d_model,
            num_levels=num_levels,
            level_embedding=num_levels > 1,
            position_scale=MLP(d_model, d_model, d_model, layers=2) if scale_positions else None,
        )
        initialize(self.layers)
        if self.position_scale is not None:
            initialize(self.position_scale)
