"""Evaluation between epochs, and which one was the best."""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from detr import distributed
from detr.contents import number, record, whole
from detr.engine.trainer import Callback, Trainer
from detr.errors import UserError
from detr.evaluation import CocoEvaluator, CocoResults

logger = logging.getLogger(__name__)
_STATE = record(evaluated_step=whole(), best=number(most=sys.float_info.max), best_step=whole())


class Validation(Callback):
    """Evaluates whenever so many epochs are done as the options ask for, and at the end of the training.

    It saves a checkpoint before: an evaluation that fails must not cost the training before it.

    report: called at the end of the training, in process 0, with the detections of its last evaluation.
    monitor: the metric whose highest value is the best. Raises UserError, after an evaluation, where there is none of
        that name.
    """

    def __init__(
        self, *, evaluator: CocoEvaluator, monitor: str, report: Callable[[CocoResults], None] | None = None
    ) -> None:
        self.evaluator, self.monitor, self.report = evaluator, monitor, report
        self.results: CocoResults | None = None
        self.evaluated_step = self.best_step = 0
        self.best = -math.inf

    def on_start(self, trainer: Trainer) -> None:
        if not distributed.from_first(trainer.state.path("best.pt").exists()):
            self.best = -math.inf  # the best one stayed in another folder
        self.on_epoch_end(trainer)  # the one before which, or within which, a training that is resumed was stopped

    def on_epoch_end(self, trainer: Trainer) -> None:
        if self._is_due(trainer):
            trainer.state.save()
            self._evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        best = trainer.state.path("best.pt")
        if trainer.finished and self.report is not None and self.results is not None:
            self.report(self.results)
        if trainer.finished and math.isfinite(self.best):
            logger.info("The best is step %d, with %s %.3f: %s", self.best_step, self.monitor, self.best, best)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.step == self.evaluated_step:
            return False
        whole = trainer.state.step % trainer.epoch_steps == 0
        return trainer.finished or (whole and trainer.epoch % trainer.evaluation_epochs == 0)

    def _evaluate(self, trainer: Trainer) -> None:
        evaluation = None
        with trainer.stop.at_once():
            evaluation = self.evaluator(trainer.state.evaluated, stop=lambda: trainer.stop.requested)
        trainer.stop_if_requested()
        step = self.evaluated_step = trainer.state.step
        metrics = distributed.from_first(evaluation.metrics.summary if evaluation else {})
        if evaluation is not None:
            self.results = evaluation.results
            trainer.state.thresholds = evaluation.metrics.thresholds
            evaluation.metrics.save(trainer.run_dir / "evaluation" / "metrics.json")
            trainer.reporter.evaluation(step, {**metrics, **evaluation.diagnostics}, evaluation.samples)
        if self.monitor not in metrics:
            raise UserError(
                f"trainer.monitor: '{self.monitor}' is not among the metrics, which are {', '.join(metrics)}."
            )
        if metrics[self.monitor] > self.best:
            self.best, self.best_step = metrics[self.monitor], step
        for callback in trainer.callbacks.values():
            callback.on_evaluation_end(trainer, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated_step": self.evaluated_step, "best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _STATE(state, "")
        self.evaluated_step, self.best, self.best_step = state["evaluated_step"], state["best"], state["best_step"]
