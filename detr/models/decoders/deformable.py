"""Deformable DETR's decoder: every query looks at a few points around its anchor (Zhu et al., ICLR 2021)."""

from collections.abc import Sequence

from torch import nn

from detr.models.decoders.base import Decoder
from detr.models.layers.deformable import DeformableCrossAttention, Sampling
from detr.models.layers.transformer import Activation, DecoderLayer, DecoderSelfAttention, initialize


class DeformableDecoder(Decoder):
    """Cross-attention of every query to a few points around its anchor, in all maps.

    num_levels: feature maps in the memory. num_points, sampling: as in DeformableAttention.
    eval_layers: how many layers are used in evaluation, the first ones; all unless given.
    The other options are those of TransformerDecoder; `dropout` is not applied to the weights of cross-attention, as
    published.
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
        num_levels: int = 1,
        num_points: int | Sequence[int] = 4,
        sampling: Sampling = "bilinear",
        eval_layers: int | None = None,
    ) -> None:
        super().__init__(
            layers=[
                DecoderLayer(
                    self_attn=DecoderSelfAttention(d_model=d_model, nhead=nhead, dropout=dropout),
                    cross_attn=DeformableCrossAttention(
                        d_model=d_model, nhead=nhead, num_levels=num_levels, num_points=num_points, sampling=sampling
                    ),
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
            anchor_dims=2,
            eval_layers=eval_layers,
        )
        initialize(self)
