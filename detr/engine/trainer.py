"""The training loop."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detr import distributed
from detr.engine import failures
from detr.engine.accelerate import compilations
from detr.engine.optim import Schedule
from detr.engine.options import TrainerConfig, flat
from detr.engine.profile import phase, profiled
from detr.engine.signals import StopRequest
from detr.engine.step import Batch, TrainingStep
from detr.errors import Interrupted, NonFiniteError, UserError
from detr.evaluation import CocoEvaluator
from detr.losses import SetCriterion
from detr.reporting import Reporter
from detr.types import Category
from detr.weights import Checkpoint, checkpoints, load_state, read_checkpoint

logger = logging.getLogger(__name__)
_OF_A_START = ("run_dir", "trainer.resume", "weights", "device", "debug")  # options that say nothing of the training


@runtime_checkable
class Loader(Protocol):
    """Training batches that are determined by their place in the training."""

    batch_size: int

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Trainer:
    """Trains, evaluates, saves; stops on SIGINT, SIGTERM and SIGUSR1 and goes on where it stopped.

    All randomness of a step follows from the seed and the step's number, and the learning rate from the number
    alone. So weights, optimiser state and that number are the whole state: resuming repeats an uninterrupted run bit
    for bit. Options always come from the configuration, never from the checkpoint that is resumed.

    In a run of several processes each has a trainer; all take the same steps, and process 0 reports and saves.

    metadata: what else a checkpoint needs to be used alone: `config` and `categories`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        criterion: SetCriterion,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        loader: Loader,
        evaluator: CocoEvaluator,
        reporter: Reporter,
        config: TrainerConfig,
        run_dir: Path,
        metadata: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.model, self.criterion, self.optimizer, self.schedule = model, criterion, optimizer, schedule
        self.loader, self.evaluator, self.reporter, self.config = loader, evaluator, reporter, config
        self.run_dir, self.metadata, self.seed = run_dir, metadata, seed
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.average = None
        if config.ema:
            self.average = AveragedModel(model, multi_avg_fn=_moving_average(config.ema), use_buffers=True)
        self.freezable = {part: _parameters(model, part) for part in config.freeze}
        self.train_step = TrainingStep(model=model, criterion=criterion, optimizer=optimizer, config=config, seed=seed)
        self.epoch_steps = config.epoch_steps(len(loader))
        self.total_steps = config.total_steps(len(loader))
        self.step = self.evaluated_step = self.best_step = self.skipped = 0
        self.best = -math.inf

    def fit(self) -> None:
        """Train to the end. Raises Interrupted after a signal, with everything saved."""
        self._resume()
        profile = self.config.profile and distributed.rank() == 0
        steps = profiled(self.run_dir, self.train_step.device) if profile else nullcontext(lambda: None)
        with StopRequest() as self.stop, self.reporter, steps as self._profile_step:
            self.reporter.start(self.step, self.total_steps)
            self._saved_at = time.monotonic()
            while True:
                if self._evaluation_is_due():
                    self._save("last.pt")  # an evaluation that fails must not cost the training before it
                    self._evaluate()
                    self._save("last.pt")
                if self.step >= self.total_steps or self._patience_is_over():
                    break
                self._train_epoch()

    def _train_epoch(self) -> None:
        epoch, start = divmod(self.step, self.epoch_steps)
        self.model.train()
        self.criterion.train()
        self._freeze(epoch)
        batches = self.loader.epoch(0 if self.config.overfit_batches else epoch, start * self.config.accumulate)
        asked = time.perf_counter()
        for group in _groups(batches, self.config.accumulate):
            waited = time.perf_counter() - asked
            if losses := self._train_step(group):
                state = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
                if self.config.compile:
                    state["compilations"] = compilations()
                images = sum(len(batch) for batch, _ in group) * distributed.world_size()
                self.reporter.step(self.step, losses, state, images, waited)
            self._profile_step()
            if self._save_is_due():
                self._save("last.pt")
            self._stop_if_requested()
            if self.step % self.epoch_steps == 0 or self.step >= self.total_steps:
                break
            asked = time.perf_counter()

    def _train_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The losses; none where the step was skipped."""
        factor = self.schedule(self.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        try:
            losses = self.train_step(batches, self.step)
        except NonFiniteError as error:
            path = failures.save(self.run_dir, self.model, batches, self.step, self.seed, self.metadata)
            if self.config.non_finite == "stop" or self.skipped >= self.config.max_skips:
                raise NonFiniteError(error.what, error.image_ids, self.step, path) from None
            self.skipped += 1
            text = "Step %d skipped, the %dth: %s became NaN or infinite. Look into it with python tools/replay.py %s"
            logger.warning(text, self.step, self.skipped, error.what, path)
            losses = {}
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.model)
        return losses

    def _freeze(self, epoch: int) -> None:
        """Parts train or not as `config.freeze` has it for this epoch."""
        before = [parameter.requires_grad for parameter in self.model.parameters()]
        for part, parameters in self.freezable.items():
            until = self.config.freeze[part]
            trains = until is not None and epoch >= until
            for parameter in parameters:
                parameter.requires_grad_(trains)
            if not trains:
                self.model.get_submodule(part).eval()  # statistics of its batch norms stay as well
        if before != [parameter.requires_grad for parameter in self.model.parameters()]:
            self.train_step.parallelize()

    def _evaluation_is_due(self) -> bool:
        if self.step == self.evaluated_step:
            return False
        epoch, within = divmod(self.step, self.epoch_steps)
        return self.step >= self.total_steps or (within == 0 and epoch % self.config.evaluate_every == 0)

    def _evaluate(self) -> None:
        model = self.model if self.average is None else self.average.module
        evaluation = self.evaluator(model, stop=lambda: self.stop.requested)
        self._stop_if_requested()
        self.evaluated_step = self.step
        summary = distributed.from_first(evaluation.metrics.summary if evaluation else {})
        if evaluation is not None:
            evaluation.metrics.save(self.run_dir / "evaluation" / "metrics.json")
            self.reporter.evaluation(self.step, {**summary, **evaluation.diagnostics}, evaluation.samples)
        if self.config.monitor not in summary:
            raise UserError(
                f"trainer.monitor: '{self.config.monitor}' is not among the metrics, which are {', '.join(summary)}."
            )
        if summary[self.config.monitor] > self.best:
            self.best, self.best_step = summary[self.config.monitor], self.step
            self._save("best.pt")

    def _patience_is_over(self) -> bool:
        if self.config.patience is None or self.step == 0:
            return False
        evaluations = (self.step - self.best_step) / (self.config.evaluate_every * self.epoch_steps)
        if evaluations < self.config.patience or self.step != self.evaluated_step:
            return False
        text = "No better %s than %.4g in %d evaluations: the training ends early."
        logger.info(text, self.config.monitor, self.best, self.config.patience)
        return True

    def _save_is_due(self) -> bool:
        every, minutes = self.config.save_every_steps, self.config.save_every_minutes
        return bool(
            (every and self.step % every == 0) or (minutes and time.monotonic() - self._saved_at >= 60 * minutes)
        )

    def _stop_if_requested(self) -> None:
        if distributed.any_of(self.stop.requested):
            path = self._save("last.pt")
            distributed.barrier()  # a launcher ends all processes when the first one is gone
            raise Interrupted(f"Stopped by a signal at step {self.step}. Go on with trainer.resume={path}")

    def _save(self, name: str) -> Path:
        path = self.run_dir / "checkpoints" / name
        self._saved_at = time.monotonic()
        if distributed.rank() > 0:
            return path
        training = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "best_step": self.best_step,
            "skipped": self.skipped,
            "images": self._images_per_step(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.train_step.scaler.state_dict(),
        }
        model = self.model.state_dict()
        if self.average is not None:
            training |= {"model": model, "averaged": self.average.n_averaged}
            model = self.average.module.state_dict()
        keep = self.config.keep if name == "last.pt" else 1
        checkpoints.save(path, {**self.metadata, "model": model, "training": training}, keep=keep)
        return path

    def _images_per_step(self) -> int:
        return self.loader.batch_size * self.config.accumulate * distributed.world_size()

    def _resume(self) -> None:
        checkpoint = self._checkpoint()
        if checkpoint is None:
            return
        path, training = checkpoint.path, checkpoint.training
        if training is None:
            raise UserError(
                f"Checkpoint {path} is of version 1, whose training cannot go on. Start anew from its weights with "
                f"weights={path} and another run_dir."
            )
        if checkpoint.categories != [Category(**row) for row in self.metadata["categories"]]:
            raise UserError(
                f"Checkpoint {path} was trained on other classes than the training data have. Resume on the same data, "
                "or start anew from its weights with weights=PATH."
            )
        if training.get("images") != self._images_per_step():
            raise UserError(
                f"Checkpoint {path} counts steps of {training.get('images')} images, now a step has "
                f"{self._images_per_step()} (data.batch_size * trainer.accumulate * processes). Set these so that the "
                "product is the same, or start anew from its weights with weights=PATH."
            )
        load_state(self.model, training.get("model", checkpoint.state), checkpoint)
        if self.average is not None:
            load_state(self.average.module, checkpoint.state, checkpoint)
            self.average.n_averaged.copy_(training.get("averaged", torch.tensor(1)))
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(training["optimizer"])
            if training["scaler"] and self.train_step.scaler.is_enabled():
                self.train_step.scaler.load_state_dict(training["scaler"])
            for name in ("step", "evaluated_step", "best", "best_step", "skipped"):
                setattr(self, name, training[name])
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"Checkpoint {path} has no training state of these parameter groups: {error}. Resume with the "
                "same model and optimizer options, or start anew from its weights with weights=PATH."
            ) from None
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)
        if not (self.run_dir / "checkpoints" / "best.pt").exists():
            self.best = -math.inf  # the best one stayed in another folder
        logger.info("Going on from %s at step %d of %d.", path, self.step, self.total_steps)
        before, now = dict(flat(checkpoint.config)), dict(flat(self.metadata["config"]))
        changes = [
            f"{name} {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
            for name in before | now
            if before.get(name) != now.get(name) and name not in _OF_A_START
        ]
        if changes:
            logger.warning("From here on other options hold than in the checkpoint: %s.", "; ".join(changes))

    def _checkpoint(self) -> Checkpoint | None:
        """What to go on from; with `auto` the newest checkpoint in the run's folder that is whole, if there is any."""
        if self.config.resume is None:
            return None
        if self.config.resume != "auto":
            return read_checkpoint(self.config.resume)
        return checkpoints.newest(self.run_dir / "checkpoints" / "last.pt")


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """So many batches at a time; what is left over at the end is dropped."""
    iterator = iter(batches)
    while True:
        with phase("data"):
            group = list(islice(iterator, size))
        if len(group) < size:
            return
        yield group


def _parameters(model: nn.Module, part: str) -> list[nn.Parameter]:
    """Those of a part of the model that train."""
    try:
        return [parameter for parameter in model.get_submodule(part).parameters() if parameter.requires_grad]
    except AttributeError:
        known = [name for name, _ in model.named_children()]
        raise UserError(
            f"trainer.freeze: the model has no part '{part}'; its parts are {', '.join(known)}, and parts of these "
            "such as transformer.encoder."
        ) from None


def _moving_average(decay: float) -> Any:
    """Shorter at the start, where weights are far from what they become."""

    def update(average: Any, current: Any, number: torch.Tensor) -> None:
        steps = float(number)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(average, current, number)

    return update
