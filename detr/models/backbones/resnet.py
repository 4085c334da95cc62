"""ResNet backbones (He et al., CVPR 2016) from torchvision, cut before the classifier."""

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detr.errors import UserError
from detr.models.attention.placement import Blocks, Placement, blocks_for
from detr.models.backbones.base import Backbone, is_file, read_state_dict, stages_for, with_detail
from detr.models.values import masks_for

Stage = Literal["stem", "layer1", "layer2", "layer3", "layer4"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)[1:]  # of residual blocks, with strides 4, 8, 16 and 32


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine parameters, kept as buffers: a linear map that never trains."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def _group_norm(num_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, num_channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "group": _group_norm,
}


class ResNet(Backbone):
    """A ResNet that maps images to the features of its last stage, or of several stages.

    name: a ResNet of torchvision: resnet18, resnet34, resnet50, resnet101.
    weights: torchvision's name of pre-trained weights (such as IMAGENET1K_V1), a path to a state dict, or None for
        random weights.
    norm: `frozen` batch norm, for pre-trained weights; `batch` and `group` norms train, which random weights need.
    dilation: the last stage dilates instead of striding (the DC5 variants), for stride 16 instead of 32;
        ResNet-50 and larger only.
    freeze: stages that do not train; published DETR freezes stem and layer1.
    features: stages whose output is given, in order, by name or stride; what comes after the last of them is not built.
        Strides are 4, 8, 16 and 32 from layer1 to layer4.
    detail: a stride, from which on the maps of all stages are given too, for a head of masks; None: no others.
    """

    def __init__(
        self,
        *,
        name: str = "resnet50",
        weights: str | None = None,
        norm: Literal["frozen", "batch", "group"] = "frozen",
        dilation: bool = False,
        freeze: Sequence[Stage] = ("stem", "layer1"),
        features: Sequence[Stage | int] = ("layer4",),
        detail: int | None = None,
    ) -> None:
        super().__init__()
        choices = [model for model in torchvision.models.list_models(torchvision.models) if model.startswith("resnet")]
        if name not in choices:
            raise UserError(f"ResNet: wanted name as one of {', '.join(choices)}, got '{name}'.")
        if dilation and name in ("resnet18", "resnet34"):
            raise UserError(f"ResNet: dilation needs resnet50 or larger, got {name}. Set dilation=false.")
        self.body = self._network(name, NORMS[norm], dilation)
        order: list[str] = [*STAGES]
        strides = {stage: min(4 * 2**index, 16 if dilation else 32) for index, stage in enumerate(order)}
        chosen, self.stages = stages_for(features, strides, "ResNet"), typing.get_args(Stage)
        self.features = with_detail(chosen, strides, detail)
        self._selected = [self.features.index(stage) for stage in chosen]
        self.strides = [strides[stage] for stage in self.features]
        unused = order[order.index(self.features[-1]) + 1 :]
        self.channels = [64 * 2 ** order.index(stage) * self.body.layer1[0].expansion for stage in self.features]
        for part in ("fc", "avgpool", *unused):
            delattr(self.body, part)
        if weights is not None:
            self._load(name, weights)
        self.attention = nn.ModuleDict()
        self.freeze(freeze)

    @property
    def layers(self) -> Iterable[nn.Module]:
        return [block for stage in self._built for block in getattr(self.body, stage)]

    @property
    def selected(self) -> list[int]:
        return self._selected

    @property
    def _built(self) -> list[str]:
        return [stage for stage in STAGES if hasattr(self.body, stage)]

    def modules_of(self, stage: str) -> Sequence[nn.Module]:
        if stage == "stem":
            return [self.body.conv1, self.body.bn1]
        return [getattr(self.body, stage)] if stage in self._built else []

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        body = self.body
        if mask is None:
            mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        maps = []
        for stage in self._built:
            for block in getattr(body, stage):
                x = run_with_attention(block, x, mask) if hasattr(block, "attention") else block(x)
            if stage in self.attention:
                x = _attend(self.attention[stage], x, mask)
            if stage in self.features:
                maps.append(x)
        return maps

    def plug(self, placements: Mapping[str, Placement]) -> None:
        """Add attention blocks after stages and inside residual blocks.

        Raises UserError for stages that are not built.
        """
        for name, placement in placements.items():
            placement.check(name, self._built, STAGES)
        for stage in self._built:
            for block in getattr(self.body, stage):
                channels = (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels
                inside = nn.ModuleDict({"pre": blocks_for(placements, stage, "pre", block.conv1.in_channels)})
                for where in ("standard", "identity", "post"):
                    inside[where] = blocks_for(placements, stage, where, channels)
                if any(inside.values()):
                    block.attention = inside
            if after := blocks_for(placements, stage, "after", channels):
                self.attention[stage] = after

    def _network(self, name: str, norm: Callable[[int], nn.Module], dilation: bool) -> Any:
        """The whole network. norm: makes the norm of so many channels."""
        return torchvision.models.get_model(
            name, weights=None, norm_layer=norm, replace_stride_with_dilation=[False, False, dilation]
        )

    def _state_dict(self, name: str, weights: str) -> dict[str, Tensor]:
        """Weights under the names of the network, from a file or from where they are published."""
        return read_state_dict(weights, "ResNet") if is_file(weights) else _download_state_dict(name, weights)

    def _load(self, name: str, weights: str) -> None:
        state = self._state_dict(name, weights)
        unused = tuple(f"{part}." for part in ("fc", *STAGES) if not hasattr(self.body, part))
        state = {key: value for key, value in state.items() if not key.startswith(unused)}
        wanted = {key: value.shape for key, value in self.body.state_dict().items() if "num_batches" not in key}
        found = {key: value.shape for key, value in state.items() if "num_batches" not in key}
        if different := sorted(dict(wanted.items() ^ found.items())):
            raise UserError(
                f"ResNet: weights '{weights}' are not of a {name} with this norm: {len(different)} tensors are "
                f"missing, not known or of another shape, such as {different[0]}. Choose the matching model/backbone, "
                "or weights=null for random weights."
            )
        self.body.load_state_dict(state, strict=False)  # norms differ in whether they count batches


def run_with_attention(
    block: BasicBlock | Bottleneck, x: Tensor, image_mask: Tensor
) -> Float[Tensor, "batch channels height width"]:
    """What torchvision's residual block computes, with the attention blocks that are plugged into it."""
    attention = typing.cast(nn.ModuleDict, block.attention)
    shortcut = x if block.downsample is None else block.downsample(x)
    x = _attend(attention["pre"], x, image_mask)
    x = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    if isinstance(block, Bottleneck):
        x = block.bn3(block.conv3(block.relu(x)))
    x = _attend(attention["standard"], x, image_mask) + _attend(attention["identity"], shortcut, image_mask)
    return _attend(attention["post"], block.relu(x), image_mask)


def _attend(blocks: nn.Module, x: Tensor, image_mask: Tensor) -> Float[Tensor, "batch channels height width"]:
    """The map after the blocks of one place; most places have none, and need no mask of the map's size."""
    return blocks(x, *masks_for(image_mask, [x])) if len(typing.cast(Blocks, blocks)) else x


def _download_state_dict(name: str, weights: str) -> dict[str, Tensor]:
    known = torchvision.models.get_model_weights(name)
    if weights not in [*known.__members__, "DEFAULT"]:
        raise UserError(
            f"ResNet: '{weights}' is neither a file nor one of torchvision's weights for {name}: "
            f"{', '.join(known.__members__)}. Correct weights."
        )
    return downloaded(known[weights].url, lambda: known[weights].get_state_dict(progress=True))


def downloaded(address: str, download: Callable[[], Any]) -> dict[str, Tensor]:
    """What a download gives. address: where it is from, for the UserError where it cannot be had."""
    try:
        return download()
    except (URLError, OSError) as error:
        raise UserError(
            f"ResNet: could not download {address}: {error}. Without network access, put the file there yourself, "
            "or set model.backbone.weights=PATH. From random weights: model.backbone.weights=null "
            "model.backbone.norm=batch model.backbone.freeze=[]."
        ) from None
