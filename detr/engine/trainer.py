"""The training loop, and what can take part in it."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from detr import distributed
from detr.engine import failures
from detr.engine.accelerate import compilations
from detr.engine.batches import Batch, Loader, grouped
from detr.engine.elastic import ElasticStep
from detr.engine.optim import Schedule
from detr.engine.options import TrainerConfig
from detr.engine.signals import StopRequest
from detr.engine.state import TrainingState
from detr.engine.step import TrainingStep
from detr.errors import Interrupted, NonFiniteError, UserError
from detr.folders import command
from detr.losses import SetCriterion
from detr.reporting import Reporter

logger = logging.getLogger(__name__)


class Callback:
    """Takes part in a training. Derived classes write the methods that they need; all processes call them alike.

    Checkpoints are written in a thread: whoever reads one calls `trainer.state.wait()` before.
    """

    def setup(self, trainer: "Trainer") -> None:
        """Once, when the trainer is made; a checkpoint is read afterwards."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first epoch, whether the training is new or goes on."""

    def on_epoch_start(self, trainer: "Trainer") -> None:
        """Before an epoch, or the rest of one; the model is in training mode."""

    def on_step_end(self, trainer: "Trainer", losses: Mapping[str, float]) -> None:
        """After a step. losses: by name; empty where the step was skipped."""

    def on_epoch_end(self, trainer: "Trainer") -> None:
        """After an epoch, or the part of one that the training ends with."""

    def on_evaluation_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """After an evaluation, before its checkpoint. metrics: by name, such as AP."""

    def on_end(self, trainer: "Trainer") -> None:
        """Last of all, also after an error or a signal; `trainer.finished` says whether the training is complete."""

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of it: tensors, numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; not called where the checkpoint has nothing of it."""


class Trainer:
    """Trains; stops on SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2, and goes on where it stopped.

    All randomness of a step follows from the seed and the step's number, and the learning rate from the number
    alone. So weights, optimizer state and that number are the whole state, beside that of callbacks: resuming repeats
    an uninterrupted run bit for bit. Options always come from the configuration, never from the checkpoint.

    In a run of several processes each has a trainer; all take the same steps, and process 0 reports and saves.

    callbacks: by name, in the order in which they run; see `standard_callbacks`.
    metadata: what else a checkpoint needs to be used alone: `config` and `categories`.
    data: texts by name that tell the data from others; a training that goes on with others reports these.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        criterion: SetCriterion,
        optimizer: Optimizer,
        schedule: Schedule,
        loader: Loader,
        callbacks: Mapping[str, Callback],
        reporter: Reporter,
        config: TrainerConfig,
        run_dir: Path,
        metadata: Mapping[str, Any],
        seed: int,
        data: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.criterion, self.optimizer, self.schedule = model, criterion, optimizer, schedule
        self.loader, self.callbacks, self.reporter, self.config = loader, callbacks, reporter, config
        self.run_dir, self.metadata, self.seed = run_dir, metadata, seed
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.epoch_steps, self.total_steps = config.epoch_steps(len(loader)), config.total_steps(len(loader))
        self.evaluation_epochs = config.evaluation_epochs(len(loader))
        step = ElasticStep if config.elastic else TrainingStep
        self.update = step(model=model, criterion=criterion, optimizer=optimizer, config=config, seed=seed)
        self.stop = StopRequest()
        self.ends_early = False
        self.state = TrainingState(
            model=model,
            optimizer=optimizer,
            scaler=self.update.scaler,
            callbacks={**callbacks, "averages": reporter},
            run_dir=run_dir,
            images=loader.batch_size * config.accumulate * config.sharing_processes,
            metadata=metadata,
            keep=config.keep,
            data=data,
        )
        for callback in callbacks.values():
            callback.setup(self)

    @property
    def epoch(self) -> int:
        """Whole epochs done: the number of the one that the next step is in."""
        return self.state.step // self.epoch_steps

    @property
    def finished(self) -> bool:
        return self.ends_early or self.state.step >= self.total_steps

    def finish(self) -> None:
        """End the training after this step, as if it were the last; to be called in all processes."""
        self.ends_early = True

    def stop_if_requested(self) -> None:
        """After a signal in any process: save, and raise Interrupted in all of them."""
        if distributed.any_of(self.stop.requested):
            path = self.state.save()
            self.state.wait()
            distributed.barrier()  # a launcher ends all processes when the first one is gone
            raise Interrupted(f"Stopped by a signal at step {self.state.step}. Go on with trainer.resume={path}")

    def fit(self) -> None:
        """Train to the end. Raises Interrupted after a signal, with everything saved."""
        if path := self.state.resume(self.config.resume):
            self._report_start(path)
        with self.stop, self.reporter:
            self.reporter.start(self.state.step, self.total_steps)
            try:
                for callback in self.callbacks.values():
                    callback.on_start(self)
                self.state.wait()  # the loader's processes start now, and would hold the file open for good
                while not self.finished:
                    self._train_epoch()
                    for callback in self.callbacks.values():
                        callback.on_epoch_end(self)
            finally:
                self._end(another_error=sys.exc_info()[0] is not None)

    def _report_start(self, path: Path) -> None:
        if self.finished:
            text = "Nothing is left to do: %s has %d steps, and the training %d. Raise trainer.epochs or max_steps."
            logger.warning(text, path, self.state.step, self.total_steps)
        else:
            logger.info("Going on from %s at step %d of %d.", path, self.state.step, self.total_steps)

    def _train_epoch(self) -> None:
        self.model.train()
        self.criterion.train()
        for callback in self.callbacks.values():
            callback.on_epoch_start(self)
        start = self.state.step % self.epoch_steps * self.config.accumulate
        asked = time.perf_counter()
        groups = grouped(self.loader.epoch(self.epoch, start), len(self.update.own))
        while (batches := self._next(groups)) is not None:
            waited = time.perf_counter() - asked
            self.reporter.batch(*batches[0])
            if losses := self._learn(batches):
                self._report(losses, waited)
            for callback in self.callbacks.values():
                callback.on_step_end(self, losses)
            self.stop_if_requested()
            if self.state.step % self.epoch_steps == 0 or self.finished:
                break
            asked = time.perf_counter()

    def _next(self, groups: Iterator[list[Batch]]) -> list[Batch] | None:
        """The batches of the next step; a signal is heard also where they never come."""
        with self.stop.at_once():
            return next(groups, None)
        self.stop_if_requested()
        return None

    def _end(self, *, another_error: bool) -> None:
        """Let saving and every callback come to their end; their errors do not hide the one that ended the training."""
        ends: dict[str, Callable[[], None]] = {"Saving": self.state.wait}
        ends |= {f"callbacks.{name}": partial(callback.on_end, self) for name, callback in self.callbacks.items()}
        errors = []
        for name, end in ends.items():
            try:
                end()
            except Exception as error:  # noqa: BLE001 - a callback may raise anything
                logger.warning("%s failed at the end of the training: %s", name, error)
                errors.append(error)
        if errors and not another_error:
            raise errors[0]

    def _learn(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One step; returns its losses, none where it was skipped."""
        factor = self.schedule(self.state.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        try:
            losses = self.update(batches, self.state.step)
        except NonFiniteError as error:
            self._skip(batches, error)
            losses = {}
        self.state.step += 1
        return losses

    def _skip(self, batches: Sequence[Batch], error: NonFiniteError) -> None:
        """Keep what a step failed with; raises the error again where that is one too many."""
        state = self.state
        path = self._keep_failure(batches)
        if self.config.non_finite == "stop" or state.skipped >= self.config.max_skips:
            raise NonFiniteError(error.what, error.image_ids, state.step, path) from None
        state.skipped += 1
        text = "Step %d skipped, %d of at most %d: %s became NaN or infinite.%s"
        advice = f" Look into it with {command('replay')} {path}" if path else ""
        logger.warning(text, state.step, state.skipped, self.config.max_skips, error.what, advice)

    def _keep_failure(self, batches: Sequence[Batch]) -> Path | None:
        """What a step failed with matters more than its file, for which there may be no room."""
        try:
            return failures.save(
                self.run_dir,
                self.model,
                batches,
                step=self.state.step,
                seed=self.seed,
                place=(self.update.process, self.update.own.start),
                scale=self.update.scaler.get_scale(),
                metadata=self.metadata,
            )
        except UserError as error:
            logger.warning("The failed step is not kept: %s", error)
            return None

    def _report(self, losses: Mapping[str, float], waited: float) -> None:
        logged = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        if self.config.compile:
            logged["compilations"] = compilations()
        self.reporter.step(self.state.step, losses, logged, self.state.images, waited)
