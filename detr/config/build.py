"""Objects from `_target_` nodes, checked before they are built. The only caller of hydra.utils.instantiate."""

import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import hydra.utils
from beartype import BeartypeConf
from beartype.door import is_bearable
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detr.errors import UserError
from detr.evaluation.backends import check_backend
from detr.losses import SetCriterion

# What a configuration may build. A prefix admits a package's own classes and functions, not what it imports.
FRAMEWORK = ("detr", "datasets", "torchvision.transforms.v2")
# What a configuration inside a checkpoint may build: a file from elsewhere is not to be trusted with more.
MODELS = ("detr.models",)

# The least value of options that only a number within limits makes sense for.
_LEAST = {
    "data.batch_size": 1,
    "data.workers": 0,
    "data.pad_to": 1,
    "data.size": 1,
    "data.max_size": 1,
    "trainer.epochs": 1,
    "trainer.max_steps": 1,
    "trainer.accumulate": 1,
    "trainer.clip_norm": 0,
    "trainer.evaluate_every": 1,
    "trainer.patience": 1,
    "trainer.save_every_steps": 0,
    "trainer.save_every_minutes": 0,
    "trainer.keep": 1,
    "trainer.limit_epoch_steps": 1,
    "trainer.limit_evaluation_images": 1,
    "trainer.overfit_batches": 1,
    "trainer.max_skips": 0,
    "trainer.timeout": 0.1,
    "evaluation.max_dets": 11,  # AR10 is reported too
    "log_every": 1,
    "seed": 0,
    "batch_size": 1,
    "size": 1,
    "max_size": 1,
}
# Arguments that are not in the configuration, but known when a node is built.
_GIVEN_LATER = {"model": ("num_classes",), "criterion": ("num_classes",), "optimizer": ("model",)}


def plain(config: Any) -> Any:
    """A configuration as dicts and lists with everything filled in; it must lack nothing."""
    return (
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True) if OmegaConf.is_config(config) else config
    )


def build_model(
    config: Any, num_classes: int, *, pretrained: bool = True, allow: Sequence[str] = FRAMEWORK
) -> nn.Module:
    """The detector that a `model` configuration describes, with random or pre-trained weights as that says.

    pretrained: off, random weights in any case: nothing is downloaded where a checkpoint's will replace them.
    """
    allow, config = _allowed(config, allow), plain(config)
    if not pretrained and isinstance(config, dict) and isinstance(config.get("backbone"), dict):
        config = {**config, "backbone": {**config["backbone"], "weights": None}}
    model = build(config, path="model", allow=allow, num_classes=num_classes) if isinstance(config, dict) else None
    if not isinstance(model, nn.Module):
        raise UserError("model: wanted the options of a detector with its _target_, such as detr.models.detr.DETR.")
    return model


def build_criterion(config: Any, num_classes: int, allow: Sequence[str] = FRAMEWORK) -> SetCriterion:
    """The set loss with its matcher that a `criterion` configuration describes."""
    return build(config, path="criterion", allow=allow, num_classes=num_classes)


def build_block(config: Any, name: str, channels: int) -> nn.Module:
    """One attention block alone, as the composed configuration of a detector has it in `model.attention`.

    Raises UserError where there is none of that name.
    """
    placements = config.model.attention
    if name not in placements:
        there = ", ".join(placements) or "none"
        raise UserError(
            f"model.attention has no block '{name}', only: {there}. Compose the configuration with "
            f"model/attention={name}."
        )
    return build(placements[name].block, path=f"model.attention.{name}.block")(channels)


def build(config: Any, *, path: str, allow: Sequence[str] = FRAMEWORK, **arguments: Any) -> Any:
    """What a node's `_target_` makes of its options and further `arguments`.

    path: the node's place in the configuration, for messages. allow: packages whose classes may be built, beside those
    in `allow_targets` of the composed configuration that the node is part of.
    Raises UserError for a target outside them, an unknown or missing option, or a value of a wrong type.
    """
    allow, content = _allowed(config, allow), plain(config)
    _check(content, path=path, allow=allow, given=arguments)
    try:
        return hydra.utils.instantiate(content, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError) and not isinstance(error.__cause__, UserError):
            raise UserError(f"{path}: {error.__cause__}. Correct the option.") from None
        raise (error.__cause__ or error) from None


def _allowed(config: Any, allow: Sequence[str]) -> Sequence[str]:
    own = OmegaConf.select(config._get_root(), "allow_targets", default=()) if isinstance(config, DictConfig) else ()
    return (*allow, *own)


def check_config(config: DictConfig) -> None:
    """Check everything that a composed configuration will build, before any work starts; raises UserError."""
    allow = (*FRAMEWORK, *config.allow_targets)
    for name, node in plain(config).items():
        _check(node, path=name, allow=allow, given=_GIVEN_LATER.get(name, ()))
    for place, least in _LEAST.items():
        value = OmegaConf.select(config, place)
        if value is not None and value < least:
            raise UserError(f"{place}: wanted at least {least}, got {value}.")
    backend = OmegaConf.select(config, "evaluation.backend")
    if backend is not None:
        check_backend(backend, "evaluation.backend: wanted")


def _check(config: Any, *, path: str, allow: Sequence[str], given: Collection[str]) -> None:
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
        # What instantiate would turn into more nodes after this check.
        raise UserError(f"{path}: {config!r} is refused. Write plain values: texts, numbers, lists and mappings.")


def _check_node(node: Mapping[str, Any], path: str, allow: Sequence[str], given: Collection[str]) -> None:
    target = _resolve(node["_target_"], path, allow)
    options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_", "_convert_")}
    if reserved := [key for key in options if str(key).startswith("_")]:
        raise UserError(f"{path}: the key {reserved[0]} is not used here. Remove it.")
    parameters = inspect.signature(target).parameters
    for name in options:
        if name not in parameters:
            known = [known for known in parameters if known not in given]
            close = get_close_matches(str(name), known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(
                f"{path}.{name} is not an option of {node['_target_']}, whose options are {', '.join(known)}.{hint}"
            )
    if not node.get("_partial_"):
        supplied = {*options, *given}
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD and name not in supplied
        ]
        if missing:
            raise UserError(f"{path}: {node['_target_']} needs the option {missing[0]}. Set {path}.{missing[0]}.")
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in options.items():
        if not isinstance(value, dict) and name in hints and not _fits(value, hints[name]):
            wanted = str(hints[name]).replace("typing.", "").replace("collections.abc.", "")
            wanted = hints[name].__name__ if isinstance(hints[name], type) else wanted
            raise UserError(f"{path}.{name}: wanted {wanted}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    return is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True))


def _resolve(target: Any, path: str, allow: Sequence[str]) -> Callable[..., Any]:
    """The class or function of a dotted path, refused where it is not defined inside an allowed package."""
    refusal = UserError(
        f"{path}._target_: '{target}' is refused, because a configuration could run any code otherwise; allowed are "
        f"classes and functions of {', '.join(allow)}. If you trust it, name its package in allow_targets=[PACKAGE]."
    )
    if not isinstance(target, str) or not _inside(target, allow) or "._" in target:
        raise refusal
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}._target_: '{target}' does not exist ({reason}). Correct the dotted path.") from None
    if not callable(found) or not _inside(f"{getattr(found, '__module__', '')}.", allow):
        raise refusal
    return found


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name.startswith(f"{package}.") for package in packages)
