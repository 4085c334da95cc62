"""Checks of a configuration before anything is built from it."""

import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable
from omegaconf import DictConfig, OmegaConf

from detr.config.moved import moved
from detr.config.targets import FRAMEWORK, resolve
from detr.contents import flat
from detr.errors import UserError
from detr.ranges import check_ranges

KEYWORDS = ("_target_", "_partial_")  # keys of a node that are not options of what it builds
# Arguments that are not in the configuration, but known when a node is built.
_GIVEN_LATER = {"model": ("num_classes",), "criterion": ("num_classes",), "optimizer": ("model",)}


def plain(config: Any) -> Any:
    """A configuration as dicts and lists with everything filled in; it must lack nothing."""
    return (
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True) if OmegaConf.is_config(config) else config
    )


def check_config(config: DictConfig) -> None:
    """Check everything that a composed configuration will build, before any work starts; raises UserError."""
    allow = (*FRAMEWORK, *config.allow_targets)
    _check_fixed(config)
    for name, node in plain(config).items():
        check_nodes(node, path=name, allow=allow, given=_GIVEN_LATER.get(name, ()))
    check_ranges(OmegaConf.to_object(config))


def _check_fixed(config: DictConfig, path: str = "") -> None:
    """Refuse names beside the fixed ones, which +NAME=VALUE puts there."""
    kind = OmegaConf.get_type(config)
    if not is_dataclass(kind):
        return
    known = [one.name for one in fields(kind)]
    for name in map(str, config):
        place = f"{path}.{name}".lstrip(".")
        if name not in known:
            hint = " ".join(f"Did you mean {close}?" for close in get_close_matches(name, known, 1))
            raise UserError(moved(place) or f"There is no option {place}. {hint}".rstrip())
        if isinstance(value := config._get_node(name), DictConfig):
            _check_fixed(value, place)


def check_nodes(config: Any, *, path: str, allow: Sequence[str], given: Collection[str]) -> None:
    """Check each `_target_` node against the signature of what it builds; the outermost gets `given` arguments too."""
    for place, node in _nodes(config, path):
        _check_node(node, place, allow, given if place == path else ())


def _nodes(config: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(config, dict):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from _nodes(value, f"{path}.{key}")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from _nodes(value, f"{path}[{index}]")
    elif not isinstance(config, str | int | float | None) or "${" in str(config):
        # A checkpoint's configuration is filled in already: what is not has another origin.
        raise UserError(f"{path}: {config!r} is refused. Write plain values: texts, numbers, lists and mappings.")


def _check_node(node: Mapping[str, Any], path: str, allow: Sequence[str], given: Collection[str]) -> None:
    target = resolve(node["_target_"], path, allow)
    options = {key: value for key, value in node.items() if key not in KEYWORDS}
    _check_names(options, target, node["_target_"], path, given)
    if not node.get("_partial_"):
        _check_complete({*options, *given}, target, node["_target_"], path)
    _check_types(options, target, path)


def _check_names(
    options: Mapping[str, Any], target: Callable[..., Any], name: str, path: str, given: Collection[str]
) -> None:
    if reserved := [key for key in options if str(key).startswith("_")]:
        raise UserError(f"{path}: the key {reserved[0]} is not used here. Remove it.")
    parameters = inspect.signature(target).parameters
    open_ended = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument in given:
        if argument not in parameters and not open_ended:
            raise UserError(f"{path}: {name} takes no {argument}, which it would be given. Choose another _target_.")
    for option in options:
        if option in parameters:
            continue
        for place, _ in flat({f"{path}.{option}": options[option]}):
            if text := moved(place):
                raise UserError(text)
        known = [known for known in parameters if known not in given]
        close = get_close_matches(str(option), known, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"{path}.{option} is not an option of {name}, whose options are {', '.join(known)}.{hint}")


def _check_complete(supplied: Collection[str], target: Callable[..., Any], name: str, path: str) -> None:
    for option, parameter in inspect.signature(target).parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
        if needed and option not in supplied:
            raise UserError(f"{path}: {name} needs the option {option}. Set {path}.{option}.")


def _check_types(options: Mapping[str, Any], target: Callable[..., Any], path: str) -> None:
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in options.items():
        holds_nodes = isinstance(value, dict | list) and any(_nodes(value, f"{path}.{name}"))
        if name in hints and not holds_nodes and not _fits(value, hints[name]):
            raise UserError(f"{path}.{name}: wanted {_described(hints[name])}, got {value!r}.")


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else re.sub(r"typing\.|collections\.abc\.", "", str(hint))


def _fits(value: Any, hint: Any) -> bool:
    """Unlike for Python, a flag is no number here, and an empty text no empty list."""
    flags = any(kind in (bool, object, Any) or isinstance(kind, bool) for kind in _types(hint))
    conf = BeartypeConf(is_pep484_tower=True)
    return all(
        is_bearable(part, hint, conf=conf) and (flags or not isinstance(leaf, bool)) for part, leaf in _thinned(value)
    )


def _types(hint: Any) -> set[Any]:
    """A type and all that it is made of."""
    return {hint}.union(*map(_types, typing.get_args(hint)))


def _thinned(value: Any) -> Iterator[tuple[Any, Any]]:
    """A value with one entry alone in each list and mapping, in all ways: beartype looks at one at random.

    And that entry.
    """
    if isinstance(value, list) and value:
        yield from (([part], leaf) for entry in value for part, leaf in _thinned(entry))
    elif isinstance(value, dict) and value:
        yield from (({key: part}, leaf) for key, entry in value.items() for part, leaf in _thinned(entry))
    else:
        yield "text" if value == "" else value, value
