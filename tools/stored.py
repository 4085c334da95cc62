"""Configurations from files, which may come from anywhere: plain values, of which only models and losses are built."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from detr.config import MODELS, build_criterion, build_model
from detr.errors import UserError
from detr.files import read_regular
from detr.losses import SetCriterion
from detr.weights.version1 import is_of_version1, upgraded_model

_MOST, _DEEPEST = 2**18, 50  # bytes and levels of a configuration; those of train.py have about 5,000 and 7


def add_allow_targets(parser: argparse.ArgumentParser) -> None:
    """The option --allow-targets, as a list of packages."""
    parser.add_argument(
        "--allow-targets",
        default=[],
        type=lambda text: text.split(","),
        metavar="PACKAGE,...",
        help="packages of your own that models are built from, beside detr.models",
    )


def read_config(path: Path) -> Any:
    """The content of a YAML file, in which `${...}` is text like any other.

    Raises UserError where it is no regular file or too large, and yaml.YAMLError where it is no YAML, is nested too
    deeply, or repeats parts by alias, which can make a short file endless.
    """
    text = read_regular(path, _MOST).decode()
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            raise yaml.YAMLError("it has an alias" if depth <= _DEEPEST else "it is nested too deeply")
    return yaml.safe_load(text)


def build_stored_model(config: Any, num_classes: int, path: Path, packages: Sequence[str]) -> nn.Module:
    """The model of a configuration that the file `path` holds, with random weights.

    It is built from detr.models and from the `packages` that the user named. What the file allows itself is no
    permission. A configuration of version 1 is built as today's. Raises UserError with the file's path.
    """
    if is_of_version1(config):
        config = _upgraded(config, path)
    with _named(path):
        return build_model(config, num_classes, pretrained=False, allow=(*MODELS, *packages))


def build_stored_criterion(config: Any, num_classes: int, path: Path, packages: Sequence[str]) -> SetCriterion:
    """Likewise the criterion, from detr.losses and the user's packages."""
    with _named(path):
        return build_criterion(config, num_classes, allow=("detr.losses", *packages))


def _upgraded(config: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return upgraded_model(config, path)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: model is none of version 1, which it looks like ({error!r}). Use an intact copy."
        ) from None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        reason = str(error).replace("allow_targets=[PACKAGE]", "--allow-targets PACKAGE")
        raise UserError(f"{path}: {reason}") from None
