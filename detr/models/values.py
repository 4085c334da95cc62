"""What passes between the parts of a detector: the memory of the encoder, and the queries of the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def extents(mask: Bool[Tensor, "batch height width"]) -> Int64[Tensor, "batch 2"]:
    """Width and height of what is not padding, from its first row and column: padding is at the right and bottom."""
    return torch.stack(((~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)), dim=-1)


@dataclass(frozen=True)
class Memory:
    """Feature maps of one or several scales as one sequence: level after level, each row by row.

    tokens: (B, S, d_model), S cells of all maps.
    position: (B, S, d_model) their positional encodings.
    mask: (B, S) True = padding; None where there is none, which lets faster kernels run.
    shapes: (height, width) of each level.
    sizes: (levels, 2) the same as a tensor, (width, height).
    valid_ratios: (B, levels, 2) which share of each map's width and height is not padding.
    centers: (B, S, 2) center (x, y) of each token's cell, in [0, 1] of its image without padding and beyond 1 in that.
    detail: for a head of masks, where there is one.
    """

    tokens: Float[Tensor, "batch tokens d_model"]
    position: Float[Tensor, "batch tokens d_model"]
    mask: Bool[Tensor, "batch tokens"] | None
    shapes: tuple[tuple[int, int], ...]
    sizes: Int64[Tensor, "levels 2"]
    valid_ratios: Float[Tensor, "batch levels 2"]
    centers: Float[Tensor, "batch tokens 2"]
    detail: "Detail | None" = None

    @classmethod
    def from_maps(
        cls,
        maps: Sequence[Float[Tensor, "batch d_model _ _"]],
        positions: Sequence[Float[Tensor, "batch d_model _ _"]] | None,
        masks: Sequence[Bool[Tensor, "batch _ _"]],
        *,
        padded: bool,
    ) -> "Memory":
        """positions: None for none, which are zeros. masks: True = padding. padded: whether they hold any True."""
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in maps)
        sizes = torch.tensor([(width, height) for height, width in shapes], device=maps[0].device)
        valid = torch.stack([extents(mask) for mask in masks], dim=1)
        tokens = _flatten(maps)
        return cls(
            tokens=tokens,
            position=tokens.new_zeros(()).expand_as(tokens) if positions is None else _flatten(positions),
            mask=torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None,
            shapes=shapes,
            sizes=sizes,
            valid_ratios=valid / sizes,
            centers=torch.cat([_centers(*shape, valid[:, i]) for i, shape in enumerate(shapes)], dim=1),
        )

    @property
    def key(self) -> Float[Tensor, "batch tokens d_model"]:
        """Tokens with their positions added."""
        return self.tokens + self.position

    @property
    def keep(self) -> Bool[Tensor, "batch 1 1 tokens"] | None:
        """True where a token may be attended to."""
        return None if self.mask is None else ~self.mask[:, None, None, :]

    def on_levels(self, anchors: Float[Tensor, "batch queries dims"]) -> Float[Tensor, "batch queries levels dims"]:
        """Points (x, y) or boxes (cxcywh) in [0, 1] of the image without padding, in [0, 1] of each padded map."""
        ratios = self.valid_ratios.repeat(1, 1, anchors.shape[-1] // 2)
        return anchors[:, :, None] * ratios[:, None]


@dataclass(frozen=True)
class Detail:
    """What heads of masks see beside the memory.

    maps: of the backbone, all that it gives, largest first. neck: what the neck makes of some of them.
    mask: (B, H, W) True = padding of the images; None where there is none.
    size: (height, width) in pixels of the images with their padding.
    """

    maps: Sequence[Float[Tensor, "batch _ _ _"]]
    neck: Sequence[Float[Tensor, "batch _ _ _"]]
    mask: Bool[Tensor, "batch height width"] | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Queries:
    """What the decoder starts from.

    content: (B, Q, d_model) what is known of the objects.
    anchors: (B, Q, 2 or 4) where they are expected, points (x, y) or boxes (cxcywh) in [0, 1]; None: nowhere.
    position: positional embeddings (B, Q, d_model) of the queries, given their anchors before each layer.
    keep: True where a query (row) may attend to another in self-attention; None where all may.
    """

    content: Float[Tensor, "batch queries d_model"]
    anchors: Float[Tensor, "batch queries dims"] | None
    position: Callable[[Tensor | None], Tensor]
    keep: Bool[Tensor, "#batch 1 queries queries"] | None = None


@dataclass(frozen=True)
class QueryPositions:
    """Where the queries are before a layer.

    position: (B, Q, d_model) their positional embeddings.
    anchors: (B, Q, 2 or 4) as in Queries.
    spatial: (B, Q, d_model) their spatial queries, of conditional attention only.
    """

    position: Float[Tensor, "batch queries d_model"]
    anchors: Float[Tensor, "batch queries dims"] | None
    spatial: Float[Tensor, "batch queries d_model"] | None = None


@dataclass(frozen=True)
class Refinement:
    """The boxes of one layer of FineDecoder, and how they came about (D-FINE: Peng et al., ICLR 2025).

    start: (B, Q, 4) the boxes (cxcywh) whose edges move.
    distributions: (B, Q, 4, N + 1) logits of how far the left, top, right and bottom edges move, as in `detr.edges`.
    boxes: (B, Q, 4) the boxes with their edges where they are expected.
    """

    start: Float[Tensor, "batch queries 4"]
    distributions: Float[Tensor, "batch queries 4 bins"]
    boxes: Float[Tensor, "batch queries 4"]


def _centers(height: int, width: int, valid: Tensor) -> Tensor:
    y, x = torch.meshgrid(
        torch.arange(height, device=valid.device) + 0.5, torch.arange(width, device=valid.device) + 0.5, indexing="ij"
    )
    return torch.stack((x, y), dim=-1).flatten(0, 1) / valid[:, None]


def _flatten(maps: Sequence[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def masks_for(mask: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """An image mask (B, H, W) brought to the size of each map, by the nearest pixel."""
    image = mask[:, None].float()
    return [F.interpolate(image, size=level.shape[-2:])[:, 0].bool() for level in maps]
