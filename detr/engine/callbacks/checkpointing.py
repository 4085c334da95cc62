"""When checkpoints are saved."""

import time
from collections.abc import Mapping

from detr import distributed
from detr.engine.callbacks.validation import Validation
from detr.engine.trainer import Callback, Trainer


class Checkpointing(Callback):
    """Saves last.pt after every evaluation and between them, and best.pt where the evaluation was the best so far.

    every_steps, every_minutes: between two checkpoints; 0 for none beside those of evaluations.
    """

    def __init__(self, *, validation: Validation, every_steps: int, every_minutes: float) -> None:
        self.validation, self.every_steps, self.every_minutes = validation, every_steps, every_minutes
        self.saved_at = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(self, trainer: Trainer, losses: Mapping[str, float]) -> None:
        if (self.every_steps and trainer.state.step % self.every_steps == 0) or self._is_time():
            self._save(trainer)

    def on_evaluation_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        best = ("best.pt",) if self.validation.best_step == trainer.state.step else ()
        self._save(trainer, *best, "last.pt")

    def _is_time(self) -> bool:
        """The same in all processes, whose clocks differ: saving may need all of them."""
        minutes = (time.monotonic() - self.saved_at) / 60
        return self.every_minutes > 0 and distributed.any_of(minutes >= self.every_minutes)

    def _save(self, trainer: Trainer, *names: str) -> None:
        trainer.state.save(*names)
        self.saved_at = time.monotonic()
