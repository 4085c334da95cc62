"""Parameter groups, learning-rate schedules, and what an optimizer keeps from step to step."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from detr.contents import FLOATS, Check, Misfit, check_content, items, mapping, record, saved, tensor, text, whole
from detr.errors import UserError
from detr.models.added import added_to
from detr.models.backbones.base import Backbone
from detr.ranges import checked, non_negative

logger = logging.getLogger(__name__)

_AT_BACKBONE_RATE = ("backbone.", "encoder.position.")


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    backbone_lr: float = 1e-5,
    layer_decay: float = 1.0,
    lr_factors: Mapping[str, float | None] | None = None,
    weight_decay: float = 1e-4,
    weight_decays: Mapping[str, float | None] | None = None,
    betas: Sequence[float] = (0.9, 0.999),
) -> AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) with a learning rate of its own for the backbone.

    model: its part `backbone` is what backbone_lr is for, and `encoder.position`: published DETR counts learned
        positions as a part of the backbone. What is new in the backbone, such as attention blocks, trains at `lr`.
        Only parameters that train are in the groups.
    lr, backbone_lr: learning rates before the schedule. train.py freezes the backbone where backbone_lr is 0, as
        published DETR does.
    layer_decay: in (0, 1]; the rate of a backbone's layer is backbone_lr times its power to the number of layers above
        that one (BEiT: Bao et al., ICLR 2022), so that early layers, which are the most general, change the least.
    lr_factors: factors on the rate of parameters with such a text in their name; Deformable DETR trains sampling
        offsets and reference points at a tenth.
    weight_decay: on all parameters. weight_decays: another one for parameters with such a text in their name; norms and
        biases are often left without.

    The first text that a name contains counts, and one with None is left out; `backbone.STAGE`, such as
    backbone.layer2, means that stage without its attention blocks. Rates, factors and decays are at least 0, betas at
    least 0 and below 1.
    Raises UserError for other values, for a text that no name contains, and for a model of which nothing trains.
    """
    factors, decays = _there(lr_factors), _there(weight_decays)
    for name, rate in (("lr", lr), ("backbone_lr", backbone_lr)):
        checked(rate, name, "a learning rate of at least 0", non_negative)
    checked(layer_decay, "layer_decay", "above 0 and at most 1", lambda value: 0 < value <= 1)
    checked(weight_decay, "weight_decay", "at least 0", non_negative)
    for name, special in (("lr_factors", factors), ("weight_decays", decays)):
        checked(special, name, "numbers of at least 0", lambda special: all(map(non_negative, special.values())))
    checked(betas, "betas", "two numbers of at least 0 and below 1", _are_betas)
    new = {id(p) for part in added_to(model) for p in part.parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = getattr(model, "backbone", None)
    # Only where they are needed: some backbones make a whole network to count its layers.
    depths = _depths(backbone) if layer_decay < 1 else {}
    stages = _stages(backbone)
    top = max(depths.values(), default=0)

    def means(part: str, name: str) -> bool:
        return part in name or part == stages.get(name)

    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        of_backbone = name.startswith(_AT_BACKBONE_RATE) and id(parameter) not in new
        rate, group = (backbone_lr, "lr_backbone") if of_backbone else (lr, "lr")
        if name in depths:
            rate, group = rate * layer_decay ** (top - depths[name]), f"{group}_{depths[name]}"
        parts = [next((part for part in special if means(part, name)), "") for special in (factors, decays)]
        group = "_".join([group, *filter(None, dict.fromkeys(parts))])
        options = {"lr": rate * factors.get(parts[0], 1.0), "weight_decay": decays.get(parts[1], weight_decay)}
        groups.setdefault(group, {"name": group, **options, "params": []})["params"].append(parameter)
    for option, special in (("lr_factors", factors), ("weight_decays", decays)):
        for part in special:
            if not any(means(part, name) for name in trained):
                raise UserError(
                    f"optimizer.{option}: no parameter that trains has '{part}' in its name. Remove or correct it."
                )
    if not groups:
        raise UserError("Nothing in the model trains. Let a part train: see model.backbone.freeze and trainer.freeze.")
    return AdamW([*groups.values()], lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), fused=True)


