"""What several blocks need: for maps with padding, for maps in bfloat16, for their inner layers."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from detr.errors import UserError
from detr.models.layers.multihead import dot_product_attention


def masked_mean(
    x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, "batch channels"]:
    """Mean of each channel over what is not padding."""
    count = (~mask).sum((1, 2)).clamp(min=1)
    return (precise(x).masked_fill(mask[:, None], 0.0).sum((2, 3)) / count[:, None]).to(x.dtype)


def tokens(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens channels"]:
    """A map as a sequence; contiguous, without which attention would keep the map of all pairs."""
    return x.flatten(2).transpose(1, 2).contiguous()


def attend(
    query: Float[Tensor, "batch targets features"],
    key: Float[Tensor, "batch sources features"],
    value: Float[Tensor, "batch sources values"],
    keep: Bool[Tensor, "batch sources"],
    *,
    scale: float = 1.0,
) -> Float[Tensor, "batch targets values"]:
    """softmax(scale * query key^T) value with one head, over the sources to keep."""
    # Filled up to one number of features, without which the map of all pairs would be kept.
    size = max(key.shape[-1], value.shape[-1])
    parts = (
        part if part.shape[-1] == size else F.pad(part, (0, size - part.shape[-1])) for part in (query, key, value)
    )
    q, k, v = (part[:, None] for part in parts)
    out = dot_product_attention(q, k, v, keep[:, None, None], scale=scale)
    return out[:, 0, :, : value.shape[-1]]


def attention_weights(
    query: Float[Tensor, "batch targets features"],
    key: Float[Tensor, "batch sources features"],
    keep: Bool[Tensor, "batch sources"],
    *,
    scale: float = 1.0,
) -> Float[Tensor, "batch targets sources"]:
    """What `attend` weighs the values with, which never makes them; the same for all where none is to be kept."""
    logits = scale * query @ key.transpose(1, 2)
    return logits.masked_fill(~keep[:, None], torch.finfo(logits.dtype).min).softmax(-1)


def precise(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least, for sums over a map and places in it, of which bfloat16 keeps two digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reduced(channels: int, reduction: int) -> int:
    """Features of a block's inner layers; raises UserError for a reduction below 1."""
    if reduction < 1:
        raise UserError(f"reduction: wanted a value of at least 1, got {reduction}.")
    return max(channels // reduction, 1)
