"""What tests of whole trainings share."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from detr.engine import Trainer
from detr.files import read_tensors

Make = Callable[..., Trainer]


def last(run_dir: Path) -> dict[str, Any]:
    return read_tensors(run_dir / "checkpoints" / "last.pt")


def assert_same_state(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        for left, right in zip(a, b, strict=True):
            assert_same_state(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


class StopsAt:
    """Asks for a stop, as a signal would, when so many steps are done."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.at = trainer, step

    def start(self, *arguments: Any) -> None: ...

    def scalars(self, *arguments: Any) -> None: ...

    def pictures(self, *arguments: Any) -> None: ...

    def close(self) -> None: ...

    def advance(self, losses: Any) -> None:
        if self.trainer.state.step == self.at:
            signal.raise_signal(signal.SIGUSR1)
