"""What the rows of a tensor stand for, so that weights of other classes or queries can be a start."""

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Rows:
    """What the first dimension of a tensor counts.

    of: `classes`, in the order of their labels; `queries`; or `cells` along one side of a feature map.
    further: rows after those of the classes, such as that of no object.
    groups: of queries, one after the other, all of the same size.
    """

    of: Literal["classes", "queries", "cells"]
    further: int = 0
    groups: int = 1


class Rowed(nn.Module):
    """A part with tensors whose size follows the data or an option, and not the structure of the model."""

    def rows(self) -> dict[str, Rows]:
        """What the rows of its own tensors stand for, by their names inside it; names that it lacks do not count."""
        return {}


def rows_of(model: nn.Module) -> dict[str, Rows]:
    """The same of all parts of a model, by the names of its state dict."""
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, Rowed)]
    found = {f"{name}.{tensor}".lstrip("."): rows for name, part in parts for tensor, rows in part.rows().items()}
    return {name: found[name] for name in model.state_dict() if name in found}
