"""What a training does beside its steps: averaging, freezing, evaluating, saving, ... One file an idea."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from detr import distributed
from detr.engine.callbacks.checkpointing import Checkpointing
from detr.engine.callbacks.early_stopping import EarlyStopping
from detr.engine.callbacks.freezing import Freezing
from detr.engine.callbacks.moving_average import MovingAverage
from detr.engine.callbacks.profiling import Profiling
from detr.engine.callbacks.restart import Restart
from detr.engine.callbacks.validation import Validation
from detr.engine.options import TrainerConfig
from detr.engine.trainer import Callback
from detr.errors import UserError
from detr.evaluation import CocoEvaluator, CocoResults

__all__ = [
    "Checkpointing",
    "EarlyStopping",
    "Freezing",
    "MovingAverage",
    "Profiling",
    "Restart",
    "Validation",
    "standard_callbacks",
]


def standard_callbacks(
    config: TrainerConfig,
    *,
    model: nn.Module,
    evaluator: CocoEvaluator,
    report: Callable[[CocoResults], None] | None = None,
    own: Any = None,
) -> dict[str, Callback]:
    """The callbacks of a training by name, in the order in which they run: those that its options ask for, and `own`.

    report: gets the detections of the last evaluation.
    own: further ones by name; None switches one off. They run before evaluations and checkpoints, which see their work.
    Raises UserError where one is no Callback, or has a name that is taken.
    """
    own = _checked({} if own is None else own)
    validation = Validation(evaluator=evaluator, monitor=config.monitor, report=report)
    checkpointing = Checkpointing(
        validation=validation, every_steps=config.save_every_steps, every_minutes=config.save_every_minutes
    )
    # Each sees what those before it did: the average the weights that are saved, a checkpoint the state of all.
    average = MovingAverage(model=model, decay=config.ema, warmup=config.ema_warmup) if config.ema else None
    restart = Restart(validation=validation, average=average, decay=config.restart_decay, fall=config.restart_fall)
    before: dict[str, Callback | None] = {
        "moving_average": average,
        "restart": None if config.restart_after is None else restart,
        "freezing": Freezing(model=model, parts=config.freeze) if config.freeze else None,
    }
    after: dict[str, Callback | None] = {
        "profiling": Profiling() if config.profile and distributed.rank() == 0 else None,
        "validation": validation,
        "checkpointing": checkpointing,
        "early_stopping": EarlyStopping(validation=validation, patience=config.patience) if config.patience else None,
    }
    if taken := own.keys() & {*before, *after, "averages"}:  # those of the log, in checkpoints
        raise UserError(f"callbacks.{min(taken)}: the trainer has a callback of this name. Choose another name.")
    return {name: callback for name, callback in {**before, **own, **after}.items() if callback is not None}


def _checked(own: Any) -> dict[str, Callback]:
    if not isinstance(own, Mapping):
        raise UserError(
            f"callbacks: wanted callbacks by name, got {type(own).__name__}. Give it one: callbacks.NAME._target_=..."
        )
    own = {name: callback for name, callback in own.items() if callback is not None}
    for name, callback in own.items():
        if not isinstance(callback, Callback):
            raise UserError(
                f"callbacks.{name}: wanted a callback, got {type(callback).__name__}. Derive its class from "
                "detr.engine.Callback and name it in _target_."
            )
    return own
