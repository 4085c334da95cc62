"""Checkpoints that are written while the training goes on."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from detr.weights import save


class Saving:
    """Writes checkpoints in a thread. It holds the training up while it copies them, and while one is being written.

    So main memory holds one copy at most. An error of writing is raised by the call after it, or by `wait`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def __call__(self, content: Mapping[str, Any], files: Sequence[tuple[Path, int]]) -> None:
        """Write the same content to some files, in their order. files: each with how many of it to keep."""
        self.wait()
        self._under_way = self._thread.submit(_write, _copied(content, {}), files)

    def wait(self) -> None:
        """Until everything is on the disk. Raises UserError where it could not be written."""
        if (under_way := self._under_way) is not None:
            wait([under_way])  # a second SIGINT can end it here: what is under way is then to be waited for again
            self._under_way = None
            under_way.result()


def _write(content: Mapping[str, Any], files: Sequence[tuple[Path, int]]) -> None:
    for path, keep in files:
        save(path, content, keep=keep)


def _copied(value: Any, known: dict[Any, Tensor]) -> Any:
    """A copy in main memory. known: copies so far, since parts of a model may share tensors, which are saved once."""
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        if key not in known or value.numel() == 0:
            known[key] = value.detach().to("cpu", copy=True)
        return known[key]
    if isinstance(value, Mapping):
        return {name: _copied(one, known) for name, one in value.items()}
    return type(value)(_copied(one, known) for one in value) if isinstance(value, list | tuple) else value
