"""Multi-head self-attention on a feature map (Vaswani et al., NeurIPS 2017; on maps: Carion et al., ECCV 2020)."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.models.attention.views import Weights
from detr.models.layers.multihead import MultiHeadAttention
from detr.models.layers.positions import SinePosition


class MultiHeadSelfAttention(nn.Module):
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
        key, value, keep = self._sequences(x, mask)
        return x + self.attention.attend(key, key, value, keep).transpose(1, 2).unflatten(2, x.shape[2:])

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> Weights:
        """Mean over heads."""
        key, _, keep = self._sequences(x, mask)
        query = key.take_along_dim(token[:, None, None], dim=1)
        return Weights(self.attention.token_weights(query, key, keep)[:, 0].unflatten(1, x.shape[2:]))

    def _sequences(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and which of them may be looked at."""
        value = x.flatten(2).transpose(1, 2)
        key = value + self.position(mask).to(x.dtype).flatten(2).transpose(1, 2)
        return key, value, ~mask.flatten(1)[:, None, None]
