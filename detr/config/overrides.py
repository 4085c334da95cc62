"""What is written on the command line, in Hydra's grammar."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from detr.errors import UserError
from detr.published import PUBLISHED

_CONTAINERS = ("[", "{", "'", '"')  # with which lists, mappings and quoted texts begin


def as_hydra_reads(override: str) -> str:
    """An override whose value may be any text, such as a path with spaces, brackets or ~, as Hydra's grammar wants it.

    A value that the grammar takes stays as it is, and so does one that begins like a list, a mapping or a quoted text.
    """
    name, equals, value = override.partition("=")
    if re.match(r"~(/|$)", value):
        value = str(Path(value).expanduser())
    if not equals or value.startswith(_CONTAINERS) or _is_valid(f"{name}={value}"):
        return f"{name}{equals}{value}"
    return f"{name}={quoted(value)}"


def with_model_of_weights(overrides: Sequence[str]) -> list[str]:
    """The overrides of a training, and before them what sets the model of `weights=NAME`, if NAME is a published one.

    Raises UserError where an override sets the same otherwise, and for a sweep of names.
    """
    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    name = given.get("weights", "")
    if name not in PUBLISHED:
        if not PUBLISHED.keys().isdisjoint(re.split(r"[,()\s]", name)):
            raise UserError(
                f"weights={name} has several values, each of which brings its own model. Start one command for each."
            )
        return list(overrides)
    options = PUBLISHED[name].options.split()
    for option in options:
        key, _, value = option.partition("=")
        if given.get(key, value) != value:
            raise UserError(
                f"weights={name} brings its own model, {' '.join(options)}; {key}={given[key]} is another one. Leave "
                "that out, or choose other weights."
            )
    return [*options, *overrides]


def quoted(text: str) -> str:
    """In single quotes; backslashes count as such only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text) + "'"


def _is_valid(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
