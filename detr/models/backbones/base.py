"""What every backbone is."""

from collections.abc import Iterable, Mapping, Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention.placement import Placement, plugged_in

# Of the colors of ImageNet's images, RGB, in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """From normalized images to feature maps. Nothing outside this folder knows which backbone a model has.

    A subclass sets these in its constructor, and says with `modules_of` what a stage is made of:

    channels, strides: of the maps that `forward` gives, largest map first; strides in pixels.
    stages: the names of its stages, in order; attention blocks go after them, and `freeze` takes them.
    layers: the modules that make up nearly all activations, which activation checkpointing computes twice.

    These may stay as they are:

    mean, std: what images are normalized with, RGB, in [0, 1]; ImageNet's.
    size_divisor: height and width of its images are multiples of it; 1.
    """

    channels: list[int]
    strides: list[int]
    stages: tuple[str, ...]
    mean: Sequence[float] | Tensor = IMAGENET_MEAN
    std: Sequence[float] | Tensor = IMAGENET_STD
    size_divisor: int = 1

    def __init__(self) -> None:
        super().__init__()
        self._frozen: list[nn.Module] = []

    @property
    def layers(self) -> Iterable[nn.Module]:
        return ()

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Feature maps (B, channels, H / stride, W / stride), largest first.

        mask: True = padding, which attention blocks must not look at; None where there is none.
        """
        raise NotImplementedError

    def modules_of(self, stage: str) -> Sequence[nn.Module]:
        """What a stage is made of, without attention blocks; nothing for a stage that is not built."""
        raise NotImplementedError

    def depths(self) -> dict[str, int]:
        """How deep each of its parameters is, by name: 0 for the first stage, then as the stages follow.

        Attention blocks are left out: they are new, and no layers of the backbone.
        """
        new = {id(parameter) for blocks in plugged_in(self) for parameter in blocks.parameters()}
        depth = {
            id(parameter): index
            for index, stage in enumerate(self.stages)
            for module in self.modules_of(stage)
            for parameter in module.parameters()
        }
        return {name: depth[id(p)] for name, p in self.named_parameters() if id(p) in depth and id(p) not in new}

    def plug(self, placements: Mapping[str, Placement]) -> None:
        """Add attention blocks. Raises UserError for places that this backbone does not have."""
        for name, placement in placements.items():
            if set(placement.stages) != {"neck"}:
                raise UserError(
                    f"model.attention.{name}.stages: {type(self).__name__} has no places for attention blocks. Choose "
                    "neck."
                )

    def freeze(self, stages: Sequence[str] | None = None) -> None:
        """From now on these stages stay as they are, the statistics of their batch norms too; all unless given.

        Attention blocks in them go on training.
        """
        for stage in self.stages if stages is None else stages:
            self._frozen += [module.requires_grad_(False) for module in self.modules_of(stage)]
        for blocks in plugged_in(self):
            blocks.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for module in self._frozen:
            module.eval()
        for blocks in plugged_in(self):
            blocks.train(mode)
        return self
