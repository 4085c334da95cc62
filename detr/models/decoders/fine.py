"""D-FINE's decoder: every layer moves the edges of boxes by distributions of distances (Peng et al., ICLR 2025)."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.boxes import inverse_sigmoid
from detr.edges import bin_distances, move_edges
from detr.errors import UserError
from detr.models.decoders.base import Decoder, Reference, Refine
from detr.models.layers.deformable import DeformableCrossAttention
from detr.models.layers.mlp import MLP
from detr.models.layers.transformer import DecoderLayer, DecoderSelfAttention, Gate, initialize
from detr.models.values import Memory, Queries, QueryPositions, Refinement

_FAR = 10.0  # that positions of queries go at most


class FineDecoder(Decoder):
    """Deformable cross-attention without projections, joined by a gate; distributions that are refined layer by layer.

    The first layer gives a box for each query by offsets from its anchor, and a distribution of the distance of each
    edge from that box's. The following layers add to the logits of these distributions; the edges that are expected
    make the anchors of the next layer.

    reg_max, up, reg_scale: of the distributions, as in `detr.edges`; reg_max is even.
    activation: relu or silu, of the feed-forward networks and of the first box's perceptron.
    eps: as in `inverse_sigmoid`, of the anchors that the first boxes are offsets from.
    eval_layers: how many layers are used in evaluation, the first ones; all unless given.
    The other options are those of DeformableDecoder.
    """

    refines = "distributions"

    def __init__(
        self,
        *,
        d_model: int = 256,
        nhead: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        activation: Literal["relu", "silu"] = "relu",
        num_levels: int = 3,
        num_points: int | Sequence[int] = 4,
        reg_max: int = 32,
        up: float = 0.5,
        reg_scale: float = 4.0,
        eps: float = 1e-5,
        eval_layers: int | None = None,
    ) -> None:
        if reg_max < 4 or reg_max % 2:
            raise UserError(f"FineDecoder: wanted reg_max as an even number of at least 4, got {reg_max}.")
        super().__init__(
            layers=[
                DecoderLayer(
                    self_attn=DecoderSelfAttention(d_model=d_model, nhead=nhead, dropout=dropout),
                    cross_attn=DeformableCrossAttention(
                        d_model=d_model, nhead=nhead, num_levels=num_levels, num_points=num_points, projections=False
                    ),
                    d_model=d_model,
                    dim_feedforward=dim_feedforward,
                    dropout=dropout,
                    activation=activation,
                    norm_first=False,
                    gate=Gate(d_model),
                )
                for _ in range(num_layers)
            ],
            norm=nn.Identity(),
            d_model=d_model,
            anchor_dims=4,
            eval_layers=eval_layers,
        )
        self.reg_max, self.eps = reg_max, eps
        # Beside the weights, which fit no other bins, and counted with them, as published.
        self.up = nn.Parameter(torch.tensor([up]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([reg_scale]), requires_grad=False)
        self.start_head = MLP(d_model, d_model, 4, layers=3, activation=activation)
        initialize(self.layers)
        for module in self.modules():
            if isinstance(module, Gate):
                nn.init.zeros_(module.weigh.weight)
                nn.init.zeros_(module.weigh.bias)
        self.start_head.zero()

    def forward(
        self, queries: Queries, memory: Memory, refine: Refine | None = None, *, look_forward_twice: bool = False
    ) -> tuple[Float[Tensor, "layers batch queries d_model"], list[Reference]]:
        """The layers' outputs, and what each made of the boxes.

        refine: gives what a layer adds to the logits of distributions, from the sum of its output and the one before.
        """
        assert refine is not None and queries.anchors is not None
        x, anchors = queries.content, queries.anchors
        outputs: list[Tensor] = []
        refinements: list[Reference] = []
        distances = bin_distances(self.reg_max, self.up[0], self.reg_scale[0])
        for index, layer in enumerate(self.used):
            before = x.detach()
            x = layer(x, self.positions(index, x, queries, anchors), memory, queries.keep)
            outputs.append(x)
            if index == 0:
                start = self._start(x, anchors)
                distributions = _precise(refine(index, x, anchors))
            else:
                distributions = distributions + _precise(refine(index, x + before, anchors))
            expected = distributions.softmax(-1) @ distances
            boxes = move_edges(start.detach(), expected, self.reg_scale[0])
            refinements.append(Refinement(start=start, distributions=distributions, boxes=boxes))
            anchors = boxes.detach()
        return torch.stack(outputs), refinements

    def positions(self, index: int, x: Tensor, queries: Queries, anchors: Tensor | None) -> QueryPositions:
        return QueryPositions(position=queries.position(anchors).clamp(-_FAR, _FAR), anchors=anchors)

    def _start(self, x: Tensor, anchors: Tensor) -> Float[Tensor, "batch queries 4"]:
        """The boxes around which the edges move."""
        return (_precise(self.start_head(x)) + inverse_sigmoid(_precise(anchors), self.eps)).sigmoid()


def _precise(x: Tensor) -> Tensor:
    """At least in single precision: half rounds sums of logits, and 1 - eps to 1."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
