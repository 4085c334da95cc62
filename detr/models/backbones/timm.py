"""Backbones from timm, PyTorch Image Models (Wightman, 2019): every model there that gives feature maps."""

import importlib.util
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detr.errors import UserError
from detr.models.added import Added
from detr.models.attention.placement import Placement, blocks_for
from detr.models.backbones.base import Backbone, read_state_dict, stages_for
from detr.models.values import masks_for

logger = logging.getLogger(__name__)

_FILES = (".pth", ".pt", ".safetensors")
_PACKAGE = "package:"
_WAIT = 10  # seconds for an answer of the server that weights are on
# What networks raise that are built or run in a way that they are not made for.
_UNFIT = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError)


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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if norm == "group" and weights is not None:
            raise UserError("Timm: norm=group has no pre-trained weights. Set norm=frozen, norm=batch or weights=null.")
        source = _Source(name)
        infos = source.infos()
        strides = {info.stage: info.stride for info in infos}
        scales, patch = None, infos[0].stride
        if len(infos) > 1 and set(strides.values()) == {patch} and all(isinstance(one, int) for one in features):
            scales = _scales(features, patch, name)
            chosen = [infos[-1].stage]
        else:
            chosen = stages_for(features, strides, f"Timm: {name}")
        built = infos[: list(strides).index(chosen[-1]) + 1]
        indices = [info.index for info in built if info.stage in chosen]
        sketch = source.network(indices, norm, meta=True)
        probe = _probe(sketch, built, chosen, source)
        on_meta = torch.get_default_device().type == "meta"  # a sketch of the whole model
        self.net = sketch if on_meta else source.network(indices, norm)
        for parameter in map(self.net.get_parameter, probe.unused):
            parameter.requires_grad_(False)  # distributed training would wait for its gradient
        self._places = probe.places
        self._parts = _parts(self.net, built)
        self._channels_last = probe.channels_last
        self._name = source.architecture
        self.stages = ("stem", *strides) if self._parts else ("body",)
        self.channels, self.strides = [i.channels for i in built if i.stage in chosen], [strides[s] for s in chosen]
        self.size_divisor = probe.size_divisor
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
                    self._frozen.append(module.requires_grad_(False))
        self.freeze(freeze)

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
            whole = _timm().create_model(self._name)
        if not hasattr(whole, "group_matcher"):
            return super().depths()
        layers = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        depth = {_canonical(name): layer for name, layer in layers.items()}
        names = [name for name, _ in self.net.named_parameters()]
        if not all(_canonical(name) in depth for name in names):
            return super().depths()
        order = {layer: index for index, layer in enumerate(sorted({depth[_canonical(name)] for name in names}))}
        return {f"net.{name}": order[depth[_canonical(name)]] for name in names}

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
                module = _module(self.net, place.module)
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
    there = {scale: int(patch * 2.0**scale) for scale in range(-2, 3) if (patch * 2.0**scale).is_integer()}
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


@dataclass(frozen=True)
class _Info:
    """What timm says of a stage. index: among those that timm gives maps of. module: whose output the map is."""

    stage: str
    index: int
    module: str
    channels: int
    stride: int
    stem: str | None = None  # of the first stage: the last module before it with a map of its own


@dataclass(frozen=True)
class _Place:
    """Where attention blocks go, and what is there: maps (B, C, H, W), channels last, or tokens (B, N, C)."""

    module: str
    channels: int
    stride: int
    layout: Literal["maps", "channels last", "tokens"]


@dataclass(frozen=True)
class _Probe:
    """What a run without data shows. unused: names of parameters that no map depends on."""

    size_divisor: int
    channels_last: bool
    unused: list[str]
    places: dict[str, _Place] = field(default_factory=dict)


