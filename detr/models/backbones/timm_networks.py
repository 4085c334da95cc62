"""timm's networks by name: what timm says of them, their weights, and their making."""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detr.errors import UserError
from detr.models.backbones.base import WEIGHT_FILES, is_file, read_state_dict

logger = logging.getLogger(__name__)

# What networks raise that are built or run in a way that they are not made for.
UNFIT = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError)
_PACKAGE = "package:"
_WAIT = 10  # seconds for an answer of the server that weights are on


@dataclass(frozen=True)
class Info:
    """What timm says of a stage. index: among those that timm gives maps of. module: whose output the map is."""

    stage: str
    index: int
    module: str
    channels: int
    stride: int
    stem: str | None = None  # of the first stage: the last module before it with a map of its own


class Source:
    """A network of timm's by its name. Raises UserError where there is none, or it gives no maps."""

    def __init__(self, name: str) -> None:
        timm = library()
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

    def infos(self) -> list[Info]:
        """All stages from stride 4 on."""
        try:
            try:
                sketch = self._created(features_only=True)
            except TypeError:
                self.options.pop("dynamic_img_size", None)
                sketch = self._created(features_only=True)
            every = sketch.feature_info.info
        except UNFIT as error:
            raise UserError(
                f"Timm: name: {self.name} cannot give feature maps ({first_line(error)}). Choose another model."
            ) from None
        stem = [info["module"] for info in every if info["reduction"] < 4]
        rest = [(index, info) for index, info in enumerate(every) if info["reduction"] >= 4]
        return [
            Info(f"stage{number}", index, info["module"], info["num_chs"], info["reduction"], (stem or [None])[-1])
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
            return library().create_model(
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
            config = library().models.get_pretrained_cfg(f"{self.architecture}.{self._tag_of(weights)}")
        return config.mean, config.std

    def load(self, network: nn.Module, weights: str, indices: Sequence[int]) -> None:
        if weights.startswith(_PACKAGE):
            self._load_file(network, str(_file_of_package(weights.removeprefix(_PACKAGE))))
        elif is_file(weights):
            self._load_file(network, weights)
        else:
            self._download(network, weights, indices)

    def _load_file(self, network: nn.Module, path: str) -> None:
        state = read_state_dict(path, "Timm")
        whole = self._created().state_dict()
        if not state.keys() & whole.keys():
            state = self._in_order(state, whole, path)
        found = {canonical(key): value for key, value in state.items()}
        wanted = {canonical(key): key for key in network.state_dict() if "num_batches" not in key}
        known = {canonical(key) for key in whole}
        shapes = {name: network.state_dict()[key].shape for name, key in wanted.items()}
        different = [wanted[name] for name in wanted if name not in found or found[name].shape != shapes[name]]
        different += [key for key in state if canonical(key) not in known]
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
        config = library().models.get_pretrained_cfg(f"{self.architecture}.{tag}")
        address, overlay = _address(config)
        try:
            if not overlay:
                _reach(address)
            loaded = self.network(indices, "batch", pretrained=True, pretrained_cfg=tag, pretrained_cfg_overlay=overlay)
        except (URLError, OSError) as error:
            raise UserError(
                f"Timm: could not download {address}: {error}. Without network access, put the file there yourself, "
                "or set model.backbone.weights=PATH. From random weights: model.backbone.weights=null "
                "model.backbone.norm=batch model.backbone.freeze=[]."
            ) from None
        network.load_state_dict(loaded.state_dict())


def library() -> ModuleType:
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
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.suffix in WEIGHT_FILES]
    if len(files) != 1:
        missing = "is not installed" if spec is None else f"brings {len(files)} files of weights, wanted one"
        raise UserError(f"Timm: weights: the package '{module}' {missing}. Install it, or set weights=PATH.")
    return files[0]


def canonical(name: str) -> str:
    """The same for a tensor of a whole network and of its feature extractor, which joins names and adds a prefix."""
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")


def module_named(network: nn.Module, name: str) -> nn.Module | None:
    """The module that the whole network has under this name."""
    named = {canonical(own): module for own, module in network.named_modules()}
    return named.get(canonical(name))


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


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
