"""The end of a training that gets no better."""

import logging
from collections.abc import Mapping

from detr.engine.callbacks.validation import Validation
from detr.engine.trainer import Callback, Trainer

logger = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Ends the training after `patience` evaluations in a row without a new best."""

    def __init__(self, *, validation: Validation, patience: int) -> None:
        self.validation, self.patience = validation, patience

    def on_start(self, trainer: Trainer) -> None:
        if trainer.state.step == self.validation.evaluated_step > 0:
            self._stop_if_over(trainer)

    def on_evaluation_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self._stop_if_over(trainer)

    def _stop_if_over(self, trainer: Trainer) -> None:
        interval = trainer.evaluation_epochs * trainer.epoch_steps
        without = (trainer.state.step - self.validation.best_step) / interval
        if without >= self.patience and not trainer.finished:
            text = "No better %s than %.4g in %d evaluations: the training ends early."
            logger.info(text, self.validation.monitor, self.validation.best, self.patience)
            trainer.finish()
