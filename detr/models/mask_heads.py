"""Heads that make a mask of each query: published DETR's, and a light one of dot products."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.added import Added
from detr.models.layers.mlp import MLP
from detr.models.layers.multihead import check_heads
from detr.models.values import Detail, Memory, extents, masks_for

_GROUPS = 8  # of channels that are normalized together in DETR's head
_QUERIES = 16  # whose masks DETR's head makes at once in inference: together, those of a photograph take gigabytes


class MaskHead(Added):
    """From the last decoder layer's queries to logits of their masks, at the stride of the backbone's finest map.

    boxes: what the queries predict (cxcywh), in [0, 1] of each image without its padding; masks do not train them.

    A head of your own is a subclass, which DETR calls with what `__init__` takes beside its options:

    d_model: of queries and memory. in_channels: of the neck's maps.
    channels, strides: of all maps of the backbone, largest first.
    selected: which of them the neck has, by index.
    """

    def forward(
        self,
        queries: Float[Tensor, "batch queries d_model"],
        boxes: Float[Tensor, "batch queries 4"],
        memory: Memory,
        detail: Detail,
    ) -> Float[Tensor, "batch queries h w"]:
        raise NotImplementedError

    def of_pairs(
        self,
        queries: Float[Tensor, "batch queries d_model"],
        boxes: Float[Tensor, "batch queries 4"],
        memory: Memory,
        detail: Detail,
        image: Int64[Tensor, " pairs"],
        query: Int64[Tensor, " pairs"],
    ) -> Float[Tensor, "pairs h w"]:
        """Those of some queries, which training asks for; to be overridden where that takes less than all of them.

        image, query: by index. Where there is no pair, every parameter takes part all the same.
        """
        return self(queries, boxes, memory, detail)[image, query]


class DETRMaskHead(MaskHead):
    """DETR's (Carion et al., ECCV 2020, section 4.4): where each query looks, enlarged with the backbone's maps.

    Queries attend to the memory of the backbone's last map, and the weights of all heads, which are 1 in sum, become
    channels beside those of that map. Convolutions for each query alone bring them to the finest map, step by step. So
    this head costs as much for each query as others for the whole image. Training makes masks of matched queries alone.

    nhead: of that attention.
    """

    def __init__(
        self,
        *,
        d_model: int,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[int],
        selected: Sequence[int],
        nhead: int = 8,
    ) -> None:
        super().__init__()
        check_heads(self, d_model, nhead)
        self.level, self.nhead, self.in_channels = len(selected) - 1, nhead, in_channels
        self.query_proj, self.key_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        finer = [*channels][: selected[-1]][::-1]
        widths = [in_channels // 2 ** (step + 1) for step in range(len(finer) + 1)]
        multiple = _GROUPS * 2 ** len(widths)
        if in_channels % multiple:
            raise UserError(
                f"DETRMaskHead: wanted channels of the neck as a multiple of {multiple}, for {len(finer)} finer maps, "
                f"got {in_channels}. Change model.encoder.d_model, or choose model/masks=dot_product."
            )
        if nhead % _GROUPS:
            raise UserError(f"DETRMaskHead: wanted nhead as a multiple of {_GROUPS}, got {nhead}.")
        first = in_channels + nhead
        self.first = nn.Conv2d(first, first, kernel_size=3, padding=1)
        self.first_norm = nn.GroupNorm(_GROUPS, first)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in zip([first, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for width in widths)
        self.adapters = nn.ModuleList(nn.Conv2d(a, b, kernel_size=1) for a, b in zip(finer, widths, strict=False))
        self.last = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for linear in (self.query_proj, self.key_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        queries: Float[Tensor, "batch queries d_model"],
        boxes: Float[Tensor, "batch queries 4"],
        memory: Memory,
        detail: Detail,
    ) -> Float[Tensor, "batch queries h w"]:
        parts = []
        for part, of_part in zip(queries.split(_QUERIES, dim=1), boxes.split(_QUERIES, dim=1), strict=True):
            pairs = [torch.arange(count, device=part.device) for count in part.shape[:2]]
            image, query = (index.flatten() for index in torch.meshgrid(*pairs, indexing="ij"))
            masks = self.of_pairs(part, of_part, memory, detail, image, query)
            parts.append(masks.unflatten(0, part.shape[:2]))
        return torch.cat(parts, dim=1)

    def of_pairs(
        self,
        queries: Float[Tensor, "batch queries d_model"],
        boxes: Float[Tensor, "batch queries 4"],
        memory: Memory,
        detail: Detail,
        image: Int64[Tensor, " pairs"],
        query: Int64[Tensor, " pairs"],
    ) -> Float[Tensor, "pairs h w"]:
        if image.shape[0] == 0:
            first = image.new_zeros(1)
            return self.of_pairs(queries, boxes, memory, detail, first, first)[:0]
        # What all queries of an image share is convolved once.
        weight = self.first.weight
        shared = F.conv2d(detail.neck[self.level], weight[:, : self.in_channels], self.first.bias, padding=1)
        x = F.conv2d(self._attention(queries, memory)[image, query], weight[:, self.in_channels :], padding=1)
        x = F.relu(self.first_norm(x + shared[image]))
        finer = self._finer(detail)
        for step, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if step > 0:
                more = self.adapters[step - 1](finer[step - 1])[image]
                x = more + F.interpolate(x, size=more.shape[-2:], mode="nearest")
            x = F.relu(norm(conv(x)))
        return self.last(x)[:, 0]

    def _finer(self, detail: Detail) -> Sequence[Tensor]:
        """The backbone's maps before the one whose memory is attended to, coarsest first."""
        return detail.maps[len(self.adapters) - 1 :: -1] if len(self.adapters) else ()

    def _attention(self, queries: Tensor, memory: Memory) -> Float[Tensor, "batch queries heads h w"]:
        start = sum(height * width for height, width in memory.shapes[: self.level])
        height, width = memory.shapes[self.level]
        tokens = slice(start, start + height * width)
        query, key = (
            proj(x).unflatten(-1, (self.nhead, -1)).transpose(1, 2)
            for proj, x in ((self.query_proj, queries), (self.key_proj, memory.tokens[:, tokens]))
        )
        logits = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).transpose(1, 2)
        if memory.mask is not None:
            logits = logits.masked_fill(memory.mask[:, None, None, tokens], float("-inf"))
        weights = logits.float().flatten(2).softmax(-1).to(logits.dtype)
        return weights.unflatten(-1, (self.nhead, height, width))


