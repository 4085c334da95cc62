"""Multi-head attention by dot products (Vaswani et al., NeurIPS 2017)."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError


class MultiHead(nn.Module):
    """softmax(q k^T / sqrt(features of a head)) v over `nhead` heads; the projections are up to those who inherit.

    out_proj: of the heads' outputs side by side, to be made there too.
    """

    out_proj: nn.Linear

    def __init__(self, *, d_model: int, nhead: int, dropout: float) -> None:
        super().__init__()
        check_heads(self, d_model, nhead)
        if not 0 <= dropout <= 1:
            raise UserError(f"{type(self).__name__}: wanted dropout as a probability, got {dropout}.")
        self.nhead, self.dropout = nhead, dropout

    def heads(self, x: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch heads tokens features"]:
        return x.unflatten(-1, (self.nhead, -1)).transpose(1, 2)

    def mix(
        self,
        query: Float[Tensor, "batch heads targets features"],
        key: Float[Tensor, "batch heads sources features"],
        value: Float[Tensor, "batch heads sources _"],
        keep: Bool[Tensor, "#batch 1 _ sources"] | None,
    ) -> Float[Tensor, "batch targets d_model"]:
        """keep: True where a key may be attended to; None where all may, which lets faster kernels run."""
        dropout = self.dropout if self.training else 0.0
        out = dot_product_attention(query, key, value, keep, dropout=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def weigh(
        query: Float[Tensor, "batch heads targets features"],
        key: Float[Tensor, "batch heads sources features"],
        keep: Bool[Tensor, "#batch 1 _ sources"] | None,
    ) -> Float[Tensor, "batch targets sources"]:
        """The weights that `mix` gives the values, and never keeps: mean over heads. To look at, not to train with."""
        logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        if keep is not None:
            logits = logits.masked_fill(~keep, -math.inf)
        return logits.softmax(-1).mean(1)


class MultiHeadAttention(MultiHead):
    """Attention whose three input projections share one matrix, `in_proj`, rows in the order q, k, v."""

    def __init__(self, *, d_model: int, nhead: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, nhead=nhead, dropout=dropout)
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def attend(
        self,
        query: Float[Tensor, "batch targets d_model"],
        key: Float[Tensor, "batch sources d_model"],
        value: Float[Tensor, "batch sources d_model"],
        keep: Bool[Tensor, "#batch 1 _ sources"] | None = None,
    ) -> Float[Tensor, "batch targets d_model"]:
        """keep: True where a key may be attended to; None where all may."""
        d_model = query.shape[-1]
        q, k = self._project(query, key)
        v = F.linear(value, self.in_proj.weight[2 * d_model :], self.in_proj.bias[2 * d_model :])
        return self.mix(q, k, self.heads(v), keep)

    def token_weights(
        self,
        query: Float[Tensor, "batch targets d_model"],
        key: Float[Tensor, "batch sources d_model"],
        keep: Bool[Tensor, "#batch 1 _ sources"] | None = None,
    ) -> Float[Tensor, "batch targets sources"]:
        """What `attend` weighs the values with: mean over heads, 1 in sum."""
        return self.weigh(*self._project(query, key), keep)

    def _project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        d_model = query.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        if query is key:
            q, k = F.linear(query, weight[: 2 * d_model], bias[: 2 * d_model]).chunk(2, dim=-1)
        else:
            q = F.linear(query, weight[:d_model], bias[:d_model])
            k = F.linear(key, weight[d_model : 2 * d_model], bias[d_model : 2 * d_model])
        return self.heads(q), self.heads(k)


def dot_product_attention(
    query: Float[Tensor, "batch heads targets features"],
    key: Float[Tensor, "batch heads sources features"],
    value: Float[Tensor, "batch heads sources _"],
    keep: Bool[Tensor, "#batch 1 _ sources"] | None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "batch heads targets _"]:
    """softmax(scale * query key^T) value of each head, over the sources to keep; scale: 1 / sqrt(features) by default.

    On the CPU in single precision under autocast too: torch's kernel for bf16 takes 2 to 7 times as long there.
    """
    attend = partial(F.scaled_dot_product_attention, attn_mask=keep, dropout_p=dropout, scale=scale)
    if query.device.type != "cpu":
        return attend(query, key, value)
    with torch.autocast("cpu", enabled=False):
        precise = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
        return attend(*precise).to(value.dtype)


def check_heads(part: nn.Module, d_model: int, nhead: int) -> None:
    """Raises UserError, in the name of this part, where d_model cannot be shared out among so many heads."""
    if nhead < 1 or d_model % nhead:
        raise UserError(f"{type(part).__name__}: wanted d_model as a multiple of nhead, got {d_model} and {nhead}.")
