"""What checks of data find."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
_EXAMPLES = 3  # files that a finding names


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found in a part of a data set.

    kind: its name, the same in every data set.
    severity: a training stops at an error, learns something wrong from a warning, and is worth a look at a note.
    count: of the images, objects or classes that it is about.
    text: what is the matter, with the count and an example, as a sentence.
    advice: what to do about it, as further sentences.
    files: a few of the image files that show it.
    """

    kind: str
    severity: Severity
    count: int
    text: str
    advice: str
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} {self.advice}".strip()


def some(names: Iterable[str]) -> tuple[str, ...]:
    """The first few different names."""
    return tuple(dict.fromkeys(names))[:_EXAMPLES]


def worst(findings: Sequence[Finding]) -> Severity | None:
    """The severest among them; None where there is none."""
    order: tuple[Severity, ...] = ("error", "warning", "note")
    return min((finding.severity for finding in findings), key=order.index, default=None)
