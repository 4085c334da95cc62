"""SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 as a polite request to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from detr import distributed
from detr.errors import Interrupted

# Schedulers such as SLURM send SIGUSR1 or SIGUSR2 before a job's time is over; a terminal that closes sends SIGHUP.
_OF_OTHERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside it these signals raise Interrupted, so that what is under way is put in order, instead of ending at once.

    A signal that is ignored, as nohup has it, or that somebody else waits for, as submitit does, is left to them.
    """
    main = threading.current_thread() is threading.main_thread()
    free = [number for number in _OF_OTHERS if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in free:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(
        f"Stopped by {signal.Signals(number).name} while no training was under way, so that nothing had to be saved. "
        "Start the same command again."
    )


class _AtOnce(BaseException):
    """What leaves the body of `at_once`."""


class StopRequest:
    """Inside its `with`, the first of the signals only sets `requested`; a second SIGINT interrupts at once.

    A process of torchrun is also to stop where torchrun is gone: nobody would end it, or wait for it. SIGHUP stays
    ignored where it is, as by nohup. Whoever waited for a signal before, as submitit does to queue the job again, gets
    it at the end, when Interrupted says that all is saved.
    """

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Any] = {}
        self._leaves_at_once = False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def requested(self) -> bool:
        return bool(self._received) or self._launcher not in (None, os.getppid())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what may wait for ever and can be left anywhere: its body ends, without an error, at a signal.

        One of several processes waits, because the others do not know where it is.
        """
        self._leaves_at_once = distributed.world_size() == 1
        try:
            yield
        except _AtOnce:
            pass
        finally:
            self._leaves_at_once = False

    def __enter__(self) -> "StopRequest":
        self._received.clear()
        signals = [number for number in (signal.SIGINT, *_OF_OTHERS) if not _hangs_up_unheard(number)]
        self._previous = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for received in self._received if isinstance(error, Interrupted) else []:
            handler = self._previous[received]
            if callable(handler) and handler not in (_interrupt, signal.default_int_handler):
                handler(received, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received.append(signal.Signals(number))
        if self._leaves_at_once:
            self._leaves_at_once = False
            raise _AtOnce


def _hangs_up_unheard(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
