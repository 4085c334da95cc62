"""Exit codes and messages of the command line."""

import logging
import os
import sys
import threading
import traceback
from contextlib import ContextDecorator
from types import TracebackType
from typing import NoReturn

import torch

from detr.cli import terminal
from detr.errors import Interrupted, UserError
from detr.text import printable_lines

logger = logging.getLogger(__name__)

FAILED, USER_ERROR, STOPPED, INTERRUPTED = 1, 2, 75, 130
_WORKER_PREFIX = "Caught "  # torch's data loader puts the worker's traceback in front of its error message


class exit_codes(ContextDecorator):  # noqa: N801 - used like a function, as contextlib's own are
    """Turns what a user can cause into one message and exit code 2, and a stop by signal into exit code 75.

    Any other error is shown with its traceback, exit code 1. With debug=true on the command line the traceback of the
    user's errors is shown too. It is a decorator and a context manager.
    """

    def __enter__(self) -> None:
        threading.excepthook = _of_thread
        terminal.prepare()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted):
            logger.info("%s", error)
            _end(error, STOPPED)
        if isinstance(error, KeyboardInterrupt):
            _end(error, INTERRUPTED)
        if not isinstance(error, Exception):  # nothing happened, or it is an exit already
            return
        message = _message(error)
        if message is None or "debug=true" in map(str.lower, sys.argv):
            traceback.print_exception(error)
        if message is None:
            _end(error, FAILED)
        logger.error("%s", message) if logging.getLogger().handlers else print(
            f"Error: {printable_lines(message)}", file=sys.stderr
        )
        _end(error, USER_ERROR)


def _of_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread that writes or reads files hands its error on to the thread that waits for it, which reports it."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _end(error: BaseException, code: int) -> NoReturn:
    """Exit, after freeing what the functions that were left held.

    Left to the end of the interpreter, tensors that are still part of a training step make torch abort.
    """
    chain = [error]
    for link in chain:  # which grows meanwhile, and may lead back to where it began
        traceback.clear_frames(link.__traceback__)
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and all(e is not c for c in chain)]
    sys.exit(code)


def _message(error: BaseException | None) -> str | None:
    """The message about an error that the user caused; None for errors that are our fault."""
    if isinstance(error, UserError):
        text = str(error)
        return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith(_WORKER_PREFIX) else text
    if isinstance(error, OSError) and error.filename is not None:
        path = os.fsdecode(error.filename)
        return f"Cannot use {path}: {error.strerror}. Check that the path exists and that you may write there."
    if _is_out_of_memory(error):
        return (
            "Out of memory. Lower the batch size (data.batch_size; batch_size of predict.py) or the size of the images "
            "(data.size and data.max_size; size and max_size of predict.py), or use a machine with more memory."
        )
    return None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Python's own error, that of a GPU, or that of torch on a CPU, which has no type of its own."""
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)
