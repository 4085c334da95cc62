"""Where attention blocks go: into the backbone's stages, into their residual blocks, or between neck and encoder."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.added import Added

Where = Literal["after", "standard", "pre", "post", "identity"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A kind of attention block and the places that get one of it each.

    block: makes a block of the number of channels there.
    stages: names of the backbone's stages, such as layer1 to layer4 of a ResNet, or stage1 and on of timm's networks;
        `backbone` is all of them that are built, `neck` every map between the input projection and the encoder.
    where: `after` the stage, or in each of its residual blocks relu(F(x) + shortcut): `standard` on F(x), `pre` on what
        goes into F, `post` on the whole block's output, `identity` on the shortcut (Hu et al., CVPR 2018).
    """

    block: Callable[[int], nn.Module]
    stages: Sequence[str]
    where: Where = "after"

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("Placement: wanted stages of the backbone, backbone or neck, got none.")
        if "neck" in self.stages and self.where != "after":
            raise UserError(
                f"Placement: where={self.where} is in residual blocks, of which the neck has none. Leave neck out of "
                "stages, or set where=after."
            )

    def check(self, name: str, built: Sequence[str], known: Sequence[str]) -> None:
        """Raise UserError where a stage is not among those that the backbone knows, or has built.

        name: of the placement, for the message.
        """
        for stage in self.stages:
            if stage in (*built, "backbone", "neck"):
                continue
            reason, remedy = "is no stage of the backbone", ""
            if stage in known:
                reason, remedy = "is not built, because no later map is used", ", or add to model.backbone.features"
            raise UserError(
                f"model.attention.{name}.stages: {stage} {reason}. Choose some of {', '.join(built)}, backbone and "
                f"neck{remedy}."
            )


class Blocks(Added, nn.ModuleDict):
    """The attention blocks of one place by name, one after the other."""

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
    except TypeError as error:
        raise UserError(f"model.attention.{name}.block, for {channels} channels: {error}") from None
    return block
