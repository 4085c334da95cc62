"""From the backbone's feature maps to the encoder's."""

from collections.abc import Sequence
from typing import Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from detr.errors import UserError


class ChannelMapper(nn.Module):
    """A 1x1 convolution for each map of the backbone, and smaller maps by strided 3x3 convolutions on the last one.

    One map without norm is DETR's input projection (Carion et al., ECCV 2020), four with group norm are those of
    Deformable DETR (Zhu et al., ICLR 2021).

    in_channels: channels of the backbone's maps.
    num_levels: number of maps to make, at least as many as the backbone gives.
    norm: group norm after each convolution; or `batch`: batch norm, after convolutions without bias (RT-DETR: Zhao et
        al., CVPR 2024).
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        d_model: int,
        num_levels: int = 1,
        norm: bool | Literal["batch"] = False,
    ) -> None:
        super().__init__()
        if num_levels < len(in_channels):
            raise UserError(
                f"ChannelMapper: wanted num_levels of at least {len(in_channels)}, one for each map of the backbone, "
                f"got {num_levels}. Raise num_levels, or let the backbone give fewer maps."
            )
        extra = [in_channels[-1], *[d_model] * num_levels][: num_levels - len(in_channels)]
        bias = norm != "batch"
        convolutions = [nn.Conv2d(channels, d_model, kernel_size=1, bias=bias) for channels in in_channels]
        convolutions += [
            nn.Conv2d(channels, d_model, kernel_size=3, stride=2, padding=1, bias=bias) for channels in extra
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(convolution, *([_norm(norm, d_model)] if norm else [])) for convolution in convolutions
        )
        if norm is True:
            self.apply(_initialize)

    def forward(self, maps: Sequence[Float[Tensor, "batch _ _ _"]]) -> list[Float[Tensor, "batch d_model _ _"]]:
        """maps: largest first. Returns num_levels maps, largest first."""
        mapped = [level(x) for level, x in zip(self.levels, maps, strict=False)]
        x = maps[-1]
        for level in self.levels[len(maps) :]:
            x = level(x)
            mapped.append(x)
        return mapped


def _norm(kind: bool | str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(32, channels)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(cast(Tensor, module.bias))
