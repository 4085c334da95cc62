"""What an attention block can show of itself."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """What one position of each image takes from every position, 0 from padding.

    Some blocks' weights are 1 in sum, some are not, some may be negative.
    """

    values: Float[Tensor, "batch height width"]


@dataclass(frozen=True)
class SoftMask:
    """A factor in [0, 1] for each position, or its mean over channels; 0 in padding."""

    values: Float[Tensor, "batch height width"]


@dataclass(frozen=True)
class Gates:
    """A factor for each channel."""

    values: Float[Tensor, "batch channels"]


@dataclass(frozen=True)
class Transform:
    """From places in a transformed map to those in the map that is read, (x, y) in [-1, 1] of its valid part."""

    theta: Float[Tensor, "batch 2 3"]


View = Weights | SoftMask | Gates | Transform


@runtime_checkable
class Viewable(Protocol):
    """What a block has beside `forward` if there is something to see of it, a block of your own too."""

    def view(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"],
        token: Int64[Tensor, " batch"],
    ) -> View | None:
        """What the block does to the map that `forward` gets; None where its options leave nothing to see.

        token: the position that weights are those of, in each image; counted row by row, in the map as it is padded.
        """
        ...
