"""Where attention blocks go: into the backbone's stages, into their residual blocks, or between neck and encoder."""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError

Place = Literal["layer1", "layer2", "layer3", "layer4", "backbone", "neck"]
Where = Literal["after", "standard", "pre", "post", "identity"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A kind of attention block and the places that get one of it each.

    block: makes a block of the number of channels there.
    stages: layer1 to layer4 of the backbone; `backbone` is all of them that are built, `neck` every map between the
        input projection and the encoder.
    where: `after` the stage, or in each of its residual blocks relu(F(x) + shortcut): `standard` on F(x), `pre` on what
        goes into F, `post` on the whole block's output, `identity` on the shortcut (Hu et al., CVPR 2018).
    """

    block: Callable[[int], nn.Module]
    stages: Sequence[Place]
    where: Where = "after"

    def __post_init__(self) -> None:
        places = typing.get_args(Place)
        if not self.stages or not set(self.stages) <= set(places):
            raise UserError(
                f"Placement: wanted stages as some of {', '.join(places)}, got {list(self.stages)}. Correct "
                "model.attention.NAME.stages."
            )
        if "neck" in self.stages and self.where != "after":
            raise UserError(
                f"Placement: where={self.where} is in residual blocks, of which the neck has none. Leave neck out of "
                "model.attention.NAME.stages, or set where=after."
            )


class Blocks(nn.ModuleDict):
    """The attention blocks of one place by name, one after the other. They train with the main learning rate."""

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """mask: True = padding."""
        for name, block in self.items():
            shape = x.shape
            x = block(x, mask)
            if x.shape != shape:
                raise UserError(
                    f"model.attention.{name}: its block made {tuple(x.shape)} of a map of shape {tuple(shape)}. "
                    "Return a map of the same shape."
                )
        return x


def blocks_for(placements: Mapping[str, Placement], stage: str, where: str, channels: int) -> Blocks:
    """New blocks for one place, of all placements that name it. Raises UserError where one cannot be made."""
    named = {stage} if stage == "neck" else {stage, "backbone"}
    return Blocks(
        {
            name: _made(name, placement, channels)
            for name, placement in placements.items()
            if named & set(placement.stages) and placement.where == where
        }
    )


def _made(name: str, placement: Placement, channels: int) -> nn.Module:
    try:
        block = placement.block(channels)
        inspect.signature(block.forward).bind("x", "mask")
    except (UserError, TypeError) as error:
        raise UserError(f"model.attention.{name}.block, for {channels} channels: {error}") from None
    return block


def plugged_in(module: nn.Module) -> Iterator[Blocks]:
    """The blocks of all places inside a module."""
    return (part for part in module.modules() if isinstance(part, Blocks))
