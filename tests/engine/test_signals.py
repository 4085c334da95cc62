"""Signals during the training, and those who wait for them too."""

import os
import select
import signal

import pytest

from detr import distributed
from detr.engine.signals import StopRequest, interruptible
from detr.errors import Interrupted

ALL = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", ALL)
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


def test_a_terminal_that_closes_is_heard_but_for_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ALL)
def test_a_stop_of_a_command_is_reported_once(number: signal.Signals) -> None:
    """The command's own handler, which ends what is no training, is none of those who wait."""
    with pytest.raises(Interrupted, match="saved"), interruptible(), StopRequest():
        os.kill(os.getpid(), number)
        raise Interrupted("saved")


@pytest.mark.parametrize("number", [signal.SIGINT, *ALL])
def test_what_waits_for_ever_is_left_at_a_signal(number: signal.Signals) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
    with StopRequest() as stop:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with stop.at_once():
            select.select([], [], [], 60)
            raise AssertionError
        assert stop.requested


def test_one_of_several_processes_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with StopRequest() as stop, stop.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_a_launcher_that_is_gone_is_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = StopRequest()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    launched = StopRequest()
    assert not launched.requested
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.requested and not alone.requested
