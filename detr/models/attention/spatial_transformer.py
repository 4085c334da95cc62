"""Spatial transformer (Jaderberg et al., NeurIPS 2015)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


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

    def transform(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 2 3"]:
        """From places in the transformed map to those in the map, (x, y) in [-1, 1] of its valid part."""
        features = self.features(torch.where(mask[:, None], 0.0, x)).relu().masked_fill(mask[:, None], 0.0)
        width, height = _extents(mask, x.dtype)
        across, down = _places(x.shape[3], width), _places(x.shape[2], height)
        moments = (
            features,
            features * across[:, None, None],
            features * down[:, None, :, None],
        )
        count = width * height
        pooled = torch.cat([moment.sum((2, 3)) / count for moment in moments], dim=1)
        identity = torch.eye(2, 3, dtype=x.dtype, device=x.device)
        return identity + self._limit * self.locate(pooled).tanh().unflatten(1, (2, 3))


def warp(
    x: Float[Tensor, "batch channels height width"],
    theta: Float[Tensor, "batch 2 3"],
    mask: Bool[Tensor, "batch height width"],
) -> Float[Tensor, "batch channels height width"]:
    """The map at the places that theta gives, bilinear, zero outside; (x, y) in [-1, 1] of each image's valid part."""
    width, height = _extents(mask, x.dtype)
    batch, _, rows, columns = x.shape
    across = _places(columns, width)[:, None].expand(batch, rows, columns)
    down = _places(rows, height)[:, :, None].expand(batch, rows, columns)
    places = torch.stack((across, down, torch.ones_like(down)), dim=-1)
    moved = torch.einsum("bij,bhwj->bhwi", theta, places)
    share = torch.cat((width / columns, height / rows), dim=1)[:, None, None]
    return F.grid_sample(x, (moved + 1) * share - 1, align_corners=False)


def inverse(theta: Float[Tensor, "batch 2 3"]) -> Float[Tensor, "batch 2 3"]:
    matrix = torch.linalg.inv(theta[:, :, :2])
    return torch.cat((matrix, -matrix @ theta[:, :, 2:]), dim=2)


def _extents(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Valid width and height of each image, (B, 1)."""
    valid = (~mask).to(dtype)
    return valid[:, 0].sum(1, keepdim=True), valid[:, :, 0].sum(1, keepdim=True)


def _places(size: int, extent: Tensor) -> Float[Tensor, "batch places"]:
    """Centres of cells, in [-1, 1] of the valid extent."""
    return (2 * torch.arange(size, device=extent.device) + 1) / extent - 1
