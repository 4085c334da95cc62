"""Objects from `_target_` nodes, which are checked first."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from detr.config.check import KEYWORDS, check_nodes, plain
from detr.config.targets import FRAMEWORK, resolve
from detr.errors import UserError
from detr.losses import SetCriterion


def build_model(
    config: Any, num_classes: int, *, pretrained: bool = True, allow: Sequence[str] = FRAMEWORK
) -> nn.Module:
    """The detector that a `model` configuration describes, with random or pre-trained weights as that says.

    pretrained: false gives random weights in any case, for where a checkpoint's follow: nothing is downloaded.
    """
    allow, config = _allowed(config, allow), plain(config)
    if not pretrained:
        config = _without_weights(config)
    model = build(config, path="model", allow=allow, num_classes=num_classes) if isinstance(config, dict) else None
    if not isinstance(model, nn.Module):
        raise UserError("model: wanted the options of a detector with its _target_, such as detr.models.detr.DETR.")
    return model


def _without_weights(content: Any) -> Any:
    """The content with `weights: null` in every node that has such an option, wherever it is."""
    if isinstance(content, list):
        return [_without_weights(value) for value in content]
    if not isinstance(content, dict):
        return content
    cleaned = {key: _without_weights(value) for key, value in content.items()}
    return {**cleaned, "weights": None} if {"_target_", "weights"} <= cleaned.keys() else cleaned


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


def build_reader(config: Any, *, path: str, masks: bool, allow: Sequence[str] = FRAMEWORK) -> Any:
    """What the reader of a part of the data gives. masks: of the objects too.

    Raises UserError as `build` does, and where masks are wanted of a reader that reads none.
    """
    content, allow = plain(config), _allowed(config, allow)
    if not masks or not isinstance(content, dict) or "_target_" not in content:
        return build(content, path=path, allow=allow)
    target = content["_target_"]
    if "masks" not in inspect.signature(resolve(target, path, allow)).parameters:
        raise UserError(
            f"{path}: {target} reads no masks, which model.masks is to learn. Choose data in a format with masks, such "
            "as data=coco, or set model/masks=none."
        )
    return build(content, path=path, allow=allow, masks=True)


def build(config: Any, *, path: str, allow: Sequence[str] = FRAMEWORK, **arguments: Any) -> Any:
    """What a node's `_target_` makes of its options and further `arguments`.

    path: the node's place in the configuration, for messages. allow: packages whose classes may be built, beside those
    in `allow_targets` of the composed configuration that the node is part of.
    Raises UserError for a target outside them, an unknown or missing option, a value of a wrong type, and a value that
    the part refuses.
    """
    allow, content = _allowed(config, allow), plain(config)
    check_nodes(content, path=path, allow=allow, given=arguments)
    return _built(content, path, allow, arguments)


def _allowed(config: Any, allow: Sequence[str]) -> Sequence[str]:
    own = OmegaConf.select(config._get_root(), "allow_targets", default=()) if isinstance(config, DictConfig) else ()
    return (*allow, *own)


def _built(content: Any, path: str, allow: Sequence[str], given: Mapping[str, Any]) -> Any:
    """The content with an object in place of each node, inner ones first, in the order of their options."""
    if isinstance(content, list):
        return [_built(value, f"{path}[{index}]", allow, {}) for index, value in enumerate(content)]
    if not isinstance(content, dict):
        return content
    options = {key: _built(value, f"{path}.{key}", allow, {}) for key, value in content.items() if key not in KEYWORDS}
    if "_target_" not in content:
        return options
    part = _Part(resolve(content["_target_"], path, allow), **{**options, **given})
    part.path = path
    return part if content.get("_partial_") else part()


class _Part(partial[Any]):
    """A class or function with its options, to be called. Errors of the user begin with their place, `path`."""

    path: str

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValueError as error:
            text = str(error)
            if isinstance(error, UserError) and text.startswith((f"{self.path}.", f"{self.path}:", f"{self.path}[")):
                raise
            raise UserError(
                self._placed(text if isinstance(error, UserError) else f"{text}. Correct the option.")
            ) from error

    def _placed(self, text: str) -> str:
        """A message of the part, which begins with its class or one of its parameters, or with neither."""
        text = text.removeprefix(f"{getattr(self.func, '__name__', '')}: ")
        names_option = text.partition(":")[0] in inspect.signature(self.func).parameters
        return f"{self.path}.{text}" if names_option else f"{self.path}: {text}"
