"""What turns queries, and tokens, into classes and boxes."""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.boxes import inverse_sigmoid
from detr.models.layers.mlp import MLP

_PRIOR = 0.01  # probability of each class at the start (Lin et al., ICCV 2017)


class Head(nn.Module):
    """Classes and boxes of every query or token.

    A head of another kind is a subclass; what its `forward` gives beside logits and boxes is a field of Predictions.

    background: one more output, the last, for no object, as the softmax loss needs; without it each class starts
        improbable, as sigmoid losses need.
    eps: as in `inverse_sigmoid`, of the references that boxes are offsets from.
    """

    def __init__(self, *, d_model: int, num_classes: int, background: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.background, self.eps = background, eps
        self.class_head = nn.Linear(d_model, num_classes + background)
        self.box_head = MLP(d_model, d_model, 4, layers=3)
        if not background:
            nn.init.constant_(self.class_head.bias, math.log(_PRIOR / (1 - _PRIOR)))

    def start_at_anchors(self, size: float) -> None:
        """The first boxes are the anchors themselves. size: width and height, in logits, of those that have none."""
        last = cast(nn.Linear, self.box_head.layers[-1])
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, 0.0, size, size]))

    def forward(
        self, x: Float[Tensor, "batch queries d_model"], reference: Float[Tensor, "batch queries dims"] | None
    ) -> dict[str, Tensor]:
        """The tensors of one decoder layer by the fields of Predictions.

        x: the layer's output. reference: the anchors, (B, Q, 2 or 4), that boxes are offsets from.
        """
        return {"logits": self.class_head(x), "boxes": self.boxes(x, reference)}

    def boxes(
        self, x: Float[Tensor, "batch queries d_model"], reference: Float[Tensor, "batch queries dims"] | None
    ) -> Float[Tensor, "batch queries 4"]:
        """Boxes (cxcywh) in [0, 1], from offsets in logits around points, boxes, or nothing."""
        offsets = self.box_head(x)
        if reference is None:
            return offsets.sigmoid()
        dims = reference.shape[-1]
        offsets = offsets.float()  # half precision rounds 1 - eps to 1
        moved = offsets[..., :dims] + inverse_sigmoid(reference.float(), self.eps)
        return torch.cat((moved, offsets[..., dims:]), dim=-1).sigmoid()

    def scores(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
        """How sure it is of any object, to compare."""
        return logits.softmax(-1)[..., :-1].amax(-1) if self.background else logits.amax(-1)
