"""Hard attention: a sampled choice of positions (Mnih et al., NeurIPS 2014; Xu et al., ICML 2015)."""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.masked import masked_mean, precise
from detr.models.attention.views import SoftMask


class HardAttention(nn.Module):
    """Keeps or drops each position of the map, as a coin says whose probability is learned.

    In training the coins are tossed; in evaluation what is more likely than not is kept. Tossing has no gradient:

    estimator: `reinforce` learns from `policy_loss` (Williams 1992), against a baseline; `gumbel` passes the gradient
        of a relaxed coin straight through (Jang et al., ICLR 2017), and has no policy loss. The baseline is the moving
        average of the reward, as Xu et al. have it, and what is learned to expect beyond that from the map.
    keep: probability to keep a position at the start; near 1, so that the block is nearly the identity, and exactly so
        in evaluation.
    temperature: of the relaxed coin.
    weight: of the policy in `policy_loss`. At 1 the mean of its gradient is that of the expected cost, but its noise
        drowns the gradients of the detector, with which it is clipped.
    """

    def __init__(
        self,
        channels: int,
        *,
        estimator: Literal["reinforce", "gumbel"] = "reinforce",
        keep: float = 0.98,
        temperature: float = 1.0,
        weight: float = 0.01,
    ) -> None:
        super().__init__()
        if not 0.5 < keep < 1 or temperature <= 0 or weight < 0:
            raise UserError(
                "HardAttention: wanted keep between 0.5 and 1, temperature above 0 and weight of at least 0, got "
                f"{keep}, {temperature} and {weight}."
            )
        self.estimator, self.temperature, self.weight = estimator, temperature, weight
        self.score = nn.Conv2d(channels, 1, kernel_size=1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(cast(Tensor, self.score.bias), math.log(keep / (1 - keep)))
        self.baseline = nn.Linear(channels, 1) if estimator == "reinforce" else None
        self.average: Tensor
        if estimator == "reinforce":
            self.register_buffer("average", torch.zeros(()))
        self._policy: tuple[Tensor, Tensor] | None = None

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        logits = precise(self.score(x)[:, 0])
        if not self.training:
            return x * (logits > 0)[:, None]
        if self.baseline is None:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            soft = ((logits + uniform.logit()) / self.temperature).sigmoid()
            return x * ((soft > 0.5).to(soft.dtype) + soft - soft.detach()).to(x.dtype)[:, None]
        kept = torch.bernoulli(logits.detach().sigmoid())
        chances = F.logsigmoid(torch.where(kept > 0, logits, -logits)).masked_fill(mask, 0.0)
        self._policy = chances.sum((1, 2)), self.baseline(masked_mean(x.detach(), mask))[:, 0]
        return x * kept.to(x.dtype)[:, None]

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> SoftMask:
        """The probability to keep each position."""
        return SoftMask(self.score(x)[:, 0].sigmoid().masked_fill(mask, 0.0))

    def policy_loss(self, cost: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """What to add to the loss after a forward pass in training; 0 without a policy.

        cost: the loss of each image, whose negative is the reward.
        """
        if self._policy is None:
            return cost.new_zeros(())
        (log_probability, expected), self._policy = self._policy, None
        reward = -cost.detach()
        advantage = reward - self.average - expected.detach()
        # The first reward is the average so far: far from it, learning the baseline would drown all other gradients.
        self.average += torch.where(self.average == 0, 1.0, 0.1) * (reward.mean() - self.average)
        return -self.weight * (log_probability * advantage).mean() + F.mse_loss(expected, reward - self.average)
