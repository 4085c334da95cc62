"""Multi-head self-attention on a feature map (Vaswani et al., NeurIPS 2017; on maps: Carion et al., ECCV 2020)."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.models.position import SinePosition
from detr.models.transformer import MultiHeadAttention


class SelfAttention(nn.Module):
    """x + attention over all positions, with sine encodings added to queries and keys, as in DETR's encoder.

    nhead: heads, a divisor of the channels. dropout: on attention weights, in training.
    """

    def __init__(self, channels: int, *, nhead: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.position = SinePosition(d_model=channels)
        self.attention = MultiHeadAttention(d_model=channels, nhead=nhead, dropout=dropout)
        nn.init.xavier_uniform_(self.attention.in_proj.weight)
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        tokens = x.flatten(2).transpose(1, 2)
        key = tokens + self.position(mask).to(x.dtype).flatten(2).transpose(1, 2)
        keep = ~mask.flatten(1)[:, None, None]
        return x + self.attention.attend(key, key, tokens, keep).transpose(1, 2).unflatten(2, x.shape[2:])
