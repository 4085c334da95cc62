"""The state of a training, which its checkpoints keep and from which it goes on."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from detr import distributed
from detr.contents import check_content, flat, mapping, number, record, refuse_non_finite, saved, state_dict, whole
from detr.engine.optim import load_optimizer_state, optimizer_state
from detr.engine.saving import Saving
from detr.errors import UserError
from detr.evaluation import Thresholds
from detr.types import Category
from detr.weights import Checkpoint, load_state, newest, read_checkpoint

logger = logging.getLogger(__name__)
_OF_A_START = ("run_dir", "trainer.resume", "weights", "device", "debug")  # options that say nothing of the training
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    str,
    Tensor,
    nn.Parameter,
)  # what loading accepts, which runs no code of the file
_TRAINING = record(
    step=whole(),
    skipped=whole(),
    images=whole(1),
    optimizer=saved,
    scaler=mapping(saved),
    callbacks=mapping(mapping(saved)),
)
_SCALER = record(
    scale=number(0, 1e38),
    growth_factor=number(1),
    backoff_factor=number(0, 1),
    growth_interval=whole(1),
    _growth_tracker=whole(),
)


@runtime_checkable
class Stateful(Protocol):
    """What has a state of its own in the checkpoint: a dict of tensors and plain values; empty where it has none."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TrainingState:
    """All that a training needs to go on bit for bit: weights, optimizer, loss scale, number of steps, callbacks.

    images: in one step, of all processes. metadata: what else a checkpoint needs to be used alone: `config` and
    `categories`. keep: last checkpoints that are kept. data: texts by name that tell the data from others.

    step: steps done. skipped: how many of these changed nothing.
    thresholds: those that the last evaluation found best; None before the first, where nothing was found, and in all
        processes but the first.
    averaged: the moving average of the model, which is evaluated and saved for use instead of it, where there is one.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler,
        callbacks: Mapping[str, Stateful],
        run_dir: Path,
        images: int,
        metadata: Mapping[str, Any],
        keep: int,
        data: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.optimizer, self.scaler, self.callbacks = model, optimizer, scaler, callbacks
        self.run_dir, self.images, self.metadata, self.keep = run_dir, images, metadata, keep
        self.data = dict(data or {})
        self.averaged: nn.Module | None = None
        self.thresholds: Thresholds | None = None
        self.step = self.skipped = 0
        self._saving = Saving()

    @property
    def evaluated(self) -> nn.Module:
        """The moving average of the model where there is one, else the model."""
        return self.model if self.averaged is None else self.averaged

    def path(self, name: str = "last.pt") -> Path:
        return self.run_dir / "checkpoints" / name

    def save(self, *names: str) -> Path:
        """Have a checkpoint written under some names, last.pt unless given, by process 0; returns where the first goes.

        It is on the disk after `wait`. Raises UserError where the one before it could not be written.
        """
        names = names or ("last.pt",)
        # In all processes, since a callback may have to gather its state from them.
        thresholds = None if self.thresholds is None else self.thresholds.content()
        content = {
            **self.metadata,
            "model": self.evaluated.state_dict(),
            "thresholds": thresholds,
            "training": self._training(),
        }
        if distributed.rank() == 0:
            self._saving(content, [(self.path(name), self.keep if name == "last.pt" else 1) for name in names])
        return self.path(names[0])

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises UserError where it could not be written."""
        self._saving.wait()

    def resume(self, source: str | None) -> Path | None:
        """Go on from the checkpoint at a path; with `auto` from the run's newest one that is whole, if there is any.

        Returns which one it was. Raises UserError where it is of another training than this one.
        """
        self._callback_states()  # one that cannot be saved is to be known before any work
        checkpoint = distributed.by_first(lambda: self._read(source))  # folders of machines may differ
        if checkpoint is None:
            return None
        path, training = checkpoint.path, self._checked(checkpoint)
        self._restore(checkpoint, training)
        self.step, self.skipped = training["step"], training["skipped"]
        for name, state in training["callbacks"].items():
            self._restore_callback(name, state, path)
        if changes := list(_changes(checkpoint.config, self.metadata["config"])):
            logger.warning("From here on other options hold than in the checkpoint: %s.", "; ".join(changes))
        before = training.get("data") or self.data
        if others := [name for name, value in self.data.items() if before.get(name) != value]:
            logger.warning("From here on other data are used than before the checkpoint: %s differ.", ", ".join(others))
        return path

    def return_to(self, path: Path, callbacks: Sequence[str], *, step: int) -> None:
        """Take weights, optimizer and loss scale from an earlier checkpoint of this training, and the state of some
        callbacks; the number of steps goes on.

        step: the step that the checkpoint was saved at. Raises UserError where it is of another one.
        """
        checkpoint = distributed.by_first(lambda: read_checkpoint(path))
        training = self._checked(checkpoint)
        if step != training["step"]:
            raise UserError(
                f"Checkpoint {path} is of step {training['step']}, wanted that of step {step}, to which the training "
                "returns. Put that one in its place, or go on without a return: trainer.restart_after=null."
            )
        self._restore(checkpoint, training)
        for name in training["callbacks"].keys() & set(callbacks):
            self._restore_callback(name, training["callbacks"][name], path)

    def _restore(self, checkpoint: Checkpoint, training: Mapping[str, Any]) -> None:
        """Weights, their average and its thresholds, the optimizer's state and the loss scale."""
        load_state(self.model, training.get("model", checkpoint.state), checkpoint)
        if self.averaged is not None:
            load_state(self.averaged, checkpoint.state, checkpoint)
        stored = checkpoint.thresholds
        self.thresholds = None if stored is None else Thresholds.from_content(stored, f"Checkpoint {checkpoint.path}")
        load_optimizer_state(self.optimizer, self.model, training["optimizer"], f"Checkpoint {checkpoint.path}")
        if training["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(training["scaler"])

    def _training(self) -> dict[str, Any]:
        model = {} if self.averaged is None else {"model": self.model.state_dict()}
        return {
            "step": self.step,
            "skipped": self.skipped,
            "images": self.images,
            "data": self.data,
            "optimizer": optimizer_state(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
            "callbacks": self._callback_states(),
            **model,
        }

    def _callback_states(self) -> dict[str, dict[str, Any]]:
        states = {name: state for name, callback in self.callbacks.items() if (state := callback.state_dict())}
        for name, state in states.items():
            if (kind := _not_plain(state)) is not None:
                raise UserError(
                    f"callbacks.{name}: its state_dict() holds a {kind}, which no checkpoint can be read back with. "
                    "Return tensors, numbers, texts, and lists and dicts of these."
                )
        return states

    def _refuse_folders(self) -> None:
        """What no checkpoint can replace is to be known before any work, too."""
        for path in map(self.path, ("last.pt", "best.pt", "restart.pt")):
            if path.exists() and not path.is_file():
                raise UserError(
                    f"{path} is no file, but the training saves a checkpoint there. Move it away, or choose another "
                    "run_dir."
                )

    def _read(self, source: str | None) -> Checkpoint | None:
        self._refuse_folders()
        if source != "auto":
            return None if source is None else read_checkpoint(source)
        if (found := newest(self.path())) is not None:
            return found
        if (best := self.path("best.pt")).exists():
            raise UserError(
                f"trainer.resume=auto: {best.parent} has best.pt, but no last.pt to go on from. Go on from the best "
                f"one with trainer.resume={best}, or start anew with another run_dir."
            )
        logger.warning("trainer.resume=auto: no checkpoint in %s, so the training starts anew.", best.parent)
        return None

    def _checked(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The training state of a checkpoint, if this training can go on from it."""
        path, training = checkpoint.path, checkpoint.training
        if training is None or "callbacks" not in training:
            raise UserError(
                f"Checkpoint {path} is of an earlier version of this framework: its weights can be used, but the "
                f"training cannot go on from it. Start anew from its weights with weights={path} and another run_dir."
            )
        check_content({"training": training}, record(training=_TRAINING), f"Checkpoint {path}")
        if training["scaler"]:
            check_content(training["scaler"], _SCALER, f"Checkpoint {path}: training.scaler")
        if "model" in training:
            check_content({"training": training}, record(training=record(model=state_dict)), f"Checkpoint {path}")
            refuse_non_finite(training["model"], f"Checkpoint {path}")
        if checkpoint.categories != [Category(**row) for row in self.metadata["categories"]]:
            raise UserError(
                f"Checkpoint {path} was trained on other classes than the training data have. Resume on the same data, "
                "or start anew from its weights with weights=PATH."
            )
        if training["images"] != self.images:
            raise UserError(
                f"Checkpoint {path} counts steps of {training['images']} images, now a step has {self.images} "
                "(data.batch_size * trainer.accumulate * processes). Set these so that the product is the same, or "
                "start anew from its weights with weights=PATH."
            )
        return training

    def _restore_callback(self, name: str, state: Mapping[str, Any], path: Path) -> None:
        if name not in self.callbacks:
            return  # it is no longer configured
        try:
            self.callbacks[name].load_state_dict(state)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise UserError(
                f"callbacks.{name} cannot take its state from checkpoint {path}: {error}. Use an intact copy, "
                "or give it the options that it had, or another name to start it anew."
            ) from error


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The options that differ, with both values."""
    old, new = dict(flat(before)), dict(flat(now))
    for name in old | new:
        if old.get(name) != new.get(name) and name not in _OF_A_START:
            yield f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"


def _not_plain(value: Any) -> str | None:
    """The type of the first thing in a state that a checkpoint could not be read back with."""
    if type(value) in (dict, OrderedDict):
        return next(filter(None, map(_not_plain, [*value, *value.values()])), None)
    if type(value) in (list, tuple):
        return next(filter(None, map(_not_plain, value)), None)
    return None if type(value) in _PLAIN else type(value).__name__
