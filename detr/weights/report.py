"""What became of the weights that a training starts from, in words."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from detr.text import printable

_OTHERS = "others"  # what is no part of the model


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` made of each tensor, by name.

    source: where the weights are from. loaded: taken over. mapped: some rows taken over, and which; the others are as
    in a new model. fresh: as in a new model, and why. skipped: what the file has in excess, and why.
    classes: what became of the classes, line by line.
    """

    source: str
    loaded: list[str]
    mapped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A table: how many tensors of each part of the model. Below it the reasons, each with its number."""
        kinds: dict[str, Iterable[str]] = {"loaded": self.loaded, **self._reasons()}
        parts = dict.fromkeys(_part(name) for kind in ("loaded", "mapped", "fresh") for name in kinds[kind])
        counts = [Counter(_part(name) if _part(name) in parts else _OTHERS for name in kinds[kind]) for kind in kinds]
        rows = [*parts, *([_OTHERS] if any(count[_OTHERS] for count in counts) else [])]
        width = max(map(len, ["tensors", *rows]))
        table: list[tuple[str, Sequence[str | int]]] = [("tensors", [*kinds])]
        table += [(row, [count[row] for count in counts]) for row in rows]
        table += [("all", [count.total() for count in counts])]
        lines = [f"{name:{width}}" + "".join(f"{cell or '-':>9}" for cell in cells) for name, cells in table]
        for kind, reasons in self._reasons().items():
            lines += [f"{kind} {count}: {reason}" for reason, count in Counter(reasons.values()).items()]
        return "\n  ".join([f"Weights from {self.source}:", *lines, *self.classes])

    def listing(self) -> str:
        """A line for each tensor: what became of it, its name, and why."""
        lines = [f"loaded   {name}" for name in self.loaded]
        for kind, reasons in self._reasons().items():
            lines += [f"{kind:8} {printable(name)}: {reason}" for name, reason in reasons.items()]
        return "\n".join([f"Weights from {self.source}", *self.classes, *lines]) + "\n"

    def _reasons(self) -> dict[str, Mapping[str, str]]:
        return {"mapped": self.mapped, "fresh": self.fresh, "skipped": self.skipped}


def _part(name: str) -> str:
    return name.partition(".")[0]
