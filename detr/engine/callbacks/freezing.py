"""Parts of the model that do not train, for good or up to a time."""

from collections.abc import Mapping

from torch import nn

from detr.engine.trainer import Callback, Trainer
from detr.errors import UserError


class Freezing(Callback):
    """Parts train or not, by the step; the statistics of their batch norms stay as well while they do not.

    parts: by name, each with the time from which it trains: an epoch, as a whole number; a fraction of the training's
        steps, with a point; or None: never.
    Raises UserError for a part that the model does not have.
    """

    def __init__(self, *, model: nn.Module, parts: Mapping[str, int | float | None]) -> None:
        self.parts = parts
        self.parameters = {part: _trainable(model, part) for part in parts}

    def on_epoch_start(self, trainer: Trainer) -> None:
        before = [parameter.requires_grad for parameter in trainer.model.parameters()]
        for part in self.parts:
            start = self._start(trainer, part)
            trains = start is not None and trainer.state.step >= start
            for parameter in self.parameters[part]:
                parameter.requires_grad_(trains)
            if not trains:
                trainer.model.get_submodule(part).eval()
        if before != [parameter.requires_grad for parameter in trainer.model.parameters()]:
            trainer.update.parallelize()

    def on_step_end(self, trainer: Trainer, losses: Mapping[str, float]) -> None:
        if trainer.state.step in [self._start(trainer, part) for part in self.parts]:
            trainer.model.train()
            self.on_epoch_start(trainer)

    def _start(self, trainer: Trainer, part: str) -> int | None:
        """The steps that are done when a part begins to train."""
        time = self.parts[part]
        if isinstance(time, float):
            return round(time * trainer.total_steps)
        return None if time is None else time * trainer.epoch_steps


def _trainable(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters of a part of the model that train without this callback."""
    try:
        return [parameter for parameter in model.get_submodule(part).parameters() if parameter.requires_grad]
    except AttributeError:
        known = [name for name, _ in model.named_children()]
        raise UserError(
            f"trainer.freeze: the model has no part '{part}'; its parts are {', '.join(known)}, and parts of these by "
            "dotted names."
        ) from None
