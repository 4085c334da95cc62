"""The perceptron that heads and embeddings share."""

import itertools
from typing import Literal, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MLPActivation = Literal["relu", "silu"]


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(
        self, d_in: int, d_hidden: int, d_out: int, *, layers: int, activation: MLPActivation = "relu"
    ) -> None:
        super().__init__()
        self.d_out = d_out
        self.activation = F.silu if activation == "silu" else F.relu
        sizes = [d_in, *[d_hidden] * (layers - 1), d_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)

    def zero(self) -> None:
        """Zero the last layer, so that every output is 0 at first."""
        last = cast(nn.Linear, self.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
