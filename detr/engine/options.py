"""The fixed options of training."""

from dataclasses import dataclass
from typing import Any

from detr import distributed
from detr.errors import UserError
from detr.ranges import at_least, check_ranges, one_of


@dataclass
class TrainerConfig:
    """Fixed options of the loop, described in configs/trainer/default.yaml.

    Raises UserError for an option out of its range.
    """

    epochs: int = at_least(1, default=300)
    max_steps: int | None = at_least(1, default=None)
    accumulate: int = at_least(1, default=1)
    precision: str = one_of("fp32", "bf16", "fp16", default="fp32")
    compile: bool = False
    activation_checkpointing: bool = False
    clip_norm: float = at_least(0, default=0.1)
    ema: float = at_least(0, below=1, default=0.0)
    ema_warmup: int | None = at_least(1, default=None)
    restart_after: float | None = at_least(0, most=1, default=None)
    restart_decay: float | None = at_least(0, below=1, default=None)
    restart_fall: float = at_least(0, most=1, default=0.0001)
    freeze: Any = None  # not an empty dict, into which the command line could not put new names
    sync_batch_norm: bool = False
    deterministic: bool = False
    elastic: bool = False
    evaluate_every: int = at_least(1, default=1)
    evaluations: int | None = at_least(1, default=None)
    monitor: str = "AP"
    patience: int | None = at_least(1, default=None)
    save_every_steps: int = at_least(0, default=0)
    save_every_minutes: float = at_least(0, default=0.0)
    keep: int = at_least(1, most=1000, default=2)
    resume: str | None = None
    limit_epoch_steps: int | None = at_least(1, default=None)
    limit_evaluation_images: int | None = at_least(1, default=None)
    overfit_batches: int | None = at_least(1, default=None)
    non_finite: str = one_of("stop", "skip", default="stop")
    max_skips: int = at_least(0, default=10)
    timeout: float = at_least(0.1, most=100_000, default=10.0)
    profile: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "trainer")
        for name in ("compile", "sync_batch_norm") if self.elastic else ():
            if getattr(self, name):
                raise UserError(
                    f"trainer.elastic: wanted trainer.{name}=false, got true: with it the result depends on what each "
                    "process has computed. Set one of them to false."
                )
        self.freeze = {} if self.freeze is None else self.freeze
        if not isinstance(self.freeze, dict) or not all(map(_is_time, self.freeze.values())):
            raise UserError(
                "trainer.freeze: wanted parts of the model, each with an epoch, a fraction of the training from 0.0 to "
                f"1.0, or null, such as {{backbone: 5}} or {{backbone: 0.1}}, got {self.freeze}."
            )

    @property
    def sharing_processes(self) -> int:
        """Processes that each take `data.batch_size` images of every batch; with `elastic` one takes all of them."""
        return 1 if self.elastic else distributed.world_size()

    def epoch_steps(self, batches: int) -> int:
        """Optimizer steps of an epoch of so many batches; raises UserError where these are too few for one step."""
        steps = min(batches // self.accumulate, self.limit_epoch_steps or batches)
        if steps == 0:
            raise UserError(
                f"trainer.accumulate={self.accumulate} is more than the {batches} batches of an epoch. Lower it, or "
                "data.batch_size."
            )
        return steps

    def total_steps(self, batches: int) -> int:
        """Optimizer steps of the whole training."""
        return self.epochs * self.epoch_steps(batches) if self.max_steps is None else self.max_steps

    def total_epochs(self, batches: int) -> int:
        """Epochs of the training; the last one may be cut short and counts too."""
        return -(-self.total_steps(batches) // self.epoch_steps(batches))

    def restart_epoch(self, batches: int) -> int:
        """The epoch before which the training returns to its best checkpoint; the number of epochs where it does not.

        With restart_after below 1 that is the last of several epochs at the latest, as for data.plain_after.
        """
        epochs = self.total_epochs(batches)
        if self.restart_after is None or self.restart_after == 1:
            return epochs
        return min(round(self.restart_after * epochs), max(epochs - 1, 1))

    def evaluation_epochs(self, batches: int) -> int:
        """Epochs between two evaluations."""
        if self.evaluations is None:
            return self.evaluate_every
        return -(-self.total_epochs(batches) // self.evaluations)


def _is_time(value: Any) -> bool:
    """Whether it is an epoch, a fraction of the training, or None for never."""
    return 0 <= value <= 1 if isinstance(value, float) else isinstance(value, int | None)
