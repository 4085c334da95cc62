"""What turns queries, and tokens, into classes and boxes."""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detr.models.layers.mlp import MLP

_PRIOR = 0.01  # probability of each class at the start (Lin et al., ICCV 2017)


class Head(nn.Module):
    """Class logits, and boxes as offsets in logits, of every query or token.

    background: one more output, the last, for no object, as the softmax loss needs; without it each class starts
        improbable, as sigmoid losses need.
    """

    def __init__(self, *, d_model: int, num_classes: int, background: bool) -> None:
        super().__init__()
        self.background = background
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
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch classes"], Float[Tensor, "*batch 4"]]:
        return self.class_head(x), self.box_head(x)

    def scores(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
        """How sure it is of any object, to compare."""
        return logits.softmax(-1)[..., :-1].amax(-1) if self.background else logits.amax(-1)
