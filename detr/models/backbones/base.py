"""What every backbone is."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detr.contents import Misfit, refuse_non_finite, state_dict
from detr.errors import UserError
from detr.files import read_tensors
from detr.models.added import added_to
from detr.models.attention.placement import Placement

# Of the colors of ImageNet's images, RGB, in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

WEIGHT_FILES = (".pth", ".pt", ".safetensors")


class Backbone(nn.Module):
    """From normalized images to feature maps. Nothing outside this folder knows which backbone a model has.

    A subclass sets these in its constructor, and says with `modules_of` what a stage is made of:

    channels, strides: of the maps that `forward` gives, largest map first; strides in pixels.
    stages: the names of its stages, in order; attention blocks go after them, and `freeze` takes them.
    layers: the modules that make up nearly all activations, which activation checkpointing computes twice.

    These may stay as they are:

    mean, std: buffers, what images are normalized with, RGB, in [0, 1]; ImageNet's. They are persistent where weights
        may need others, so that a checkpoint has those of its weights.
    size_divisor: height and width of its images are multiples of it; 1.
    selected: which of its maps the neck gets, by index; all. Heads of masks get the others too.
    """

    channels: list[int]
    strides: list[int]
    stages: tuple[str, ...]
    mean: Float[Tensor, "3"]
    std: Float[Tensor, "3"]
    size_divisor: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD), persistent=False)
        self._frozen: list[nn.Module] = []

    @property
    def layers(self) -> Iterable[nn.Module]:
        return ()

    @property
    def selected(self) -> list[int]:
        return list(range(len(self.channels)))

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Feature maps (B, channels, H / stride, W / stride), largest first.

        mask: True = padding, which attention blocks must not look at; None where there is none.
        """
        raise NotImplementedError

    def modules_of(self, stage: str) -> Sequence[nn.Module]:
        """What a stage is made of, maybe with attention blocks inside; nothing for a stage that is not built."""
        raise NotImplementedError

    def parameters_of(self, stage: str) -> list[nn.Parameter]:
        """Those of a stage, without what is added to it."""
        new = {id(parameter) for part in added_to(self) for parameter in part.parameters()}
        return [p for module in self.modules_of(stage) for p in module.parameters() if id(p) not in new]

    def depths(self) -> dict[str, int]:
        """How deep each of its parameters is, by name: 0 for the first stage, then as the stages follow.

        What is added, such as attention blocks, is left out: it is no layer of the backbone.
        """
        depth = {id(p): index for index, stage in enumerate(self.stages) for p in self.parameters_of(stage)}
        return {name: depth[id(p)] for name, p in self.named_parameters() if id(p) in depth}

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

        What is added to them, such as attention blocks, goes on training. Raises UserError for unknown stages.
        """
        for stage in self.stages if stages is None else stages:
            if stage not in self.stages:
                raise UserError(f"freeze: wanted some of the stages {', '.join(self.stages)}, got '{stage}'.")
            self._frozen += self.modules_of(stage)
            for parameter in self.parameters_of(stage):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for module in self._frozen:
            module.eval()
        for part in added_to(self):
            part.train(mode)
        return self


def stages_for(features: Sequence[str | int], strides: Mapping[str, int], owner: str) -> list[str]:
    """The stages whose maps are wanted, by name or by stride in pixels; the same for all backbones.

    strides: of all stages, in their order. owner: the backbone, for messages. Raises UserError where there are no such
    stages, where several have the stride, and where the order is another one.
    """
    found = [[stage for stage in strides if feature in (stage, strides[stage])] for feature in features]
    chosen = [stages[0] for stages in found if len(stages) == 1]
    if not found or len(chosen) < len(found) or chosen != [stage for stage in strides if stage in chosen]:
        there = ", ".join(f"{stage} ({stride})" for stage, stride in strides.items())
        raise UserError(
            f"{owner}: wanted features as some of its stages by name, or by stride where one alone has it, in this "
            f"order: {there}; got {list(features)}. Correct features."
        )
    return chosen


def with_detail(chosen: Sequence[str], strides: Mapping[str, int], detail: int | None) -> list[str]:
    """The chosen stages, and all others from stride `detail` up to the last of them; none where it is None."""
    order = list(strides)
    before = order[: order.index(chosen[-1]) + 1]
    return [stage for stage in before if stage in chosen or (detail is not None and strides[stage] >= detail)]


def is_file(weights: str) -> bool:
    """Whether `weights` is the path of a file, which may be missing, and not a name of pre-trained weights."""
    return weights.endswith(WEIGHT_FILES) or Path(weights).exists()


def read_state_dict(path: str, owner: str) -> dict[str, Tensor]:
    """The weights in a file, by name. owner: the backbone, for messages. Raises UserError where it holds none."""
    try:
        content = read_tensors(path)
    except UserError as error:
        raise UserError(f"weights: {error}") from None
    state = content.get("state_dict", content.get("model", content))
    try:
        state_dict(state, "")
    except Misfit as misfit:
        raise UserError(f"{owner}: {path} does not hold a state dict, since it {misfit}. Correct weights.") from None
    refuse_non_finite(state, f"weights: {path}")
    return {key.removeprefix("module."): value for key, value in state.items()}