def _there(special: Mapping[str, float | None] | None) -> dict[str, float]:
    return {text: value for text, value in (special or {}).items() if value is not None}


def _depths(backbone: Any) -> dict[str, int]:
    """How deep each of the backbone's own parameters is, by name in the model."""
    if not isinstance(backbone, Backbone):
        return {}
    return {f"backbone.{name}": depth for name, depth in backbone.depths().items()}


def _stages(backbone: Any) -> dict[str, str]:
    """The stage of each of the backbone's own parameters as `backbone.STAGE`, by name in the model."""
    if not isinstance(backbone, Backbone):
        return {}
    names = {id(parameter): f"backbone.{name}" for name, parameter in backbone.named_parameters()}
    return {names[id(p)]: f"backbone.{stage}" for stage in backbone.stages for p in backbone.parameters_of(stage)}


def _are_betas(values: Sequence[float]) -> bool:
    return len(values) == 2 and all(non_negative(value) and value < 1 for value in values)


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What an optimizer keeps of each of its parameters, by name; nothing of those that have not trained yet."""
    parameters = _parameters(optimizer, model)
    state = {name: dict(optimizer.state.get(parameter, {})) for name, parameter in parameters.items()}
    return {"class": type(optimizer).__name__, "state": state}


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, content: Any, source: object) -> None:
    """Go on from what `optimizer_state` gave. Its options, such as rates, stay as they are configured.

    Parameters that it has nothing of start anew, and a warning says how many. source: the checkpoint, for messages.
    Raises UserError where the content is damaged.
    """
    parameters = _parameters(optimizer, model)
    state = _state_of(content, optimizer, parameters, source)
    for name in parameters.keys() & state.keys():
        if isinstance(optimizer, Adam) and state[name]:
            check_content(state[name], _adam_state(parameters[name]), f"{source}: the optimizer's state of {name}")
    by_position = {index: state[name] for index, name in enumerate(parameters) if state.get(name)}
    optimizer.load_state_dict({"state": by_position, "param_groups": optimizer.state_dict()["param_groups"]})
    if anew := [name for name in parameters if name not in state]:
        message = "The optimizer's state of %d of %d parameters starts anew, since the checkpoint has none of them: %s."
        logger.warning(message, len(anew), len(parameters), _listed(anew))
    if unused := [name for name in state if name not in parameters]:
        message = "The optimizer's state of %d parameters is left out, since they do not train now: %s."
        logger.warning(message, len(unused), _listed(unused))


def _parameters(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all groups in their order, by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def _state_of(
    content: Any, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], source: object
) -> dict[str, dict[str, Any]]:
    """By name; none where it is of an optimizer of another class."""
    if isinstance(content, dict) and "param_groups" in content:
        return _state_by_position(content, optimizer, parameters, source)
    check_content(content, record(**{"class": text, "state": mapping(mapping(saved))}), f"{source}: the optimizer")
    return content["state"] if content["class"] == type(optimizer).__name__ else {}


def _state_by_position(
    content: dict[str, Any], optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], source: object
) -> dict[str, dict[str, Any]]:
    """Of a checkpoint of version 2, which has numbers for names: they mean something in the same groups only."""
    group = record(name=text, params=items(whole()))
    check_content(content, record(param_groups=items(group), state=_of_numbers), f"{source}: the optimizer")
    before = [(group["name"], len(group["params"])) for group in content["param_groups"]]
    if before != [(group["name"], len(group["params"])) for group in optimizer.param_groups]:
        raise UserError(
            f"{source} has no training state of these parameter groups: it has {_groups(before)}. Resume with the "
            "same model and optimizer options, or start anew from its weights with weights=PATH."
        )
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    return {name: content["state"].get(number, {}) for name, number in zip(parameters, numbers, strict=True)}


def _of_numbers(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise Misfit(place, "a dict", value)
    mapping(mapping(saved))({str(number): state for number, state in value.items()}, place)


def _adam_state(parameter: nn.Parameter) -> Check:
    """What Adam keeps of a parameter: its number of steps, and two averages of its gradient's shape."""
    shape = parameter.shape
    return record(
        step=tensor(*FLOATS, shape=(), least=0),
        exp_avg=tensor(*FLOATS, shape=shape, least=-math.inf),
        exp_avg_sq=tensor(*FLOATS, shape=shape, least=0),
    )


