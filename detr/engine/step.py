"""One step of the optimizer: what happens between a batch and changed weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from detr import distributed
from detr.engine.batches import Batch
from detr.engine.options import TrainerConfig
from detr.engine.profile import phase
from detr.errors import NonFiniteError, UserError, out_of_memory
from detr.losses import SetCriterion
from detr.models.attention import Policy
from detr.types import ImageBatch, Predictions, Target

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStep:
    """Forward pass, losses, backward pass over one or several accumulated batches; clipping; update of the weights.

    All randomness follows from the seed, the step's number, the process and the number of the batch in the step.

    process, own: another process than this one, and the numbers of its batches in the step, to repeat what happened
    there.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        criterion: SetCriterion,
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig,
        seed: int,
        process: int | None = None,
        own: range | None = None,
    ) -> None:
        self.process = distributed.rank() if process is None else process
        self.own = range(config.accumulate) if own is None else own
        self.model, self.criterion, self.optimizer, self.config, self.seed = model, criterion, optimizer, config, seed
        self.device = next(model.parameters()).device
        self.dtype = _DTYPES[config.precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.policies = [module for module in model.modules() if isinstance(module, Policy)]
        self.parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self.parts.setdefault(name.partition(".")[0], []).append(parameter)
        self.parallelize()

    def parallelize(self) -> None:
        """Share gradients among processes; again whenever other parameters train than before.

        Raises UserError where none does.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(
                "Nothing in the model trains: trainer.freeze, model.backbone.freeze and optimizer.backbone_lr=0 hold "
                "all of it. Let a part train."
            )
        self.runner = distributed.parallel(self.model, self.device)

    def __call__(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """Losses by name, over all batches and processes, and norms of the gradient.

        Raises NonFiniteError, in all processes, where there is nothing sound to learn from in one of them; weights,
        statistics and the optimizer are then as before.
        """
        kept = [buffer.clone() for buffer in self.model.buffers()] if self.config.non_finite == "skip" else []
        try:
            return self._attempt(batches, step)
        except NonFiniteError:
            if kept:
                restore(self.model, kept)
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def _attempt(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        counts = distributed.gather(count_objects(batches, self.device))
        self.optimizer.zero_grad(set_to_none=True)
        parts, failure = [], None
        for number, batch in zip(self.own, batches, strict=True):
            with self._sharing(number == self.own[-1]):
                losses, failed = self._learn(batch, counts, step, number)
            parts.append(losses)
            failure = failure or failed
        raise_together(failure)
        sums = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        return self._update(sums, batches)

    def _learn(
        self, batch: Batch, counts: Tensor, step: int, number: int
    ) -> tuple[dict[str, Tensor], NonFiniteError | None]:
        """Losses and gradients of one batch. number: of the batch in the step."""
        seed = np.random.SeedSequence((self.seed, step, number, self.process))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        with self._explained(batch):
            losses, failed = self._losses(*batch, counts)
            with phase("backward"):
                self.scaler.scale(losses["loss"]).backward()
        return {name: value.detach() for name, value in losses.items()}, failed

    def _update(self, sums: Mapping[str, Tensor], batches: Sequence[Batch]) -> dict[str, float]:
        """Clip the gradient, step the optimizer; returns what is logged. sums: of the losses of accumulated batches."""
        with phase("update"):
            self.scaler.unscale_(self.optimizer)
            norms = self._clip_gradients()
            # Parts of a loss add up to that of the step; what is logged only is a mean.
            count = self.config.accumulate
            means = {name: value / (1 if name.startswith("loss") else count) for name, value in sums.items()}
            names = [*means, *norms]
            # One synchronization for everything that is logged.
            values = distributed.mean(torch.stack([*means.values(), *norms.values()])).tolist()
            result = dict(zip(names, values, strict=True))
            if what := self._not_finite(result):
                self.scaler.update()  # which takes the next step for a part of this one otherwise
                raise NonFiniteError(what, [target.image_id for _, targets in batches for target in targets])
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return result

    def _not_finite(self, values: Mapping[str, float]) -> str | None:
        """What of a step's values is in the way of it. values: as they are logged."""
        finite = all(map(math.isfinite, values.values()))
        if not math.isfinite(values["loss"]) or not (finite or self.scaler.is_enabled()):
            return "The loss or its gradient"
        # The scaler leaves out steps until the scale fits, which is of no use where the gradient itself is not finite.
        hopeless = not finite and self.scaler.get_scale() < 1
        return "The gradient, however little the loss was scaled for fp16," if hopeless else None

    def _losses(
        self, batch: ImageBatch, targets: Sequence[Target], counts: Tensor
    ) -> tuple[dict[str, Tensor], NonFiniteError | None]:
        """The losses of one batch. Where they cannot be had, one of NaN: other processes wait for its gradients."""
        targets = [target.to(self.device) for target in targets]
        with phase("forward"), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            predictions = self.runner(batch.to(self.device), targets)
        try:
            with phase("losses"):
                losses = self.criterion(predictions, targets, counts)
        except NonFiniteError as error:
            return {"loss": math.nan * _sum(predictions)}, error.with_traceback(None)
        if self.policies:
            cost = self.criterion.per_image(predictions, targets)
            terms = torch.stack([policy.policy_loss(cost) for policy in self.policies])
            losses["loss_policy"] = terms.sum() / self.config.accumulate
            losses["loss"] = losses["loss"] + losses["loss_policy"]
        return losses, None

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

    def _sharing(self, last: bool) -> AbstractContextManager[None]:
        """Processes share gradients once a step, after the last of its batches."""
        return nullcontext() if last else distributed.without_sharing(self.runner)

    @contextmanager
    def _explained(self, batch: Batch) -> Iterator[None]:
        """Turns errors that the batch or an option causes into messages that say what to change."""
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "Batch norm has a single value to take statistics of: a map of one cell of one image. Raise "
                "data.batch_size or data.size, or choose another norm or place for an attention block."
            ) from None
        except RuntimeError as error:
            text = str(error)
            images, targets = batch
            if out_of_memory(error):
                count, _, height, width = images.images.shape
                raise UserError(
                    f"Out of memory with a batch of {count} images, padded to {width} x {height} pixels, with "
                    f"{sum(map(len, targets))} objects. Lower data.batch_size (trainer.accumulate makes up for it), "
                    "data.max_size and the sizes of data.transforms, or set trainer.precision=bf16 or "
                    "trainer.activation_checkpointing=true."
                ) from None
            if isinstance(error, TorchDynamoException):
                cause = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
                raise UserError(
                    f"trainer.compile=true cannot be done here: {cause}. It needs a C++ "
                    "compiler, and on a GPU Python's header files. Install them, or set trainer.compile=false."
                ) from None
            if "deterministic" in text:
                option = "trainer.elastic" if self.config.elastic else "trainer.deterministic"
                raise UserError(
                    f"{option}=true cannot be kept: {text.partition('. ')[0]}. Choose another model option, or set "
                    f"{option}=false."
                ) from None
            raise


def restore(model: nn.Module, buffers: Sequence[Tensor]) -> None:
    """Set the model's buffers to what they were."""
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)


def count_objects(batches: Sequence[Batch], device: torch.device) -> Tensor:
    """The number of objects in each image."""
    return torch.tensor([len(target) for _, targets in batches for target in targets], device=device)


def raise_together(failure: NonFiniteError | None) -> None:
    """Raise NonFiniteError, in all processes, where one of them failed."""
    if distributed.any_of(failure is not None):
        # Another object than `failure`: one that holds the step's functions, which hold it, would keep the whole step.
        raise NonFiniteError(*(failure or NonFiniteError("The model's predictions in another process", [])).args)


def _sum(predictions: Predictions) -> Tensor:
    """Of everything in them, so that every parameter gets a gradient."""
    return torch.stack([tensor.sum() for tensor in predictions.everything()]).sum()
