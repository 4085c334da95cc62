"""Errors that a user can cause, and the signals that end a run early."""

import errno
import reprlib
from collections.abc import Sequence
from pathlib import Path

from detr.folders import command

_repr = reprlib.Repr()
_repr.maxstring = 200
brief = _repr.repr  # for values in messages, which may be of any length
_NO_MEMORY = (
    "out of memory",  # torch.OutOfMemoryError and CUDA's own
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
    "ALLOC_FAILED",
)


class UserError(ValueError):
    """Bad input or configuration: one message that says what, where, what was wanted and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class NonFiniteError(UserError):
    """Predictions or losses became NaN or infinite."""

    def __init__(
        self, what: str, image_ids: Sequence[int], step: int | None = None, captured: Path | None = None
    ) -> None:
        super().__init__(what, image_ids, step, captured)
        self.what, self.image_ids, self.step, self.captured = what, list(image_ids), step, captured

    def __str__(self) -> str:
        where = "" if self.step is None else f" at step {self.step}"
        replay = f" Look into it with {command('replay')} {self.captured}" if self.captured else ""
        return (
            f"{self.what} became NaN or infinite{where}, for image ids {self.image_ids}. Likely causes: a learning "
            "rate that is too high (lower optimizer.lr, or set scheduler.warmup), gradients that are not clipped "
            f"(set trainer.clip_norm=0.1), or weights that were already damaged (check weights=PATH).{replay}"
        )


class NonFiniteOutputsError(UserError):
    """What a detector gave for an image is NaN or infinite."""


class Interrupted(BaseException):
    """A signal stopped the run after its state was saved; the command line exits with code 75.

    Like KeyboardInterrupt it is no Exception, so that nothing on the way takes it for an error to be handled.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python, NumPy, torch, CUDA or the system, says that there is no more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    return known or isinstance(error, MemoryError)
