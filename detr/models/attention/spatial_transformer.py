"""Spatial transformer (Jaderberg et al., NeurIPS 2015)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.masked import masked_mean, precise
from detr.models.attention.views import Transform
from detr.models.values import extents


class SpatialTransformer(nn.Module):
    """x + what a convolution finds in the map seen under a learned affine transform, put back into place.

    A detector must know where things are: a map that stayed transformed would take features away from their boxes. So
    this is a side branch: transform, process, transform back, add. Boxes need no mapping. The padding is transformed
    with the map, in the frame of each image's valid part.

    hidden: features that the transform is worked out from, by their means and where in the map they are.
    """

    _limit = 0.49  # of each entry's distance from the identity: such a matrix can always be inverted

    def __init__(self, channels: int, *, hidden: int = 32) -> None:
        super().__init__()
        if hidden < 1:
            raise UserError(f"SpatialTransformer: wanted hidden of at least 1, got {hidden}.")
        self.features = nn.Conv2d(channels, hidden, kernel_size=1)
        self.locate = nn.Linear(3 * hidden, 6)
        self.process = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.out = nn.Conv2d(channels, channels, kernel_size=1)
        for parameter in (*self.locate.parameters(), *self.out.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        theta = self.transform(x, mask)
        valid = (~mask)[:, None].to(x.dtype)
        seen = warp(torch.where(mask[:, None], 0.0, x), theta, mask)
        found = self.process(seen * valid).relu() * warp(valid, theta, mask) * valid
        return x + self.out(warp(found, inverse(theta), mask))

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> Transform:
        return Transform(self.transform(x, mask))

    def transform(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 2 3"]:
        """From places in the transformed map to those in the map, (x, y) in [-1, 1] of its valid part."""
        features = self.features(torch.where(mask[:, None], 0.0, x)).relu()
        across, down = _places(mask, x.dtype)
        moments = (features, features * across[:, None], features * down[:, None])
        pooled = torch.cat([masked_mean(moment, mask) for moment in moments], dim=1)
        change = self._limit * precise(self.locate(pooled)).tanh().unflatten(1, (2, 3))
        return torch.eye(2, 3, dtype=change.dtype, device=x.device) + change


def warp(
    x: Float[Tensor, "batch channels height width"],
    theta: Float[Tensor, "batch 2 3"],
    mask: Bool[Tensor, "batch height width"],
) -> Float[Tensor, "batch channels height width"]:
    """The map at the places that theta gives, bilinear, zero outside; (x, y) in [-1, 1] of each image's valid part."""
    across, down = _places(mask, theta.dtype)
    of_x, of_y, shift = theta[:, None, None].unbind(-1)
    moved = of_x * across[..., None] + of_y * down[..., None] + shift
    share = extents(mask).to(theta.dtype) / torch.tensor([x.shape[3], x.shape[2]], device=x.device)
    points = (moved + 1) * share[:, None, None] - 1
    return F.grid_sample(x.to(theta.dtype), points, align_corners=False).to(x.dtype)


def inverse(theta: Float[Tensor, "batch 2 3"]) -> Float[Tensor, "batch 2 3"]:
    # By the rule for 2 x 2: ONNX has no inverse of a matrix.
    (a, b), (c, d) = (row.unbind(-1) for row in theta[:, :, :2].unbind(1))
    matrix = torch.stack((d, -b, -c, a), dim=-1).unflatten(-1, (2, 2)) / (a * d - b * c)[:, None, None]
    shift = -(matrix * theta[:, None, :, 2]).sum(2, keepdim=True)
    return torch.cat((matrix, shift), dim=2)


def _places(mask: Tensor, dtype: torch.dtype) -> tuple[Float[Tensor, "batch 1 width"], Float[Tensor, "batch height 1"]]:
    """x of each column's center and y of each row's, in [-1, 1] of what is not padding."""
    extent = extents(mask).clamp(min=1).to(dtype)
    down, across = (2 * torch.arange(size, device=mask.device) + 1 for size in mask.shape[1:])
    return (across / extent[:, :1] - 1)[:, None], (down / extent[:, 1:] - 1)[:, :, None]
