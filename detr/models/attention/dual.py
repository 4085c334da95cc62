"""Dual attention (DANet: Fu et al., CVPR 2019)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.masked import attend, attention_weights, precise, reduced, tokens
from detr.models.attention.views import Weights


class PositionAttention(nn.Module):
    """gamma * (every position looks at all positions) + x. reduction: of the channels of queries and keys."""

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        inner = reduced(channels, reduction)
        self.query, self.key = nn.Conv2d(channels, inner, kernel_size=1), nn.Conv2d(channels, inner, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        query, key, value = (tokens(part(x)) for part in (self.query, self.key, self.value))
        seen = attend(query, key, value, ~mask.flatten(1))
        return x + self.gamma.to(x.dtype) * seen.transpose(1, 2).unflatten(2, x.shape[2:])

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> Weights:
        query, key = tokens(self.query(x)).take_along_dim(token[:, None, None], dim=1), tokens(self.key(x))
        return Weights(attention_weights(query, key, ~mask.flatten(1))[:, 0].unflatten(1, x.shape[2:]))


class ChannelAttention(nn.Module):
    """gamma * (every channel looks at all channels) + x.

    favors: `dissimilar` channels, as in the published code, or `similar` ones, as in the paper's formula.
    """

    def __init__(self, *, favors: Literal["dissimilar", "similar"] = "dissimilar") -> None:
        super().__init__()
        self.sign = -1.0 if favors == "dissimilar" else 1.0
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        values = torch.where(mask[:, None], 0.0, x).flatten(2)
        # These products grow with the map: rounded to bfloat16 they would favor other channels.
        with torch.autocast(x.device.type, enabled=False):
            rows = precise(values)
            weights = (self.sign * (rows @ rows.transpose(1, 2))).softmax(-1).to(x.dtype)
        return x + self.gamma.to(x.dtype) * (weights @ values).unflatten(2, x.shape[2:])


class DualAttention(nn.Module):
    """Position and channel attention side by side, added to the map.

    position, channel: which of them to have. reduction: of the channels of queries and keys over positions.
    favors: which channels a channel looks at: `dissimilar` (published code) or `similar` ones (the paper's formula).
    """

    def __init__(
        self,
        channels: int,
        *,
        position: bool = True,
        channel: bool = True,
        reduction: int = 8,
        favors: Literal["dissimilar", "similar"] = "dissimilar",
    ) -> None:
        super().__init__()
        if not (position or channel):
            raise UserError("DualAttention: wanted position, channel, or both, got neither.")
        self.position = PositionAttention(channels, reduction=reduction) if position else None
        self.channel = ChannelAttention(favors=favors) if channel else None

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        parts = [part(x, mask) for part in (self.position, self.channel) if part is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1] - x

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> Weights | None:
        """Those of position attention; channel attention has none."""
        return None if self.position is None else self.position.view(x, mask, token)
