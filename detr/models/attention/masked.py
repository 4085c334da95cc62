"""What several blocks take from a map with padding."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(
    x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, "batch channels"]:
    """Mean of each channel over what is not padding."""
    valid = (~mask)[:, None].to(x.dtype)
    return torch.where(mask[:, None], 0.0, x).sum((2, 3)) / valid.sum((2, 3)).clamp(min=1)


def tokens(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens channels"]:
    """A map as a sequence; contiguous, without which attention would keep the map of all pairs."""
    return x.flatten(2).transpose(1, 2).contiguous()
