"""What a training is about to do, in words."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def describe_model(model: nn.Module) -> str:
    """How many parameters a model has, and which of its parts do not train."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    training = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = dict(_frozen(model))
    norms = sum(isinstance(part, _BatchNorm) for part in parts.values())
    named = [name for name, part in parts.items() if not isinstance(part, _BatchNorm)]
    frozen = ", ".join(named + ([f"{norms} batch norms"] if norms else []))
    return f"{_amount(everything)} parameters, {_amount(training)} train" + (f"; frozen: {frozen}" if frozen else "")


def _frozen(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The largest parts that have parameters, but none that trains, by name."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if not trains or all(trains):
        return []
    if not any(trains):
        return [(name or "everything", module)]
    return [part for child, inner in module.named_children() for part in _frozen(inner, f"{name}.{child}".lstrip("."))]


def _amount(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"
