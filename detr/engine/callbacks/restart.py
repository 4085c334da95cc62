"""The return to the best checkpoint at the end of a training."""

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

from detr import distributed
from detr.contents import flag, number, record, whole
from detr.engine.callbacks.moving_average import MovingAverage
from detr.engine.callbacks.validation import Validation
from detr.engine.trainer import Callback, Trainer

logger = logging.getLogger(__name__)
_STATE = record(restarts=whole(), kept_step=whole(), due=flag, best=number(most=sys.float_info.max))


class Restart(Callback):
    """Returns to the best checkpoint for the last epochs, and again whenever these lead no further (D-FINE: Peng et
    al., ICLR 2025).

    Before the first of these epochs, weights, moving average, optimizer and loss scale become those of best.pt. They
    are kept in restart.pt too, since best.pt may change. Each later evaluation that is no new best leads back to
    restart.pt, unless the training is at its end. It is compared only with evaluations since the last return, so that
    one epoch at least follows each. Steps, learning rates and randomness go on as if nothing had happened.

    average: has another decay from the first return on: `decay`, or its own with None, less `fall` for each further
        return.
    """

    def __init__(
        self, *, validation: Validation, average: MovingAverage | None, decay: float | None, fall: float
    ) -> None:
        self.validation, self.average, self.fall = validation, average, fall
        self.decay = average.decay if average and decay is None else decay
        self.restarts, self.due, self.best = 0, False, -math.inf
        self.kept_step = 0  # of restart.pt; 0: there is none of this training

    def setup(self, trainer: Trainer) -> None:
        self.epoch = trainer.config.restart_epoch(len(trainer.loader))

    def on_epoch_start(self, trainer: Trainer) -> None:
        if self.due or (self.restarts == 0 and trainer.epoch >= self.epoch):
            self._return(trainer)

    def on_evaluation_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        value = metrics[self.validation.monitor]
        self.due = self.restarts > 0 and value <= self.best
        self.best = -math.inf if self.due else max(value, self.best)

    def _return(self, trainer: Trainer) -> None:
        first = self.restarts == 0
        self.restarts, self.due = self.restarts + 1, False
        self._set_decay()
        source = trainer.state.path("best.pt" if first else "restart.pt")
        step = self.validation.best_step if first else self.kept_step
        trainer.state.wait()
        known = math.isfinite(self.validation.best) if first else step > 0
        if not (known and distributed.from_first(source.exists())):
            logger.warning("There is no %s to return to, so the training goes on as it is.", source)
            return
        trainer.state.return_to(source, ["moving_average"] if self.average else [], step=step)
        if first:
            self.kept_step = trainer.state.step
            trainer.state.save("restart.pt")
        decay = f"; the moving average has a decay of {self.average.decay:.6g}" if self.average else ""
        logger.info("Restart %d, at step %d, from %s%s.", self.restarts, trainer.state.step, source, decay)

    def _set_decay(self) -> None:
        if self.average and self.decay is not None:
            self.average.decay = max(self.decay - self.fall * (self.restarts - 1), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"restarts": self.restarts, "kept_step": self.kept_step, "due": self.due, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _STATE(state, "")
        self.restarts, self.kept_step = state["restarts"], state["kept_step"]
        self.due, self.best = state["due"], state["best"]
        if self.restarts:
            self._set_decay()
