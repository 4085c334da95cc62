"""What a training is about to do, in words."""

from torch import nn


def describe_model(model: nn.Module) -> str:
    """How many parameters a model has, and which of its parts do not train."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    training = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = ", ".join(_frozen(model))
    return f"{_amount(everything)} parameters, {_amount(training)} train" + (f"; frozen: {frozen}" if frozen else "")


def _frozen(module: nn.Module, name: str = "") -> list[str]:
    """The largest parts that have parameters, but none that trains."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if not trains or all(trains):
        return []
    if not any(trains):
        return [name or "everything"]
    return [part for child, inner in module.named_children() for part in _frozen(inner, f"{name}.{child}".lstrip("."))]


def _amount(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"
