"""Backbones from timm, PyTorch Image Models (Wightman, 2019): every model there that gives feature maps."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detr.errors import UserError
from detr.models.added import Added
from detr.models.attention.placement import Placement, blocks_for
from detr.models.backbones.base import Backbone, stages_for, with_detail
from detr.models.backbones.timm_networks import Source, canonical, library, module_named
from detr.models.backbones.timm_probe import parts_of, probe
from detr.models.values import masks_for

logger = logging.getLogger(__name__)


class Timm(Backbone):
    """A network of timm up to the last stage whose map is used.

    Its stages are `stem` and `stage1` to `stageN`, timm's own from stride 4 on: of most networks, stage1 to stage4 have
    the strides 4 to 32. A plain vision transformer (ViT) has a stage for each block. Where maps of it are wanted by
    stride, they are made of the last block's by a simple feature pyramid (ViTDet: Li et al., ECCV 2022), which is new
    and trains with the main learning rate. It has the strides p/4, p/2, p, 2p and 4p of patches of p pixels, as far as
    these are whole. A stride in `features` stands for the nearest of them: of patches of 14 pixels, 8 means 7, 16 means
    14, and 32 means 28.

    Convolutions see padding as zeros. Global attention, the windows of Swin and pooling over the image, such as in
    squeeze-and-excitation, see it too, so that maps depend on it somewhat.

    name: timm's name of the network, with or without a tag: resnet50d, convnext_tiny.in12k.
    weights: a tag of timm's pre-trained weights, such as a1_in1k; DEFAULT for that of `name`, or timm's default; a
        file of weights with timm's names; package:MODULE for the one file of weights that an installed Python package
        brings; or None for random weights. Where the names of a file are all others, its tensors are taken in their
        order, if number and shapes agree.
    norm: of batch norms: `frozen`, for pre-trained weights, or `batch`, which trains; `group` puts group norms in their
        place, for random weights. Other norms train.
    freeze: stages that do not train.
    features: stages whose maps are given, in order, by name or by stride.
    detail: a stride, from which on the maps of all stages are given too, for a head of masks; None: no others.
    mean, std: what images are normalized with, RGB, in [0, 1], where it is not what timm has for the weights.
    """

    def __init__(
        self,
        *,
        name: str,
        weights: str | None = None,
        norm: Literal["frozen", "batch", "group"] = "frozen",
        freeze: Sequence[str] = ("stem", "stage1"),
        features: Sequence[str | int] = (32,),
        detail: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if norm == "group" and weights is not None:
            raise UserError("Timm: norm=group has no pre-trained weights. Set norm=frozen, norm=batch or weights=null.")
        source = Source(name)
        infos = source.infos()
        strides = {info.stage: info.stride for info in infos}
        scales, patch = None, infos[0].stride
        if len(infos) > 1 and set(strides.values()) == {patch} and all(isinstance(one, int) for one in features):
            wanted = _scales(features, patch, name)
            scales = _with_detail(wanted, patch, detail)
            self._selected = [scales.index(scale) for scale in wanted]
            chosen = [infos[-1].stage]
        else:
            named = stages_for(features, strides, f"Timm: {name}")
            chosen = with_detail(named, strides, detail)
            self._selected = [chosen.index(stage) for stage in named]
        built = infos[: list(strides).index(chosen[-1]) + 1]
        indices = [info.index for info in built if info.stage in chosen]
        sketch = source.network(indices, norm, meta=True)
        seen = probe(sketch, built, chosen, source)
        on_meta = torch.get_default_device().type == "meta"  # a sketch of the whole model
        self.net = sketch if on_meta else source.network(indices, norm)
        for parameter in map(self.net.get_parameter, seen.unused):
            parameter.requires_grad_(False)  # distributed training would wait for its gradient
        self._places = seen.places
        self._parts = parts_of(self.net, built)
        self._channels_last = seen.channels_last
        self._name = source.architecture
        self.stages = ("stem", *strides) if self._parts else ("body",)
        self.channels, self.strides = [i.channels for i in built if i.stage in chosen], [strides[s] for s in chosen]
        self.size_divisor = seen.size_divisor
        self.pyramid = None
        if scales is not None and any(scales):
            self.pyramid = Pyramid(channels=self.channels[-1], scales=scales)
            self.channels = self.pyramid.channels
            self.strides = [round(patch * 2.0**scale) for scale in scales]
            self.size_divisor = math.lcm(self.size_divisor, *self.strides)
        statistics = source.constants(weights)
        for constant, own, default in (("mean", mean, statistics[0]), ("std", std, statistics[1])):
            values = _checked(constant, default if own is None else own)
            self.register_buffer(constant, torch.tensor(values), persistent=True)
        if weights is not None:
            source.load(self.net, weights, indices)
        self.attention = nn.ModuleDict()
        if norm == "frozen":
            for module in self.net.modules():
                if isinstance(module, _BatchNorm):
                    _freeze(module)
                    self._frozen.append(module)
        self.freeze(freeze)

    @property
    def selected(self) -> list[int]:
        return self._selected

    @property
    def layers(self) -> Iterable[nn.Module]:
        for stage in self.stages[1:]:
            for part in self.modules_of(stage):
                blocks = getattr(part, "blocks", part)
                yield from blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else [part]

    def modules_of(self, stage: str) -> Sequence[nn.Module]:
        return [self.net] if self.stages == ("body",) else self._parts.get(stage, [])

    def parameters_of(self, stage: str) -> list[nn.Parameter]:
        """Those outside of any stage's modules, such as positions and class tokens, count as the stem's."""
        found = super().parameters_of(stage)
        if stage == "stem":
            inside = {id(p) for modules in self._parts.values() for module in modules for p in module.parameters()}
            found += [p for p in self.net.parameters() if id(p) not in inside]
        return found

    def depths(self) -> dict[str, int]:
        """As timm counts the layers of this network for rates that fall with depth, where it does; else by stages."""
        from timm.models import group_parameters

        with torch.device("meta"):
            whole = library().create_model(self._name)
        if not hasattr(whole, "group_matcher"):
            return super().depths()
        layers = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        depth = {canonical(name): layer for name, layer in layers.items()}
        names = [name for name, _ in self.net.named_parameters()]
        if not all(canonical(name) in depth for name in names):
            return super().depths()
        order = {layer: index for index, layer in enumerate(sorted({depth[canonical(name)] for name in names}))}
        return {f"net.{name}": order[depth[canonical(name)]] for name in names}

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        if self.attention:
            self._mask = torch.zeros_like(images[:, 0], dtype=torch.bool) if mask is None else mask
        maps = self.net(images)
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps if self.pyramid is None else self.pyramid(maps[-1])

    def plug(self, placements: Mapping[str, Placement]) -> None:
        """Add attention blocks after stages; later stages see what they make.

        Raises UserError for stages that are not built, for other places, and where a stage's output is no map.
        """
        for name, placement in placements.items():
            if set(placement.stages) == {"neck"}:
                continue
            if placement.where != "after":
                raise UserError(
                    f"model.attention.{name}.where: {self._name} of timm has places after its stages only. Set "
                    f"model.attention.{name}.where=after."
                )
            if not self._places:
                raise UserError(
                    f"model.attention.{name}.stages: {self._name} of timm has no maps between its stages, so blocks "
                    f"have no place there. Set model.attention.{name}.stages=[neck]."
                )
            placement.check(name, list(self._places), self.stages[1:])
        for stage, place in self._places.items():
            if blocks := blocks_for(placements, stage, "after", place.channels):
                self.attention[stage] = blocks
                module = module_named(self.net, place.module)
                assert module is not None
                # A bound method, so that a copy of the model calls its own blocks; first, before timm takes the map.
                module.register_forward_hook(partial(self._attend, stage), prepend=True)

    def _attend(self, stage: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        place, blocks = self._places[stage], self.attention[stage]
        if place.layout == "maps":
            return blocks(output, *masks_for(self._mask, [output]))
        if place.layout == "channels last":
            x = output.permute(0, 3, 1, 2)
            return blocks(x, *masks_for(self._mask, [x])).permute(0, 2, 3, 1)
        height, width = (side // place.stride for side in self._mask.shape[-2:])
        first = output.shape[1] - height * width  # of the class token and others
        x = output[:, first:].transpose(1, 2).unflatten(2, (height, width))
        x = blocks(x, *masks_for(self._mask, [x]))
        return torch.cat((output[:, :first], x.flatten(2).transpose(1, 2)), dim=1)


def _freeze(norm: _BatchNorm) -> None:
    """Make buffers of its parameters, as FrozenBatchNorm2d has them, in place."""
    for name, parameter in [*norm.named_parameters(recurse=False)]:
        delattr(norm, name)
        norm.register_buffer(name, parameter.detach())


class Pyramid(Added):
    """Maps of other strides from one: the simple feature pyramid of ViTDet (Li et al., ECCV 2022), up to its 1x1 convs.

    channels: of the map. scales: of each map to make, by how many times its stride doubles, from -2 to 2.
    """

    def __init__(self, *, channels: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.channels = [channels // 2 ** max(-scale, 0) for scale in scales]
        self.levels = nn.ModuleList(_level(channels, scale) for scale in scales)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        return [level(x) for level in self.levels]


def _level(channels: int, scale: int) -> nn.Module:
    if scale >= 0:
        return nn.MaxPool2d(2**scale) if scale else nn.Identity()
    half = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
    if scale == -1:
        return half
    from timm.layers import LayerNorm2d

    quarter = nn.ConvTranspose2d(channels // 2, channels // 4, kernel_size=2, stride=2)
    return nn.Sequential(half, LayerNorm2d(channels // 2), nn.GELU(), quarter)


def _scales(features: Sequence[Any], patch: int, name: str) -> list[int]:
    """How many times the stride of a plain transformer doubles for each map that is wanted by stride."""
    there = _pyramid_strides(patch)
    found = [round(math.log2(max(feature, 1) / patch)) for feature in features]
    near = all(
        scale in there and abs(math.log2(max(feature, 1) / there[scale])) < 0.25
        for scale, feature in zip(found, features, strict=True)
    )
    if not found or not near or found != sorted(set(found)):
        raise UserError(
            f"Timm: {name}: wanted features as some of the strides of its feature pyramid, in this order: "
            f"{', '.join(map(str, there.values()))}; or its blocks by name, stage1 and on; got {list(features)}. "
            "Correct features."
        )
    strides = [there[scale] for scale in found]
    if strides != list(features):
        logger.info("The maps of %s have strides %s in place of %s.", name, strides, list(features))
    return found


def _with_detail(scales: Sequence[int], patch: int, detail: int | None) -> list[int]:
    """These scales, and those from the one nearest to stride `detail` up to the last of them."""
    if detail is None:
        return [*scales]
    first = min(_pyramid_strides(patch), key=lambda scale: abs(scale - math.log2(max(detail, 1) / patch)))
    return sorted({*scales, *(scale for scale in _pyramid_strides(patch) if first <= scale <= scales[-1])})


def _pyramid_strides(patch: int) -> dict[int, int]:
    """The strides of a plain transformer's feature pyramid, by how many times that of its patches doubles."""
    return {scale: int(patch * 2.0**scale) for scale in range(-2, 3) if (patch * 2.0**scale).is_integer()}


def _checked(name: str, values: Sequence[float]) -> list[float]:
    if len(values) != 3 or (name == "std" and min(values) <= 0):
        raise UserError(f"Timm: {name}: wanted three numbers, of red, green and blue, got {list(values)}.")
    return [float(value) for value in values]
