"""Criss-cross attention (CCNet: Huang et al., ICCV 2019)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.masked import reduced
from detr.models.attention.views import Weights


class CrissCrossAttention(nn.Module):
    """Every position looks at its column and its row; done twice, it has seen the whole map.

    recurrence: how often, with the same weights. reduction: queries and keys have channels / reduction features.
    """

    def __init__(self, channels: int, *, recurrence: int = 2, reduction: int = 8) -> None:
        super().__init__()
        if recurrence < 1:
            raise UserError(f"CrissCrossAttention: wanted recurrence of at least 1, got {recurrence}.")
        self.recurrence = recurrence
        inner = reduced(channels, reduction)
        self.query, self.key = nn.Conv2d(channels, inner, kernel_size=1), nn.Conv2d(channels, inner, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        for _ in range(self.recurrence):
            x = self._once(x, mask)
        return x

    def _once(self, x: Tensor, mask: Tensor) -> Tensor:
        affinities, value = self.affinities(x, mask), self.value(x)
        column, row = affinities.split(x.shape[2:], dim=-1)
        seen = torch.einsum("bhwi,bciw->bchw", column, value) + torch.einsum("bhwj,bchj->bchw", row, value)
        return x + self.gamma.to(x.dtype) * seen

    def affinities(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch height width height+width"]:
        """Weights of the positions in each one's column, then in its row, where its own is counted."""
        query, key = self.query(x), self.key(x)
        column = torch.einsum("bchw,bciw->bhwi", query, key)
        row = torch.einsum("bchw,bchj->bhwj", query, key)
        # The least finite number instead of -inf: padding and maps of one row have nothing else to look at.
        least = torch.finfo(column.dtype).min
        itself = torch.eye(x.shape[2], dtype=torch.bool, device=x.device)[:, None]
        column = column.masked_fill(itself | mask.transpose(1, 2)[:, None], least)
        row = row.masked_fill(mask[:, :, None], least)
        return torch.cat((column, row), dim=-1).softmax(-1)

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> Weights:
        """Those of the last recurrence."""
        for _ in range(self.recurrence - 1):
            x = self._once(x, mask)
        height, width = x.shape[2:]
        affinities = self.affinities(x, mask).flatten(1, 2).take_along_dim(token[:, None, None], dim=1)
        column, row = affinities[:, 0].split((height, width), dim=-1)
        own_row, own_column = F.one_hot(token // width, height), F.one_hot(token % width, width)
        return Weights(column[:, :, None] * own_column[:, None] + own_row[:, :, None] * row[:, None])
