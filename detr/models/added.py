"""What is added to pre-trained layers."""

from collections.abc import Iterator

from torch import nn


class Added(nn.Module):
    """A new part beside or between layers that may be pre-trained, such as attention blocks in a backbone.

    It trains with the main learning rate, goes on training where the layers are frozen, and may be missing in a file
    of weights.
    """


def added_to(module: nn.Module) -> Iterator[Added]:
    """The new parts inside a module."""
    return (part for part in module.modules() if isinstance(part, Added))
