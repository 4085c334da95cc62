"""Conditional DETR's decoder (Meng et al., ICCV 2021), and DAB-DETR's (Liu et al., ICLR 2022)."""

from torch import Tensor, nn

from detr.models.decoders.base import Decoder
from detr.models.layers.conditional import ConditionalCrossAttention, ConditionalSelfAttention, SpatialQuery
from detr.models.layers.transformer import Activation, DecoderLayer, initialize
from detr.models.values import Queries, QueryPositions


class ConditionalDecoder(Decoder):
    """Cross-attention with content and position apart: queries look for the parts of their object.

    modulate_sizes: queries also look the wider the larger their anchor is, which needs boxes as anchors (DAB-DETR).
    The other options are those of TransformerDecoder.
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
        modulate_sizes: bool = False,
    ) -> None:
        super().__init__(
            layers=[
                DecoderLayer(
                    self_attn=ConditionalSelfAttention(d_model=d_model, nhead=nhead, dropout=dropout),
                    cross_attn=ConditionalCrossAttention(
                        d_model=d_model, nhead=nhead, dropout=dropout, first=index == 0
                    ),
                    d_model=d_model,
                    dim_feedforward=dim_feedforward,
                    dropout=dropout,
                    activation=activation,
                    norm_first=norm_first,
                )
                for index in range(num_layers)
            ],
            norm=nn.LayerNorm(d_model) if final_norm else nn.Identity(),
            d_model=d_model,
            anchor_dims=4 if modulate_sizes else 2,
        )
        self.spatial = SpatialQuery(d_model=d_model, modulate_sizes=modulate_sizes)
        initialize(self)

    def positions(self, index: int, x: Tensor, queries: Queries, anchors: Tensor | None) -> QueryPositions:
        assert anchors is not None
        spatial = self.spatial(x, anchors, first=index == 0)
        return QueryPositions(position=queries.position(anchors), anchors=anchors, spatial=spatial)