class _Source:
    """A network of timm's by its name. Raises UserError where there is none, or it gives no maps."""

    def __init__(self, name: str) -> None:
        timm = _timm()
        self.name = name
        self.architecture, _, self.tag = name.partition(".")
        if not timm.is_model(self.architecture):  # names with a source, such as hf-hub:, are none either
            close = get_close_matches(self.architecture, timm.list_models(), 3, 0.5)
            hint = f"Did you mean {' or '.join(close)}? " if close else ""
            raise UserError(f"Timm: name: timm has no model '{name}'. {hint}Set one of timm.list_models().")
        self.tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{self.architecture}.*")]
        if self.tag and self.tag not in self.tags:
            raise UserError(f"Timm: name: {self.architecture} has no tag '{self.tag}', only {self._known_tags()}.")
        self.config = timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
        self.options: dict[str, Any] = {}
        if self.config.fixed_input_size:  # fixed at that of `name`, whatever size the weights are of, or dynamic
            self.options = {"img_size": self.config.input_size[-2:], "dynamic_img_size": True}

    def infos(self) -> list[_Info]:
        """All stages from stride 4 on."""
        try:
            try:
                sketch = self._created(features_only=True)
            except TypeError:
                self.options.pop("dynamic_img_size", None)
                sketch = self._created(features_only=True)
            every = sketch.feature_info.info
        except _UNFIT as error:
            raise UserError(
                f"Timm: name: {self.name} cannot give feature maps ({_first_line(error)}). Choose another model."
            ) from None
        stem = [info["module"] for info in every if info["reduction"] < 4]
        rest = [(index, info) for index, info in enumerate(every) if info["reduction"] >= 4]
        return [
            _Info(f"stage{number}", index, info["module"], info["num_chs"], info["reduction"], (stem or [None])[-1])
            for number, (index, info) in enumerate(rest, start=1)
        ]

    def network(self, indices: Sequence[int], norm: str, *, meta: bool = False, **options: Any) -> nn.Module:
        """It, up to the last of the maps with these indices. meta: without data."""
        network = self._created(meta=meta, features_only=True, out_indices=tuple(indices), **options)
        if norm == "group":
            _put_group_norms(network, self.name)
        return network

    def _created(self, *, meta: bool = True, **options: Any) -> Any:
        with torch.device("meta" if meta else torch.get_default_device()):
            return _timm().create_model(
                self.architecture, pretrained_cfg=self.tag or None, **{**self.options, **options}
            )

    def _known_tags(self) -> str:
        return ", ".join(self.tags) or "none"

    def _tag_of(self, weights: str) -> str:
        return (self.tag or self.config.tag or "") if weights == "DEFAULT" else weights

    def constants(self, weights: str | None) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation that go with these weights."""
        config = self.config
        if weights is not None and self._tag_of(weights) in self.tags:
            config = _timm().models.get_pretrained_cfg(f"{self.architecture}.{self._tag_of(weights)}")
        return config.mean, config.std

    def load(self, network: nn.Module, weights: str, indices: Sequence[int]) -> None:
        if weights.startswith(_PACKAGE):
            self._load_file(network, str(_file_of_package(weights.removeprefix(_PACKAGE))))
        elif weights.endswith(_FILES) or Path(weights).exists():
            self._load_file(network, weights)
        else:
            self._download(network, weights, indices)

    def _load_file(self, network: nn.Module, path: str) -> None:
        state = read_state_dict(path, "Timm")
        whole = self._created().state_dict()
        if not state.keys() & whole.keys():
            state = self._in_order(state, whole, path)
        found = {_canonical(key): value for key, value in state.items()}
        wanted = {_canonical(key): key for key in network.state_dict() if "num_batches" not in key}
        known = {_canonical(key) for key in whole}
        shapes = {name: network.state_dict()[key].shape for name, key in wanted.items()}
        different = [wanted[name] for name in wanted if name not in found or found[name].shape != shapes[name]]
        different += [key for key in state if _canonical(key) not in known]
        if different:
            raise UserError(
                f"Timm: weights '{path}' are not of a {self.architecture}: {len(different)} tensors are missing, not "
                f"known or of another shape, such as {different[0]}. Set the matching name, or weights=null for random "
                "weights."
            )
        network.load_state_dict({key: found[name] for name, key in wanted.items()}, strict=False)

    def _in_order(self, state: Mapping[str, Tensor], whole: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
        """Under timm's names, where number, order and shapes of all tensors are the same."""
        tensors = [value for key, value in state.items() if "num_batches" not in key]
        names = [key for key in whole if "num_batches" not in key]
        if [value.shape for value in tensors] != [whole[name].shape for name in names]:
            return dict(state)
        logger.info(
            "%s has other names than timm's %s: its %d tensors are taken in their order, in which all shapes agree.",
            path,
            self.architecture,
            len(tensors),
        )
        return dict(zip(names, tensors, strict=True))

    def _download(self, network: nn.Module, weights: str, indices: Sequence[int]) -> None:
        """timm's weights, from its cache or its server."""
        tag = self._tag_of(weights)
        if tag not in self.tags:
            raise UserError(
                f"Timm: '{weights}' is neither a file nor one of timm's weights for {self.architecture}: "
                f"{self._known_tags()}. Correct weights."
            )
        config = _timm().models.get_pretrained_cfg(f"{self.architecture}.{tag}")
        address, overlay = _address(config)
        try:
            if not overlay:
                _reach(address)
            loaded = self.network(indices, "batch", pretrained=True, pretrained_cfg=tag, pretrained_cfg_overlay=overlay)
        except (URLError, OSError) as error:
            raise UserError(
                f"Timm: could not download {address}: {error}. Without network access, put the file there yourself and "
                "set weights=PATH, or train from random weights with weights=null norm=batch freeze=[]."
            ) from None
        network.load_state_dict(loaded.state_dict())


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise UserError("Timm: this backbone needs timm. Install it with: pip install 'detr-framework[timm]'") from None
    return timm


