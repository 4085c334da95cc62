"""What a command prints arrives, or is lost, but never ends the command."""

import io
import logging
import os
import sys
from typing import Any

from detr.text import printable_lines


def prepare() -> None:
    """Make standard output, standard error and the log take any text, whatever becomes of the other end.

    Characters that an encoding lacks become escapes. What is written to a pipe that was closed, or to a full disk, is
    lost. Control characters in messages, which come from names in foreign files, become escapes.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: PTH123, SIM115 - closed when the command started
    sys.stdout, sys.stderr = _open(sys.stdout), _open(sys.stderr)
    logging.setLogRecordFactory(_Record)
    logging.raiseExceptions = False  # a log file that cannot be written is no reason for tracebacks


def _open(stream: Any) -> Any:
    if stream is None:  # it was closed when the command started
        stream = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for the rest of the process
    if type(stream) is not io.TextIOWrapper or isinstance(stream.buffer, _Unbroken):
        return stream  # it is someone's own, or prepared already
    return io.TextIOWrapper(
        _Unbroken(stream),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
    )


class _Unbroken(io.BufferedIOBase):
    """Bytes for a text stream that may be closed at its other end: from then on they go nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream  # which would close its file if nothing held it

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, data: Any) -> int:
        try:
            self._stream.buffer.write(data)
            self._stream.buffer.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return len(data)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return printable_lines(super().getMessage())
