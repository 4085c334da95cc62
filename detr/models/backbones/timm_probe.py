"""What a run without data shows of one of timm's networks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.backbones.timm_networks import UNFIT, Info, Source, first_line, module_named


@dataclass(frozen=True)
class Place:
    """Where attention blocks go, and what is there: maps (B, C, H, W), channels last, or tokens (B, N, C)."""

    module: str
    channels: int
    stride: int
    layout: Literal["maps", "channels last", "tokens"]


@dataclass(frozen=True)
class Probe:
    """What a run without data shows. unused: names of parameters that no map depends on."""

    size_divisor: int
    channels_last: bool
    unused: list[str]
    places: dict[str, Place] = field(default_factory=dict)


@torch.enable_grad()  # also where a model is built for inference alone
def probe(network: nn.Module, infos: Sequence[Info], chosen: Sequence[str], source: Source) -> Probe:
    """Run a network without data, at sizes that are multiples of ever more pixels, until it takes them."""
    strides = [info.stride for info in infos]
    wanted = [info.stride for info in infos if info.stage in chosen]
    reason = ""
    for divisor in sorted({1, *strides, source.config.input_size[-1]}):
        height, width = (divisor * max(side // divisor | 1, least) for side, least in ((256, 3), (384, 5)))
        try:
            maps, outputs = _run(network, infos, height, width)
        except UNFIT as error:
            reason = first_line(error)
            continue
        last = infos[[info.stage for info in infos].index(chosen[-1])]
        channels_last = maps[-1].shape[1] != last.channels or _is_channels_last(maps[-1], last, height, width)
        if not all(_fits(x, stride, height, width, channels_last) for x, stride in zip(maps, wanted, strict=True)):
            reason = "its maps are of one size"
            continue
        torch.stack([x.sum() for x in maps]).sum().backward()
        unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        network.zero_grad()
        return Probe(
            size_divisor=divisor,
            channels_last=channels_last,
            unused=unused,
            places=dict(_places(infos, outputs, (height, width), divisor)),
        )
    size = "x".join(map(str, source.config.input_size[-2:]))
    raise UserError(
        f"Timm: name: {source.name} works at one size of images only, such as {size}, or cannot be run without data "
        f"({reason}). A detector needs any size. Choose another model."
    )


def _run(network: nn.Module, infos: Sequence[Info], height: int, width: int) -> tuple[list[Tensor], dict[str, Any]]:
    """A network's maps, and what comes out of the last module of each stage."""
    outputs: dict[str, Any] = {}

    def keep(stage: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[stage] = output

    ends = {info.stage: module_named(network, info.module) for info in infos}
    handles = [end.register_forward_hook(partial(keep, stage)) for stage, end in ends.items() if end is not None]
    try:
        with torch.device("meta"):
            return network.train()(torch.zeros(2, 3, height, width)), outputs
    finally:
        for handle in handles:
            handle.remove()


def _places(
    infos: Sequence[Info], outputs: Mapping[str, Any], size: tuple[int, int], divisor: int
) -> Iterator[tuple[str, Place]]:
    """Stages after which there is a map, with what it looks like."""
    for info in infos:
        output = outputs.get(info.stage)
        layout: Literal["maps", "channels last", "tokens"] | None = None
        if isinstance(output, Tensor) and output.ndim == 4:
            layout = "channels last" if _is_channels_last(output, info, *size) else "maps"
        elif isinstance(output, Tensor) and output.ndim == 3 and divisor % info.stride == 0:
            layout = "tokens"
        if layout is not None:
            yield info.stage, Place(info.module, info.channels, info.stride, layout)


def _is_channels_last(x: Tensor, info: Info, height: int, width: int) -> bool:
    return x.shape[-1] == info.channels and _fits(x, info.stride, height, width, True)


def _fits(x: Tensor, stride: int, height: int, width: int, channels_last: bool) -> bool:
    """Whether a map has about the size that the stride promises; convolutions without padding lose some cells."""
    cells = x.shape[1:3] if channels_last else x.shape[2:4]
    return all(abs(n * stride - side) <= 3 * stride for n, side in zip(cells, (height, width), strict=True))


def parts_of(network: nn.Module, infos: Sequence[Info]) -> dict[str, list[nn.Module]]:
    """What each stage is made of: modules in the order in which they are used, as timm's feature extractors take them.

    Nothing where the stages are no modules of their own.
    """
    ends = {id(module_named(network, info.module)): info.stage for info in infos}
    stem = None if infos[0].stem is None else module_named(network, infos[0].stem)
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