def _address(config: Any) -> tuple[str, dict[str, str]]:
    """Where weights are, and what makes timm take them from its cache, if they are there."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    if not config.hf_hub_id:
        return config.url, {}
    name = config.hf_hub_filename or "model.safetensors"
    cached = try_to_load_from_cache(config.hf_hub_id, name)
    overlay = {"file": cached} if isinstance(cached, str) and name.endswith(".safetensors") else {}
    return hf_hub_url(config.hf_hub_id, name), overlay


def _reach(address: str) -> None:
    """Raise URLError where the server cannot be reached, at once: its own client would try for a minute."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=_WAIT).close()
    except HTTPError:
        return  # it answers


def _file_of_package(module: str) -> Path:
    """The only file of weights in an installed package, which is not imported."""
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.suffix in _FILES]
    if len(files) != 1:
        missing = "is not installed" if spec is None else f"brings {len(files)} files of weights, wanted one"
        raise UserError(f"Timm: weights: the package '{module}' {missing}. Install it, or set weights=PATH.")
    return files[0]


def _canonical(name: str) -> str:
    """The same for a tensor of a whole network and of its feature extractor, which joins names and adds a prefix."""
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")


def _module(network: nn.Module, name: str) -> nn.Module | None:
    """The module that the whole network has under this name."""
    named = {_canonical(own): module for own, module in network.named_modules()}
    return named.get(_canonical(name))


def _parts(network: nn.Module, infos: Sequence[_Info]) -> dict[str, list[nn.Module]]:
    """What each stage is made of: modules in the order in which they are used, as timm's feature extractors take them.

    Nothing where the stages are no modules of their own.
    """
    ends = {id(_module(network, info.module)): info.stage for info in infos}
    stem = None if infos[0].stem is None else _module(network, infos[0].stem)
    if id(None) in ends or (stem is None and infos[0].stem is not None):
        return {}
    parts: dict[str, list[nn.Module]] = {"stem": [], **{info.stage: [] for info in infos}}
    left = ["stem", *(info.stage for info in infos)]

    def walk(module: nn.Module) -> None:
        inside = {id(part) for part in module.modules() if part is not module}
        if inside & {*ends, id(stem)} and id(module) not in ends and module is not stem:
            for child in module.children():
                walk(child)
        elif left:
            if left[0] == "stem" and id(module) in ends:  # nothing before has a map of its own
                left.pop(0)
            parts[left[0]].append(module)
            if id(module) in ends or module is stem:
                left.pop(0)

    walk(network)
    return parts


