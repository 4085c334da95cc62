"""Where the commands, configs/ and datasets/ are: inside of an installed package, beside the package in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE / "commands" if (_PACKAGE / "commands").is_dir() else _PACKAGE.parent
CONFIGS = ROOT / "configs"
