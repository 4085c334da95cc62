"""How a block that decides by chance, through which no gradient flows, is trained all the same."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Policy(Protocol):
    """What such a block has beside `forward`. The trainer finds it anywhere in a model, and needs to know no more.

    After each forward pass in training it asks for `policy_loss` once and adds that to the loss, as `loss_policy`.
    """

    def policy_loss(self, cost: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """A term whose gradient teaches the block its last decisions (REINFORCE: Williams, 1992).

        cost: what the decisions led to, the detection loss of each image. Its negative is the reward.
        """
        ...
