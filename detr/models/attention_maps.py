"""Where a model looks in an image: the weights of its attention, which running it never keeps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from detr.models.attention.placement import Blocks
from detr.models.attention.views import View, Viewable
from detr.models.detr import DETR
from detr.types import Detections


@dataclass(frozen=True)
class AttentionMaps:
    """Where a detector looks in one image.

    detections: what it found, best first, boxes in pixels of the image.
    point: (x, y) in [0, 1] of the image, the place that `encoder` and the weights in `blocks` are about.
    decoder: (n, h, w) where each of the n detections' queries looks in the last decoder layer.
    encoder: (h, w) where the point's cell looks in the last encoder layer; None without an encoder.
    blocks: what each plugged-in attention block shows, a batch of one, by the module's name in the model.

    h x w are the cells of the largest feature map. Weights on smaller maps are spread evenly over the cells that theirs
    cover, and added. All are means over heads, of what attention multiplies values with; 1 in sum, but for deformable
    attention, which may look beyond the image.
    """

    detections: Detections
    point: tuple[float, float]
    decoder: Float[Tensor, "n height width"]
    encoder: Float[Tensor, "height width"] | None
    blocks: dict[str, View]


@dataclass
class Seen:
    """What `watch` has noted: as in AttentionMaps, the decoder's maps for all queries."""

    decoder: Float[Tensor, "queries height width"] | None = None
    encoder: Float[Tensor, "height width"] | None = None
    blocks: dict[str, View] = field(default_factory=dict)


@contextmanager
def watch(model: DETR, point: tuple[float, float]) -> Iterator[Seen]:
    """Within it, a run of the model on one image is watched: each attention is asked for the weights of what it gets.

    point: (x, y) in [0, 1] of the image.
    """
    seen = Seen()

    def decoder(attention: Any, args: Any) -> None:
        memory = args[-1]
        seen.decoder = on_largest(attention.weights(*args)[0], memory.shapes)

    def encoder(attention: Any, args: Any) -> None:
        (memory,) = args
        weights = attention.weights(memory, token_at(point, *memory.shapes[0]).to(memory.tokens.device))
        seen.encoder = on_largest(weights, memory.shapes)[0]

    def block(name: str) -> Callable[[Any, Any], None]:
        def note(block: Viewable, args: Any) -> None:
            x, mask = args
            view = block.view(x, mask, token_at(point, *x.shape[2:]).to(x.device))
            if view is not None:
                seen.blocks[name] = view

        return note

    watched: list[tuple[Any, Callable[[Any, Any], None]]] = [(model.decoder.used[-1].cross_attn, decoder)]
    watched += [(layer.self_attn, encoder) for layer in model.encoder.layers[-1:]]
    for place, blocks in model.named_modules():
        if isinstance(blocks, Blocks):
            watched += [(b, block(f"{place}.{name}")) for name, b in blocks.items() if isinstance(b, Viewable)]
    with ExitStack() as hooks:
        for module, note in watched:
            hooks.callback(module.register_forward_pre_hook(note).remove)
        yield seen


def token_at(point: tuple[float, float], height: int, width: int) -> Int64[Tensor, " 1"]:
    """The cell, counted row by row, of a map that a point (x, y) in [0, 1] lies in."""
    column, row = (min(int(at * size), size - 1) for at, size in zip(point, (width, height), strict=True))
    return torch.tensor([row * width + column])


def on_largest(
    weights: Float[Tensor, "n tokens"], shapes: Sequence[tuple[int, int]]
) -> Float[Tensor, "n height width"]:
    """Weights on the tokens of all levels added up on a map of the first level's size, where they keep their sums.

    But for rounding, where the sizes of levels are not in proportion.
    """
    levels = weights.split([height * width for height, width in shapes], dim=-1)
    total = weights.new_zeros(len(weights), *shapes[0])
    for level, shape in zip(levels, shapes, strict=True):
        enlarged = F.interpolate(level.unflatten(-1, (1, *shape)), shapes[0], mode="bilinear")[:, 0]
        total += enlarged * (level.shape[-1] / total[0].numel())
    return total
