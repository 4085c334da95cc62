"""Non-local block (Wang et al., CVPR 2018)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.masked import attend, attention_weights, precise, reduced, tokens
from detr.models.attention.views import Weights


class NonLocal(nn.Module):
    """x + W(y), where y at each position is a sum over all positions, weighted by how the two fit.

    mode: how they fit: `gaussian` softmax of the products of x; `embedded_gaussian` of its projections; `dot_product`
        of these without softmax; `concatenation` relu of a projection of both. The last two are divided by the number
        of positions that are summed, and need no map of all pairs.
    reduction: projections have channels / reduction features.
    sub_sample: sum over a map pooled to a half: `after` the projections, `before` them (the paper's code), or `none`.
    scale: divide products by the root of their features before the softmax (the paper's code).
    norm: of W(y): `none`; `batch`, whose statistics in training count padding as zeros; `group`, which leaves it out.
    """

    def __init__(
        self,
        channels: int,
        *,
        mode: Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"] = "embedded_gaussian",
        reduction: int = 2,
        sub_sample: Literal["none", "before", "after"] = "none",
        scale: bool = False,
        norm: Literal["none", "batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        inner = reduced(channels, reduction)
        self.mode, self.sub_sample = mode, sub_sample
        self.scale = (channels if mode == "gaussian" else inner) ** -0.5 if scale else 1.0
        self.g = nn.Conv2d(channels, inner, kernel_size=1)
        self.theta = self.phi = None
        if mode != "gaussian":
            self.theta = nn.Conv2d(channels, inner, kernel_size=1)
            self.phi = nn.Conv2d(channels, inner, kernel_size=1)
        self.concat = nn.Linear(2 * inner, 1, bias=False) if mode == "concatenation" else None
        if norm == "group" and channels % 32:
            raise UserError(f"NonLocal: group norm needs a multiple of 32 channels, got {channels}. Set norm=batch.")
        self.out = nn.Linear(inner, channels)
        norms: dict[str, type[nn.Module]] = {"none": nn.Identity, "batch": nn.BatchNorm2d, "group": MaskedGroupNorm}
        self.norm = norms[norm](channels)
        for parameter in (self.out if norm == "none" else self.norm).parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        theta, phi, g, valid = self._sequences(x, mask)
        nothing = ~valid.any(1)
        y = self._sum(theta, phi, g, valid | nothing[:, None])
        out = self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])
        # Norms shall not see what the padding holds, nor a view of one map, for which torch's batch norm has wrong
        # gradients; and nothing is added where there is nothing to sum over.
        out = out.masked_fill((mask | nothing[:, None, None])[:, None], 0.0)
        return x + (self.norm(out, mask) if isinstance(self.norm, MaskedGroupNorm) else self.norm(out))

    def view(self, x: Tensor, mask: Tensor, token: Tensor) -> Weights:
        """Of a pooled map's cells, each of the four positions that were pooled has a quarter of the weight."""
        theta, phi, _, valid = self._sequences(x, mask)
        theta = theta.take_along_dim(token[:, None, None], dim=1)
        weights = self._weights(theta, phi, valid)[:, 0]
        height, width = x.shape[2:]
        if self.sub_sample == "none":
            return Weights(weights.unflatten(1, (height, width)))
        cells = weights.unflatten(1, (1, (height + 1) // 2, (width + 1) // 2)) / 4
        return Weights(F.interpolate(cells, scale_factor=2.0)[:, 0, :height, :width])

    def _sequences(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta for each position, phi and g for each that is summed, and whether that is valid."""
        valid = ~mask
        source = _pooled(x) if self.sub_sample == "before" else x
        g = self.g(source)
        theta = x if self.theta is None else self.theta(x)
        phi = source if self.phi is None else self.phi(source)
        if self.sub_sample == "after":
            g, phi = _pooled(g), _pooled(phi)
        if self.sub_sample != "none":
            # Only of four positions: at the edge of an odd map there are fewer, and of an image as small, none.
            valid = F.avg_pool2d(valid.to(x.dtype), 2, ceil_mode=True, divisor_override=4) == 1
        return tokens(theta), tokens(phi), tokens(g), valid.flatten(1)

    def _sum(self, theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor) -> Float[Tensor, "batch tokens inner"]:
        if self.mode in ("gaussian", "embedded_gaussian"):
            return attend(theta, phi, g, valid, scale=self.scale)
        count = valid.sum(1)[:, None, None]
        g = torch.where(valid[..., None], g / count, 0.0)  # sums over a whole map would be too large for float16
        if self.mode == "dot_product":
            return theta @ (torch.where(valid[..., None], phi, 0.0).transpose(1, 2) @ g)
        return _relu_sum(*self._terms(theta, phi), g)

    def _weights(self, theta: Tensor, phi: Tensor, valid: Tensor) -> Float[Tensor, "batch targets sources"]:
        """Those of g in `_sum`, which never makes them."""
        count = valid.sum(1)[:, None, None].clamp(min=1)
        if self.mode == "concatenation":
            a, b = self._terms(theta, phi)
            weights = (a[:, :, None] + b[:, None]).relu() / count
        elif self.mode == "dot_product":
            weights = theta @ phi.transpose(1, 2) / count
        else:
            weights = attention_weights(theta, phi, valid, scale=self.scale)
        return weights.masked_fill(~valid[:, None], 0.0)

    def _terms(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """The projection of a pair is a sum of two numbers, one of each."""
        assert self.concat is not None
        of_theta, of_phi = self.concat.weight[0].chunk(2)
        return theta @ of_theta, phi @ of_phi


def _pooled(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _relu_sum(a: Tensor, b: Tensor, g: Tensor) -> Float[Tensor, "batch queries inner"]:
    """The sum over j of relu(a_i + b_j) g_j, for each i.

    With b in falling order the terms above zero are the first ones, so that sums of the first terms are all it takes.
    """
    b, order = b.sort(dim=1, descending=True)
    g = g.gather(1, order[..., None].expand_as(g))
    start = g.new_zeros(g.shape[0], 1, g.shape[-1])
    sums, products = (torch.cat((start, part.cumsum(1)), dim=1) for part in (g, b[..., None] * g))
    number = torch.searchsorted(-b.detach().contiguous(), a.detach().contiguous())[..., None].expand(
        -1, -1, g.shape[-1]
    )
    return a[..., None] * sums.gather(1, number) + products.gather(1, number)


class MaskedGroupNorm(nn.Module):
    """Group norm (Wu & He, ECCV 2018) with statistics of what is not padding; 32 groups."""

    groups, eps = 32, 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        grouped = precise(x).unflatten(1, (self.groups, -1))
        valid = (~mask)[:, None, None]
        count = valid.sum((2, 3, 4), keepdim=True).clamp(min=1) * grouped.shape[2]
        mean = (grouped * valid).sum((2, 3, 4), keepdim=True) / count
        variance = ((grouped - mean).square() * valid).sum((2, 3, 4), keepdim=True) / count
        standard = ((grouped - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (standard * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)
