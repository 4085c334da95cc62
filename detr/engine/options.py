"""The fixed options of training."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detr.errors import UserError

PRECISIONS, NON_FINITE = ("fp32", "bf16", "fp16"), ("stop", "skip")


@dataclass
class TrainerConfig:
    """Fixed options of the loop.

    epochs: passes over the training data. max_steps: ends the training earlier or later than that, where given.
    accumulate: batches whose gradients are added up for one step of the optimizer.
    precision: fp32, bf16, or fp16 with a scaled loss; losses and matching are in fp32 always.
    compile: compile the model, which pays on GPUs. A few compilations serve all sizes of images; they are counted in
        `compilations`.
    activation_checkpointing: compute activations twice instead of keeping them: less memory, about a third slower.
    clip_norm: largest norm of the gradient; 0 does not clip.
    ema: decay of a moving average of the weights, which is then what is evaluated and used; 0 for none.
    freeze: parts of the model that do not train, by name, each with the epoch from which it does; null: never.
    sync_batch_norm: statistics of batch norms over all processes (GPUs only).
    deterministic: the same bits again on a GPU too; names the operation where there is one that cannot.

    evaluate_every: epochs between two evaluations; the end of the training is always evaluated.
    monitor: the metric that the best checkpoint is chosen by, the higher the better.
    patience: end the training after so many evaluations without a new best.
    save_every_steps, save_every_minutes: between two checkpoints beside the one at each evaluation; 0 for none.
    keep: last checkpoints that are kept; an older one serves where the last is damaged.
    resume: `auto` goes on from the run folder's last checkpoint where there is one, a path from that checkpoint.

    limit_epoch_steps, limit_evaluation_images: shorter epochs and evaluations, for a quick look.
    overfit_batches: train on the first so many batches alone, again and again.
    non_finite: what to do where a loss or gradient is NaN or infinite: stop, or skip the step, max_skips times.
    timeout: minutes that a process waits for the others.
    profile: record a few steps near the start and write where their time went to profile/ in the run's folder.
    """

    epochs: int = 300
    max_steps: int | None = None
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    clip_norm: float = 0.1
    ema: float = 0.0
    freeze: Any = None  # not an empty dict, into which the command line could not put new names
    sync_batch_norm: bool = False
    deterministic: bool = False
    evaluate_every: int = 1
    monitor: str = "AP"
    patience: int | None = None
    save_every_steps: int = 0
    save_every_minutes: float = 0.0
    keep: int = 2
    resume: str | None = None
    limit_epoch_steps: int | None = None
    limit_evaluation_images: int | None = None
    overfit_batches: int | None = None
    non_finite: str = "stop"
    max_skips: int = 10
    timeout: float = 10.0
    profile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("non_finite", NON_FINITE)):
            if getattr(self, name) not in choices:
                raise UserError(f"trainer.{name}: wanted {' or '.join(choices)}, got '{getattr(self, name)}'.")
        self.freeze = self.freeze or {}
        if not isinstance(self.freeze, dict) or not all(isinstance(e, int | None) for e in self.freeze.values()):
            raise UserError(
                "trainer.freeze: wanted parts of the model, each with an epoch or null, such as {backbone: 5}, got "
                f"{self.freeze}."
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"trainer.ema: wanted a decay from 0 to below 1, such as 0.9997, got {self.ema}.")

    def epoch_steps(self, batches: int) -> int:
        """Optimiser steps of an epoch with so many batches; raises UserError where they are too few for one."""
        batches = min(batches, self.overfit_batches or batches)
        steps = min(batches // self.accumulate, self.limit_epoch_steps or batches)
        if steps == 0:
            raise UserError(
                f"trainer.accumulate={self.accumulate} is more than the {batches} batches of an epoch. Lower it, or "
                "data.batch_size."
            )
        return steps

    def total_steps(self, batches: int) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * self.epoch_steps(batches) if self.max_steps is None else self.max_steps

    def total_epochs(self, batches: int) -> int:
        """Epochs of the training, a begun one counted."""
        return -(-self.total_steps(batches) // self.epoch_steps(batches))


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The options of a configuration by dotted name, with their values as text."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
