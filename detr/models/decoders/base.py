"""What every decoder is."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.values import Memory, Queries, QueryPositions, Refinement

# From a layer's index, output and anchors to what `Head.refine` makes of them: the next layer's anchors, or what the
# decoder makes these of.
Refine = Callable[[int, Tensor, Tensor | None], Tensor]
# What a head predicts from beside a layer's output: the anchors, or a FineDecoder's boxes and distributions.
Reference = Tensor | Refinement | None
Refines = Literal["boxes", "distributions"]


class Decoder(nn.Module):
    """Layers of self-attention among queries and cross-attention to the memory, one after the other.

    layers: at least one; called with x, QueryPositions, Memory and the mask of the queries' self-attention. Each has
        `norm_first`; `cross_attn.weights(x, positions, memory)` of the last shows where queries look.
    d_model: features of the queries.
    norm: the final norm, which serves the outputs of all layers.
    anchor_dims: dimensions of anchors that the queries need at least: 0 none, 2 points, 4 boxes.
    eval_layers: how many layers are used in evaluation, the first ones; all unless given.
    refines: what heads have to refine, as in Head.
    """

    refines: Refines = "boxes"

    def __init__(
        self,
        *,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        d_model: int,
        anchor_dims: int = 0,
        eval_layers: int | None = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise UserError(f"{type(self).__name__}: wanted num_layers of at least 1.")
        if eval_layers is not None and not 1 <= eval_layers <= len(layers):
            raise UserError(
                f"{type(self).__name__}: wanted eval_layers from 1 to num_layers={len(layers)}, got {eval_layers}."
            )
        self.eval_layers = eval_layers
        self.d_model = d_model
        self.layers = nn.ModuleList(layers)
        self.norm, self.anchor_dims = norm, anchor_dims

    @property
    def used(self) -> nn.ModuleList:
        """The layers that are used now."""
        return self.layers if self.training else self.layers[: self.eval_layers]

    def forward(
        self, queries: Queries, memory: Memory, refine: Refine | None = None, *, look_forward_twice: bool = False
    ) -> tuple[Float[Tensor, "layers batch queries d_model"], list[Reference]]:
        """The layers' outputs, and for each layer the anchors (B, Q, 2 or 4) that its boxes are offsets from.

        refine: makes the next layer's anchors; None leaves them as they are.
        look_forward_twice: a layer's boxes also train the offsets of the layer before (DINO: Zhang et al., ICLR 2023).
        """
        x, anchors = queries.content, queries.anchors
        reference = anchors
        outputs: list[Tensor] = []
        references: list[Reference] = []
        layers = self.used
        for index, layer in enumerate(layers):
            x = layer(x, self.positions(index, x, queries, anchors), memory, queries.keep)
            outputs.append(self.norm(x))
            references.append(reference)
            if refine is not None and index + 1 < len(layers):
                # As published, from what the layer put out; before normalizing first, that is not normalized at all.
                with torch.set_grad_enabled(look_forward_twice and torch.is_grad_enabled()):
                    reference = refine(index, outputs[-1] if layer.norm_first else x, anchors)
                anchors = reference.detach()
        return torch.stack(outputs), references

    def positions(self, index: int, x: Tensor, queries: Queries, anchors: Tensor | None) -> QueryPositions:
        """Where the queries are before the layer with this index. x: (B, Q, d_model), what goes into it."""
        return QueryPositions(position=queries.position(anchors), anchors=anchors)
