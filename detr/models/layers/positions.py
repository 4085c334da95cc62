"""Positional encodings of a feature map's cells."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.rows import Rowed, Rows


def sine_embedding(
    x: Float[Tensor, "*batch"], features: int, *, temperature: float = 10000.0
) -> Float[Tensor, "*batch {features}"]:
    """Sines and cosines, in turn, of angles in radians over wave lengths from 2 pi to 2 pi * temperature."""
    exponent = 2 * torch.arange(features // 2, device=x.device, dtype=torch.float32) / features
    angle = x.unsqueeze(-1) / temperature**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def anchor_embedding(anchors: Float[Tensor, "*batch dims"], features: int) -> Float[Tensor, "*batch embedded"]:
    """Points (x, y) or boxes (cxcywh) in [0, 1] embedded as SinePosition embeds cells: y, x and then w, h."""
    order = [1, 0, 2, 3][: anchors.shape[-1]]
    return sine_embedding(anchors[..., order] * (2 * math.pi), features).flatten(-2)


class SinePosition(nn.Module):
    """Fixed sines and cosines of the cell's row and column (Vaswani et al. 2017; in 2-d by Carion et al. 2020).

    The first half of the channels encodes y, the second x. Padding is not counted, so that an image's encoding does
    not depend on what it is batched with.

    d_model: channels of the encoding, a multiple of 4.
    temperature: wave lengths grow from 2 pi to 2 pi * temperature.
    normalize: count cells in [0, 2 pi] over the image instead of in cells.
    center: encode the middle of a cell, as Deformable DETR does, instead of its far edge; needs normalize.
    """

    _eps = 1e-6

    def __init__(
        self, *, d_model: int, temperature: float = 10000.0, normalize: bool = True, center: bool = False
    ) -> None:
        super().__init__()
        if d_model % 4:
            raise UserError(f"SinePosition: wanted d_model as a multiple of 4, got {d_model}.")
        if center and not normalize:
            raise UserError("SinePosition: center needs normalize. Set normalize=true.")
        self.d_model, self.temperature, self.normalize = d_model, temperature, normalize
        self.offset = 0.5 if center else 0.0

    def forward(self, mask: Bool[Tensor, "batch height width"]) -> Float[Tensor, "batch d_model height width"]:
        """mask: True = padding."""
        valid = (~mask).float()
        y, x = valid.cumsum(1), valid.cumsum(2)
        if self.normalize:
            y = (y - self.offset) / (y[:, -1:, :] + self._eps) * (2 * math.pi)
            x = (x - self.offset) / (x[:, :, -1:] + self._eps) * (2 * math.pi)
        y, x = (sine_embedding(axis, self.d_model // 2, temperature=self.temperature) for axis in (y, x))
        return torch.cat((y, x), dim=-1).permute(0, 3, 1, 2)


class SinCosPosition(nn.Module):
    """Sines, then cosines, of row and column, counted from 0 (MoCo v3: Chen et al., ICCV 2021; RT-DETR).

    The channels are [sin y, cos y, sin x, cos x]; padding at the right and bottom does not change them.

    d_model: channels of the encoding, a multiple of 4.
    temperature: wave lengths grow from 2 pi to 2 pi * temperature.
    transposed: count cells column by column, as RT-DETR's published code does while its tokens go row by row. That
        scrambles the positions of a map that is not square, and changes nothing for one that is; to be equal to it.
    """

    def __init__(self, *, d_model: int, temperature: float = 10000.0, transposed: bool = False) -> None:
        super().__init__()
        if d_model % 4:
            raise UserError(f"SinCosPosition: wanted d_model as a multiple of 4, got {d_model}.")
        self.d_model, self.temperature, self.transposed = d_model, temperature, transposed

    def forward(self, mask: Bool[Tensor, "batch height width"]) -> Float[Tensor, "batch d_model height width"]:
        """mask: True = padding; its content does not matter here."""
        batch, height, width = mask.shape
        cell = torch.arange(height * width, device=mask.device)
        length = height if self.transposed else width
        line = cell // length
        embedded = [
            sine_embedding(axis.float(), self.d_model // 2, temperature=self.temperature)
            for axis in (line, cell - line * length)  # a remainder by a symbol cannot be exported to ONNX
        ]
        # From sines and cosines in turn to first the ones, then the others.
        y, x = (axis.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(1) for axis in embedded)
        return torch.cat((y, x), dim=-1).T.unflatten(1, (height, width)).expand(batch, -1, -1, -1)


class LearnedPosition(Rowed):
    """A learned vector for each column and each row, concatenated (Carion et al. 2020, appendix A.4).

    d_model: channels of the encoding, even.
    size: rows and columns in the tables. A larger feature map gets an error, because there is nothing learned for it.
    """

    def __init__(self, *, d_model: int, size: int = 50) -> None:
        super().__init__()
        self.size = size
        self.row_embed = nn.Embedding(size, d_model // 2)
        self.col_embed = nn.Embedding(size, d_model // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def rows(self) -> dict[str, Rows]:
        return {f"{name}.weight": Rows("cells") for name in ("row_embed", "col_embed")}

    def forward(self, mask: Bool[Tensor, "batch height width"]) -> Float[Tensor, "batch d_model height width"]:
        """mask: True = padding; its content does not matter here."""
        batch, height, width = mask.shape
        if max(height, width) > self.size:
            raise UserError(
                f"LearnedPosition: wanted a feature map of at most {self.size} x {self.size} cells, got "
                f"{height} x {width}. Use smaller images (data.max_size), a larger model.encoder.position.size when "
                "training from scratch, or model/encoder/position=sine."
            )
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        columns = self.col_embed.weight[None, :width].expand(height, -1, -1)
        return torch.cat((columns, rows), dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)
