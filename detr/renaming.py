"""Dotted names of tensors under other names."""

import re
from collections.abc import Sequence

Rows = Sequence[tuple[str, str]]  # a part of the name there, and here; `#` stands for a number


class Renaming:
    """Replaces parts of dotted names, each part once and by the first row that fits."""

    def __init__(self, rows: Rows) -> None:
        self._rows = [(re.compile(_expression(old)), new.replace("#", r"\g<1>")) for old, new in rows]
        self._any = re.compile("|".join(pattern.pattern for pattern, _ in self._rows))

    def __call__(self, name: str) -> str:
        return self._any.sub(lambda match: self._replaced(match[0]), name)

    def _replaced(self, part: str) -> str:
        return next(pattern.sub(new, part) for pattern, new in self._rows if pattern.fullmatch(part))


def _expression(part: str) -> str:
    return r"(?<![^.])" + re.escape(part).replace(r"\#", r"(\d+)") + r"(?![^.])"
