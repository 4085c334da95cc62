"""D-FINE's decoder: every layer moves the edges of boxes by distributions of distances (Peng et al., ICLR 2025)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.boxes import inverse_sigmoid
from detr.edges import bin_distances, expected_distances, move_edges
from detr.errors import UserError
from detr.models.decoders.base import Decoder, Reference, Refine
from detr.models.layers.deformable import DeformableCrossAttention
from detr.models.layers.mlp import MLP, MLPActivation
from detr.models.layers.transformer import DecoderLayer, DecoderSelfAttention, Gate, initialize
from detr.models.values import Memory, Queries, QueryPositions, Refinement

_MOST = 10.0  # that features of positional embeddings are, in either direction


class FineDecoder(Decoder):
    """Deformable cross-attention without projections, joined by a gate; distributions that are refined layer by layer.

    From the first layer's output come a box for each query, by offsets from its anchor, and for each edge of that box a
    distribution of how far it moves. The following layers add to the logits of these distributions. The box with its
    edges where they are expected is the next layer's anchor.

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
        activation: MLPActivation = "relu",
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
        # Parameters, so that they are saved with the weights, which fit no other bins; published code does so too.
        self.up = nn.Parameter(torch.tensor([up]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([reg_scale]), requires_grad=False)
        self.start_head = MLP(d_model, d_model, 4, layers=3, activation=activation)
        initialize(self.layers)
        self.start_head.zero()

    def forward(
        self, queries: Queries, memory: Memory, refine: Refine | None = None, *, look_forward_twice: bool = False
    ) -> tuple[Float[Tensor, "layers batch queries d_model"], list[Reference]]:
        """The layers' outputs, and the boxes of each as a Refinement.

        refine: what a layer adds to the logits of distributions, (B, Q, 4, N + 1), from the sum of its output and the
            one before.
        look_forward_twice: of no use here, where gradients reach earlier layers through the distributions.
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
                distributions = refine(index, x, anchors).float()  # half precision rounds the sums of layers
            else:
                distributions = distributions + refine(index, x + before, anchors).float()
            moves = expected_distances(distributions, distances)
            boxes = move_edges(start.detach(), moves, self.reg_scale[0])
            refinements.append(Refinement(start=start, distributions=distributions, boxes=boxes))
            anchors = boxes.detach()
        return torch.stack(outputs), refinements

    def positions(self, index: int, x: Tensor, queries: Queries, anchors: Tensor | None) -> QueryPositions:
        return QueryPositions(position=queries.position(anchors).clamp(-_MOST, _MOST), anchors=anchors)

    def _start(self, x: Tensor, anchors: Tensor) -> Float[Tensor, "batch queries 4"]:
        """The boxes whose edges move."""
        # Half precision rounds 1 - eps to 1.
        return (self.start_head(x).float() + inverse_sigmoid(anchors.float(), self.eps)).sigmoid()