class DotProductMaskHead(MaskHead):
    """Dot products of embeddings of queries and of pixels (MaskFormer: Cheng et al., NeurIPS 2021).

    Pixels are the memory of the neck's largest map, with its positions, enlarged step by step with the backbone's finer
    maps, as in a feature pyramid (FPN: Lin et al., CVPR 2017). One embedding serves all queries, so many cost little.
    Padding changes no mask: convolutions see it as zeros, and each cell is normalized alone.

    Dot products hardly tell an object from one of its kind elsewhere. The box does: YOLACT (Bolya et al., ICCV 2019)
    cuts masks off where it ends. Here they fall off outside of it, so that boxes that are a bit wrong do no harm.

    embed_dim: of the embeddings, and of the maps that they are made of.
    falloff: what the logit of a cell loses for each cell between its center and the box; 0: nothing, as in MaskFormer.
    """

    def __init__(
        self,
        *,
        d_model: int,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[int],
        selected: Sequence[int],
        embed_dim: int = 256,
        falloff: float = 8.0,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or falloff < 0:
            raise UserError(
                f"DotProductMaskHead: wanted embed_dim of at least 1 and falloff of at least 0, got {embed_dim} and "
                f"{falloff}."
            )
        self.falloff = falloff
        finer = range(selected[0])[::-1]
        self.factors = [round(strides[index + 1] / strides[index]) for index in finer]
        self.source = nn.Conv2d(d_model, embed_dim, kernel_size=1)
        self.laterals = nn.ModuleList(nn.Conv2d(channels[index], embed_dim, kernel_size=1) for index in finer)
        self.convs = nn.ModuleList(
            nn.Conv2d(embed_dim, embed_dim, kernel_size=3, padding=1) for _ in range(len(finer) + 1)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in self.convs)
        self.pixels = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)
        self.queries = MLP(d_model, d_model, embed_dim, layers=3)

    def forward(
        self,
        queries: Float[Tensor, "batch queries d_model"],
        boxes: Float[Tensor, "batch queries 4"],
        memory: Memory,
        detail: Detail,
    ) -> Float[Tensor, "batch queries h w"]:
        height, width = memory.shapes[0]
        x = self.source(memory.key[:, : height * width].transpose(1, 2).unflatten(2, (height, width)))
        x = self._smoothed(0, x, detail)
        finer = detail.maps[: len(self.laterals)][::-1]
        for step, (lateral, factor, more) in enumerate(zip(self.laterals, self.factors, finer, strict=True), start=1):
            height, width = more.shape[-2:]
            x = F.interpolate(x, scale_factor=float(factor), mode="nearest")[..., :height, :width]
            x = self._smoothed(step, x + lateral(more), detail)
        logits = torch.einsum("bqc,bchw->bqhw", self.queries(queries), self.pixels(x))
        return logits - self.falloff * _cells_outside(boxes.detach(), detail, (x.shape[-2], x.shape[-1]))

    def _smoothed(self, step: int, x: Tensor, detail: Detail) -> Float[Tensor, "batch channels h w"]:
        if detail.mask is not None:
            x = x.masked_fill(masks_for(detail.mask, [x])[0][:, None], 0.0)
        x = self.convs[step](x)
        return F.relu(self.norms[step](x.movedim(1, -1)).movedim(-1, 1))


def _cells_outside(
    boxes: Float[Tensor, "batch queries 4"], detail: Detail, shape: tuple[int, int]
) -> Float[Tensor, "batch queries h w"]:
    """How far each cell's center is outside of each box, along the axis where it is farther, in cells."""
    (height, width), (rows, columns) = detail.size, shape
    boxes = boxes.float()
    scale = torch.tensor([columns, rows], device=boxes.device)
    if detail.mask is not None:
        scale = scale * extents(detail.mask) / torch.tensor([width, height], device=boxes.device)
    center, size = (boxes * scale.repeat(1, 2).unsqueeze(-2)).split(2, dim=-1)
    x, y = (torch.arange(count, device=boxes.device) + 0.5 for count in (columns, rows))
    beyond_x = (x - center[..., :1]).abs() - size[..., :1] / 2
    beyond_y = (y - center[..., 1:]).abs() - size[..., 1:] / 2
    return torch.maximum(beyond_x[..., None, :], beyond_y[..., None]).clamp(min=0)