def _groups(groups: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} of {count}" for name, count in groups)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


@runtime_checkable
class Schedule(Protocol):
    """A factor on all learning rates, a function of the position in the training alone."""

    def __call__(self, step: int, total_steps: int) -> float: ...


class StepDecay:
    """Multiply by `gamma` after each of the given fractions of the training.

    drops: fractions in (0, 1). gamma: at least 0.
    warmup: fraction of the training with a linear rise from 0 at its start. warmup_steps: its length in steps instead.
    """

    def __init__(
        self, *, drops: Sequence[float], gamma: float = 0.1, warmup: float = 0.0, warmup_steps: int | None = None
    ) -> None:
        if not all(0 < drop < 1 for drop in drops):
            raise UserError(f"StepDecay: wanted drops as fractions between 0 and 1, got {list(drops)}.")
        self.drops, self.gamma = list(drops), checked(gamma, "gamma", "at least 0", non_negative)
        self.warmup = Warmup(warmup, warmup_steps)

    def __call__(self, step: int, total_steps: int) -> float:
        passed = sum(step >= round(drop * total_steps) for drop in self.drops)
        return self.gamma**passed * self.warmup(step, total_steps)


class Cosine:
    """Half a cosine from 1 to `final` (Loshchilov & Hutter, ICLR 2017).

    final: at least 0. warmup, warmup_steps: as in StepDecay.
    """

    def __init__(self, *, final: float = 0.0, warmup: float = 0.0, warmup_steps: int | None = None) -> None:
        self.final = checked(final, "final", "at least 0", non_negative)
        self.warmup = Warmup(warmup, warmup_steps)

    def __call__(self, step: int, total_steps: int) -> float:
        start = self.warmup.length(total_steps)
        progress = max(step - start, 0) / max(total_steps - start, 1)
        factor = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return factor * self.warmup(step, total_steps)


class FlatCosine:
    """Constant, then half a cosine down to `final`, then constant again (RTMDet: Lyu et al., 2022; DEIM: Huang et al.,
    CVPR 2025).

    flat, until: fractions of the training at which the cosine begins and ends, flat at least 0 and at most until, until
        at most 1; with flat=1 the rate never falls.
    final: at least 0. warmup, warmup_steps: as in StepDecay.
    warmup_power: of that rise, above 0; 1 is linear, 2 quadratic.
    """

    def __init__(
        self,
        *,
        flat: float,
        until: float = 1.0,
        final: float = 0.0,
        warmup: float = 0.0,
        warmup_steps: int | None = None,
        warmup_power: float = 1.0,
    ) -> None:
        self.until = checked(until, "until", "at least 0 and at most 1", lambda value: 0 <= value <= 1)
        self.flat = checked(flat, "flat", f"at least 0 and at most until={until}", lambda value: 0 <= value <= until)
        self.final = checked(final, "final", "at least 0", non_negative)
        self.warmup = Warmup(warmup, warmup_steps, warmup_power)

    def __call__(self, step: int, total_steps: int) -> float:
        begin, end = round(self.flat * total_steps), round(self.until * total_steps)
        progress = min(max(step - begin, 0) / max(end - begin, 1), 1.0)
        factor = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return factor * self.warmup(step, total_steps)


class Warmup:
    """A rise from 0 to 1 at the start of the training.

    fraction: of the training, in [0, 1). steps: its length in steps instead, at least 1.
    power: above 0; 1 is a linear rise, 2 a quadratic one.
    """

    def __init__(self, fraction: float, steps: int | None, power: float = 1.0) -> None:
        if not 0 <= fraction < 1:
            raise UserError(f"Schedule: wanted warmup as a fraction of the training in [0, 1), got {fraction}.")
        if steps is not None:
            checked(steps, "warmup_steps", "at least 1", lambda value: value >= 1)
        self.fraction, self.steps = fraction, steps
        self.power = checked(power, "warmup_power", "a number above 0", lambda value: 0 < value < math.inf)

    def length(self, total_steps: int) -> int:
        return round(self.fraction * total_steps) if self.steps is None else self.steps

    def __call__(self, step: int, total_steps: int) -> float:
        return min((step + 1) / max(self.length(total_steps), 1), 1.0) ** self.power
