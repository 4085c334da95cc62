"""Exit codes and messages of the command line."""

import errno
import logging
import os
import sys
import threading
import traceback
from contextlib import ContextDecorator, ExitStack, suppress
from types import TracebackType
from typing import NoReturn

from detr.cli import terminal
from detr.engine.signals import interruptible
from detr.errors import Interrupted, UserError, out_of_memory
from detr.text import printable_lines

logger = logging.getLogger(__name__)

FAILED, USER_ERROR, STOPPED, INTERRUPTED = 1, 2, 75, 130
_WORKER_PREFIX = "Caught "  # torch's data loader puts the worker's traceback in front of its error message
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class exit_codes(ContextDecorator):  # noqa: N801 - used like a function, as contextlib's own are
    """Turns what a user can cause into one message and exit code 2, and a stop by signal into exit code 75.

    Any other error is shown with its traceback, exit code 1. With debug=true on the command line the traceback of the
    user's errors is shown too. It is a decorator and a context manager.
    """

    def __enter__(self) -> None:
        threading.excepthook = _of_thread
        terminal.prepare()
        self._signals = ExitStack()
        self._signals.enter_context(interruptible())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.close()
        if isinstance(error, Interrupted):
            _say(logging.INFO, str(error))
            _end(error, STOPPED)
        if isinstance(error, KeyboardInterrupt):
            _end(error, INTERRUPTED)
        if isinstance(error, Exception):
            _end(error, report(error))


def report(error: Exception) -> int:
    """Show an error as the command line does; returns its exit code."""
    message = _message(error)
    with suppress(OSError, ValueError):  # a terminal that is gone
        if message is None or "debug=true" in map(str.lower, sys.argv):
            traceback.print_exception(error)
        if message is not None:
            _say(logging.ERROR, message)
    return FAILED if message is None else USER_ERROR


def release(error: BaseException) -> None:
    """Free what the functions that an error left held.

    Left to the end of the interpreter, tensors that are still part of a training step make torch abort.
    """
    chain = [error]
    for link in chain:  # which grows meanwhile, and may lead back to where it began
        traceback.clear_frames(link.__traceback__)
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and all(e is not c for c in chain)]


def _of_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread that writes or reads files hands its error on to the thread that waits for it, which reports it."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _say(level: int, message: str) -> None:
    """To the log where there is one, else to standard error."""
    if logging.getLogger().handlers:
        logger.log(level, "%s", message)
    else:
        print(printable_lines(f"Error: {message}" if level == logging.ERROR else message), file=sys.stderr)


def _end(error: BaseException, code: int) -> NoReturn:
    release(error)
    sys.exit(code)


def _message(error: BaseException | None) -> str | None:
    """The message about an error that the user caused; None for errors that are our fault."""
    if isinstance(error, UserError):
        text = str(error)
        return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith(_WORKER_PREFIX) else text
    if error is None:
        return None
    if out_of_memory(error):
        return (
            f"Out of memory: {str(error).strip().partition(chr(10))[0] or type(error).__name__}. Lower the batch size "
            "and the size of images (data.batch_size and data.max_size; in predict.py batch_size and max_size), "
            "data.workers, or choose a smaller model; or end other programs."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _of_files(error)
    return _message(error.__cause__)  # a library's words for an error of files


def _of_files(error: OSError) -> str | None:
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else None
    if error.errno in _FULL:
        return (
            f"Cannot write{f' {path}' if path else ''}: {error.strerror}. What was written before is whole. Make room "
            "there, or raise the quota, and start the same command again; a training goes on with trainer.resume=auto."
        )
    if error.errno == errno.EMFILE:
        return f"{error.strerror}. Raise the limit with ulimit -n, or lower data.workers."
    if path is None:
        return None
    return f"Cannot use {path}: {error.strerror}. Check that the path exists and that you may write there."
