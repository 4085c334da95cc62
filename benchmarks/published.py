"""The published DETR code (facebookresearch/detr), imported from a checkout of it."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_PACKAGES = ("datasets", "engine", "main", "models", "util")


def load(checkout: Path, *names: str) -> list[ModuleType]:
    """Modules of the checkout. They stay out of sys.modules, because both sides have a package `datasets`."""
    ours = _taken_out()
    sys.path.insert(0, str(checkout))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(checkout))
        _taken_out()
        sys.modules.update(ours)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
