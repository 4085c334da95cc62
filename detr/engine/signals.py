"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 as a polite request to stop."""

import signal
from types import FrameType, TracebackType
from typing import Any

from detr.errors import Interrupted


class StopRequest:
    """Inside its `with`, the first of the signals only sets `requested`; a second SIGINT interrupts at once.

    SIGUSR1 and SIGUSR2 are what schedulers such as SLURM send before a job's time is over. Whoever waited for such a
    signal before, as submitit does to queue the job again, gets it at the end, when Interrupted says that all is saved.
    """

    _signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self._received)

    def __enter__(self) -> "StopRequest":
        self._received.clear()
        self._previous = {number: signal.signal(number, self._on_signal) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for received in self._received if isinstance(error, Interrupted) else []:
            handler = self._previous[received]
            if callable(handler) and received != signal.SIGINT:
                handler(received, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received.append(signal.Signals(number))
