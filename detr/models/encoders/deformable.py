"""Deformable DETR's encoder: every token looks at a few points of all maps (Zhu et al., ICLR 2021)."""

from torch import nn

from detr.models.encoders.base import StackedEncoder
from detr.models.layers.deformable import DeformableSelfAttention
from detr.models.layers.transformer import Activation, EncoderLayer, initialize


class DeformableEncoder(StackedEncoder):
    """Self-attention of every token to a few points around it. Its cost grows with the number of tokens.

    num_points: points that each head samples in each map. The other options are those of TransformerEncoder; `dropout`
    is not applied to attention weights, as published.
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
        num_points: int = 4,
    ) -> None:
        super().__init__(
            position=position,
            layers=[
                EncoderLayer(
                    self_attn=DeformableSelfAttention(
                        d_model=d_model, nhead=nhead, num_levels=num_levels, num_points=num_points
                    ),
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
            level_embedding=True,
        )
        initialize(self.layers)
