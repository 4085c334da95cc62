"""The training loop."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from detr.engine import checkpoint
from detr.engine.optim import Schedule
from detr.engine.signals import StopRequest
from detr.errors import Interrupted, NonFiniteError, UserError
from detr.evaluation import CocoEvaluator
from detr.losses import SetCriterion
from detr.models.attention import Policy
from detr.reporting import Reporter
from detr.types import ImageBatch, Target

logger = logging.getLogger(__name__)


@dataclass
class TrainerConfig:
    """Fixed options of the loop.

    epochs: passes over the training data. max_steps: ends the training earlier or later than that, where given.
    clip_norm: largest norm of the gradient; 0 does not clip.
    evaluate_every: epochs between two evaluations; the end of the training is always evaluated.
    save_every_steps: steps between two checkpoints beside the one at each evaluation; 0 for none.
    resume: `auto` goes on from the run folder's last checkpoint where there is one, a path from that checkpoint.
    """

    epochs: int = 300
    max_steps: int | None = None
    clip_norm: float = 0.1
    evaluate_every: int = 1
    save_every_steps: int = 0
    resume: str | None = None

    def total_steps(self, epoch_steps: int) -> int:
        """Steps of the whole training, for so many in an epoch."""
        return self.epochs * epoch_steps if self.max_steps is None else self.max_steps


@runtime_checkable
class Loader(Protocol):
    """Training batches that are determined by their place in the training."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[ImageBatch, Sequence[Target]]]: ...


class Trainer:
    """Trains, evaluates, saves; stops on SIGINT and SIGTERM and goes on where it stopped.

    All randomness of a step follows from the seed and the step's number, and the learning rate from the number
    alone. So weights, optimiser state and that number are the whole state: resuming repeats an uninterrupted run bit
    for bit. Options always come from the configuration, never from the checkpoint that is resumed.

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
        self.device = next(model.parameters()).device
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            depth = 2 if name.startswith("transformer.") else 1
            self.parts.setdefault(".".join(name.split(".")[:depth]), []).append(parameter)
        self.policies = [module for module in model.modules() if isinstance(module, Policy)]
        self.total_steps = config.total_steps(len(loader))
        self.step = self.evaluated_step = 0
        self.best = -math.inf

    def fit(self) -> None:
        """Train to the end. Raises Interrupted after a signal, with everything saved."""
        self._resume()
        with StopRequest() as self.stop, self.reporter:
            self.reporter.start(self.step, self.total_steps)
            while True:
                if self._evaluation_is_due():
                    self._save("last.pt")  # an evaluation that fails must not cost the training before it
                    self._evaluate()
                    self._save("last.pt")
                if self.step >= self.total_steps:
                    break
                self._train_epoch()

    def _train_epoch(self) -> None:
        epoch, start = divmod(self.step, len(self.loader))
        self.model.train()
        self.criterion.train()
        asked = time.perf_counter()
        for batch, targets in self.loader.epoch(epoch, start):
            waited = time.perf_counter() - asked
            losses = self._train_step(batch, targets)
            rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
            self.reporter.step(self.step, losses, rates, len(batch), waited)
            if self.config.save_every_steps and self.step % self.config.save_every_steps == 0:
                self._save("last.pt")
            self._stop_if_requested()
            if self.step >= self.total_steps:
                break
            asked = time.perf_counter()

    def _train_step(self, batch: ImageBatch, targets: Sequence[Target]) -> dict[str, float]:
        torch.manual_seed(int(np.random.SeedSequence((self.seed, self.step)).generate_state(1, np.uint64)[0]))
        factor = self.schedule(self.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        try:
            targets = [target.to(self.device) for target in targets]
            predictions = self.model(batch.to(self.device).normalized(), targets)
            losses = self.criterion(predictions, targets)
            if self.policies:
                cost = self.criterion.per_image(predictions, targets)
                losses["loss_policy"] = torch.stack([policy.policy_loss(cost) for policy in self.policies]).sum()
                losses["loss"] = losses["loss"] + losses["loss_policy"]
        except NonFiniteError as error:
            raise NonFiniteError(error.what, error.image_ids, self.step) from None
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses |= self._clip_gradients()
        values = torch.stack(list(losses.values())).tolist()  # one synchronisation for everything that is logged
        if not all(map(math.isfinite, values)):
            raise NonFiniteError("The loss or its gradient", [target.image_id for target in targets], self.step)
        self.optimizer.step()
        self.step += 1
        return dict(zip(losses, values, strict=True))

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Returns the norms before: `grad_norm` of the whole model, `grad_norm/PART` of each of its parts."""
        norms = {}
        for part, parameters in self.parts.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            # Always a value, so that averages over steps mean the same for all parts.
            norms[f"grad_norm/{part}"] = nn.utils.get_total_norm(gradients).to(self.device)
        total = torch.stack(list(norms.values())).norm()
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, total)
        return {"grad_norm": total, **norms}

    def _evaluation_is_due(self) -> bool:
        if self.step == self.evaluated_step:
            return False
        epoch, within = divmod(self.step, len(self.loader))
        return self.step >= self.total_steps or (within == 0 and epoch % self.config.evaluate_every == 0)

    def _evaluate(self) -> None:
        evaluation = self.evaluator(self.model, on_batch=lambda images: self._stop_if_requested())
        self.evaluated_step = self.step
        evaluation.metrics.save(self.run_dir / "evaluation" / "metrics.json")
        values = {**evaluation.metrics.summary, **evaluation.diagnostics}
        self.reporter.evaluation(self.step, values, evaluation.samples)
        if evaluation.metrics.summary["AP"] > self.best:
            self.best = evaluation.metrics.summary["AP"]
            self._save("best.pt")

    def _stop_if_requested(self) -> None:
        if self.stop.requested:
            path = self._save("last.pt")
            raise Interrupted(f"Stopped by a signal at step {self.step}. Go on with trainer.resume={path}")

    def _save(self, name: str) -> Path:
        path = self.run_dir / "checkpoints" / name
        training = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        }
        checkpoint.save(path, {**self.metadata, "model": self.model.state_dict(), "training": training})
        return path

    def _resume(self) -> None:
        path = self.run_dir / "checkpoints" / "last.pt"
        if self.config.resume is None or (self.config.resume == "auto" and not path.exists()):
            return
        path = path if self.config.resume == "auto" else Path(self.config.resume)
        content = checkpoint.load(path)
        checkpoint.load_model_state(self.model, checkpoint.model_state(content, path), path)
        if content["categories"] != self.metadata["categories"]:
            raise UserError(
                f"Checkpoint {path} was trained on other classes than the training data have. Resume on the same data, "
                "or start anew from its weights with weights=PATH."
            )
        training = content["training"]
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(training["optimizer"])
            self.step, self.evaluated_step, self.best = (training[key] for key in ("step", "evaluated_step", "best"))
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
