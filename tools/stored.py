"""Configurations from files, which may come from anywhere, read as plain values."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from detr.files import read_regular

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
