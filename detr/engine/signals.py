"""SIGINT, SIGTERM and SIGUSR1 as a polite request to stop."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Inside its `with`, the first of the signals only sets `requested`; a second SIGINT interrupts at once.

    SIGUSR1 is what schedulers such as SLURM can be told to send before a job's time is over.
    """

    _signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._on_signal) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
