"""Where the commands, configs/ and datasets/ are: inside of an installed package, beside the package in a checkout."""

import re
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE / "commands" if (_PACKAGE / "commands").is_dir() else _PACKAGE.parent
CONFIGS = ROOT / "configs"


def command(name: str) -> str:
    """How a user starts NAME.py or tools/NAME.py; it is detr-NAME where that is installed or such a command runs."""
    # sys.argv has the script that an installed command runs.
    if ROOT.parent == _PACKAGE or any(re.fullmatch("detr-[a-z-]+", Path(word).name) for word in sys.orig_argv):
        return f"detr-{name.replace('_', '-')}"
    return f"python {name}.py" if (ROOT / f"{name}.py").is_file() else f"python tools/{name}.py"