def _probe(network: nn.Module, infos: Sequence[_Info], chosen: Sequence[str], source: _Source) -> _Probe:
    """Run a network without data, at sizes that are multiples of ever more pixels, until it takes them."""
    strides = [info.stride for info in infos]
    wanted = [info.stride for info in infos if info.stage in chosen]
    reason = ""
    for divisor in sorted({1, *strides, source.config.input_size[-1]}):
        height, width = (divisor * max(side // divisor | 1, least) for side, least in ((256, 3), (384, 5)))
        try:
            maps, outputs = _run(network, infos, height, width)
        except _UNFIT as error:
            reason = _first_line(error)
            continue
        last = infos[[info.stage for info in infos].index(chosen[-1])]
        channels_last = maps[-1].shape[1] != last.channels or _is_channels_last(maps[-1], last, height, width)
        if not all(_fits(x, stride, height, width, channels_last) for x, stride in zip(maps, wanted, strict=True)):
            reason = "its maps are of one size"
            continue
        torch.stack([x.sum() for x in maps]).sum().backward()
        unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        network.zero_grad()
        return _Probe(
            size_divisor=divisor,
            channels_last=channels_last,
            unused=unused,
            places=dict(_places(infos, outputs, (height, width), divisor)),
        )
    size = "x".join(map(str, source.config.input_size[-2:]))
    raise UserError(
        f"Timm: name: {source.name} works at one size of images only, such as {size} ({reason}). A detector needs "
        "any size. Choose another model."
    )


def _run(network: nn.Module, infos: Sequence[_Info], height: int, width: int) -> tuple[list[Tensor], dict[str, Any]]:
    """A network's maps, and what comes out of the last module of each stage."""
    outputs: dict[str, Any] = {}

    def keep(stage: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[stage] = output

    ends = {info.stage: _module(network, info.module) for info in infos}
    handles = [end.register_forward_hook(partial(keep, stage)) for stage, end in ends.items() if end is not None]
    try:
        with torch.device("meta"):
            return network.train()(torch.zeros(2, 3, height, width)), outputs
    finally:
        for handle in handles:
            handle.remove()


def _places(
    infos: Sequence[_Info], outputs: Mapping[str, Any], size: tuple[int, int], divisor: int
) -> Iterator[tuple[str, _Place]]:
    """Stages after which there is a map, with what it looks like."""
    for info in infos:
        output = outputs.get(info.stage)
        layout: Literal["maps", "channels last", "tokens"] | None = None
        if isinstance(output, Tensor) and output.ndim == 4:
            layout = "channels last" if _is_channels_last(output, info, *size) else "maps"
        elif isinstance(output, Tensor) and output.ndim == 3 and divisor % info.stride == 0:
            layout = "tokens"
        if layout is not None:
            yield info.stage, _Place(info.module, info.channels, info.stride, layout)


def _is_channels_last(x: Tensor, info: _Info, height: int, width: int) -> bool:
    return x.shape[-1] == info.channels and _fits(x, info.stride, height, width, True)


def _fits(x: Tensor, stride: int, height: int, width: int, channels_last: bool) -> bool:
    """Whether a map has about the size that the stride promises; convolutions without padding lose some cells."""
    cells = x.shape[1:3] if channels_last else x.shape[2:4]
    return all(abs(n * stride - side) <= 3 * stride for n, side in zip(cells, (height, width), strict=True))


def _put_group_norms(network: nn.Module, name: str) -> None:
    """Group norm (Wu & He, ECCV 2018) in place of each batch norm, with the activation that timm fuses into it."""
    from timm.layers import BatchNormAct2d, GroupNormAct

    count = 0
    for parent in [*network.modules()]:
        for child, norm in [*parent.named_children()]:
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            groups, channels, device = math.gcd(32, norm.num_features), norm.num_features, norm.weight.device
            new: nn.Module = nn.GroupNorm(groups, channels, device=device)
            if isinstance(norm, BatchNormAct2d):
                new = GroupNormAct(channels, groups, device=device)
                new.act, new.drop = norm.act, norm.drop
            new.weight = norm.weight  # some start at zero
            parent.add_module(child, new)
            count += 1
    if not count or any(isinstance(module, _BatchNorm) for module in network.modules()):
        which = "no batch norms" if not count else "batch norms that are not of maps"
        raise UserError(f"Timm: norm: {name} has {which}, so group norms cannot take their place. Set norm=batch.")


def _checked(name: str, values: Sequence[float]) -> list[float]:
    if len(values) != 3 or (name == "std" and min(values) <= 0):
        raise UserError(f"Timm: {name}: wanted three numbers, of red, green and blue, got {list(values)}.")
    return [float(value) for value in values]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
