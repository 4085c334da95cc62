"""Models and losses of configurations from files, which may come from anywhere.

Nothing else is built from such a configuration, and what it allows itself is no permission.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from detr.config.build import build_criterion, build_model
from detr.config.targets import MODELS
from detr.errors import UserError
from detr.losses import SetCriterion
from detr.weights import Weights, check_state
from detr.weights.version1 import is_of_version1, upgraded_model

# Limits of a stored model, far above those of any detector: DINO with a ResNet-101 has 700 tensors, 7 * 10^7 numbers. A
# backbone of timm counts twice, as it is sketched itself.
_MOST_TENSORS, _MOST_NUMBERS = 10_000, 10**9


def build_stored_model(
    config: Any,
    num_classes: int,
    source: Weights | str | Path,
    packages: Sequence[str] = (),
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model of a configuration from a file, with random weights.

    It is sketched without data first: one of absurd size, or with other tensors than the file holds, is never made. A
    configuration of version 1 is built as today's.

    source: the file, for messages. packages: those that the user allows it to be built from, beside detr.models.
    state: the weights that the file holds, if it holds any. Raises UserError.
    """
    if is_of_version1(config):
        config = _upgraded(config, source)
    allow = (*MODELS, *packages)
    with _named(source):
        sketch = _sketch(config, num_classes, allow)
    if state is not None:
        check_state(sketch, state, source)
    with _named(source):
        return build_model(config, num_classes, pretrained=False, allow=allow)


def build_stored_criterion(config: Any, num_classes: int, source: object, packages: Sequence[str] = ()) -> SetCriterion:
    """Likewise the criterion, from detr.losses and the user's packages."""
    with _named(source):
        return build_criterion(config, num_classes, allow=("detr.losses", *packages))


def _sketch(config: Any, num_classes: int, allow: Sequence[str]) -> nn.Module:
    try:
        with _limited(), torch.device("meta"):
            return build_model(config, num_classes, pretrained=False, allow=allow)
    except (RuntimeError, MemoryError, ArithmeticError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"model cannot be built ({type(error).__name__}: {reason}). Use an intact file.") from None


@contextmanager
def _limited() -> Iterator[None]:
    """Refuse a model that grows beyond all measure while it is built."""
    tensors = numbers = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, numbers
        tensors, numbers = tensors + 1, numbers + (0 if tensor is None else tensor.numel())
        if tensors > _MOST_TENSORS or numbers > _MOST_NUMBERS:
            raise UserError(
                f"model: wanted at most {_MOST_TENSORS} tensors of {_MOST_NUMBERS} numbers in all, got more than any "
                "detector has: its sizes are damaged. Use an intact file."
            )

    hooks = (
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _upgraded(config: dict[str, Any], source: object) -> dict[str, Any]:
    try:
        return upgraded_model(config, source)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source}: model is none of version 1, which it looks like ({error!r}). Use an intact copy."
        ) from None


@contextmanager
def _named(source: object) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
