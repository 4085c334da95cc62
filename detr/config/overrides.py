"""What is written on the command line, in Hydra's grammar."""

import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

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


def quoted(text: str) -> str:
    """In single quotes; backslashes count as such only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text) + "'"


def _is_valid(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
