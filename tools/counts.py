"""Parameters and operations of models."""

from collections.abc import Callable

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(call: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention in a call; a multiplication and its addition are two."""
    # Fused kernels of attention are not counted on every device, the products that they are made of always are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()
