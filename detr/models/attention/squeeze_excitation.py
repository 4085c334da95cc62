"""Squeeze-and-excitation (Hu et al., CVPR 2018)."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.models.attention.masked import masked_mean, reduced
from detr.models.attention.views import Gates


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) that two layers make of all channels' means.

    reduction: the hidden layer has channels / reduction features.
    bias: of both layers; the paper's code has them, most ports do not.
    identity_start: gates are doubled and start at 1, instead of about 0.5, which would halve a pre-trained map.
    """

    def __init__(self, channels: int, *, reduction: int = 16, bias: bool = False, identity_start: bool = True) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        self.squeeze, self.excite = nn.Linear(channels, hidden, bias=bias), nn.Linear(hidden, channels, bias=bias)
        self.gain = 2.0 if identity_start else 1.0
        if identity_start:
            nn.init.zeros_(self.excite.weight)
            if bias:
                nn.init.zeros_(self.excite.bias)

    def gates(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels"]:
        """The factor on each channel; means are over what is not padding."""
        return self.gain * self.excite(self.squeeze(masked_mean(x, mask)).relu()).sigmoid()

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return x * self.gates(x, mask)[..., None, None]

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> Gates:
        return Gates(self.gates(x, mask))
