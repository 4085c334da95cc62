"""What all attention by dot products has in common."""

import math

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
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout)
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


def check_heads(part: nn.Module, d_model: int, nhead: int) -> None:
    """Raises UserError, in the name of this part, where d_model cannot be shared out among so many heads."""
    if nhead < 1 or d_model % nhead:
        raise UserError(f"{type(part).__name__}: wanted d_model as a multiple of nhead, got {d_model} and {nhead}.")
