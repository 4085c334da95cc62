"""All processes of a run do the same."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch

from detr import distributed
from detr.config import plain
from detr.contents import flat

# What may differ between machines. Where data are is one of these: what they are is compared when they are read.
_OF_A_MACHINE = ("run_dir", "device", "debug", "data.workers", "data.root", "data.train.", "data.val.", "data.prepare")


def check_processes(config: Any) -> None:
    """Raise UserError, in all processes, where one has another configuration or other code than process 0."""
    if not distributed.launched():
        return
    options = {name: value for name, value in flat(plain(config)) if not name.startswith(_OF_A_MACHINE)}
    packages = ("detr", "datasets", *config.allow_targets)
    code = {f"the code of {name}": _digest(name) for name in packages if name in sys.modules}
    distributed.check_same({**options, **code, "the version of torch": torch.__version__})


def _digest(package: str) -> str:
    """Of the sources of a package that is loaded, or of a module."""
    file = Path(sys.modules[package].__file__ or "")
    sources = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    digest = hashlib.sha256()
    for source in sources if file.name else []:
        digest.update(source.relative_to(file.parent).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()[:12]
