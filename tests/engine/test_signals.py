"""Signals during the training, and those who wait for them too."""

import os
import signal

import pytest

from detr.engine.signals import StopRequest
from detr.errors import Interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_whoever_waited_for_the_signal_gets_it_when_all_is_saved(number: signal.Signals) -> None:
    events: list[str] = []
    before = signal.signal(number, lambda *_: events.append("handler"))
    try:
        with pytest.raises(Interrupted), StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            events.append("saved")
            raise Interrupted
        assert events == ["saved", "handler"]
        with StopRequest():  # came too late, in a training that ended well
            os.kill(os.getpid(), number)
        assert events == ["saved", "handler"]
    finally:
        signal.signal(number, before)


def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
