"""What ends a command, with which exit code and message."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from detr.cli.exit_codes import exit_codes
from detr.errors import Interrupted, UserError


def ended(error: BaseException, cause: BaseException | None = None) -> int | str | None:
    @exit_codes()
    def command() -> None:
        raise error from cause

    # Messages go to the log where there is one, else to standard error.
    with mock.patch.object(logging.root, "handlers", []), pytest.raises(SystemExit) as stop:
        command()
    return stop.value.code


@pytest.fixture(autouse=True)
def without_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a: wanted b."), 2, "Error: a: wanted b.\n"),
        (UserError("Caught UserError in worker 0.\nTraceback\nUserError: a: wanted b."), 2, "Error: a: wanted b.\n"),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            2,
            "Error: Cannot use /x/y: Permission denied. Check that the path exists and that you may write there.\n",
        ),
        (
            ValueError("Unable to configure handler 'file'"),
            2,
            "Error: Cannot use /x/train.log: Read-only file system. Check that the path exists and that you may write "
            "there.\n",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            2,
            "Error: Too many open files. Raise the limit with ulimit -n, or lower data.workers.\n",
        ),
        (Interrupted("saved"), 75, "saved\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_ends_with_code_and_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cause = OSError(errno.EROFS, "Read-only file system", "/x/train.log") if "configure" in str(error) else None
    assert ended(error, cause) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [RuntimeError("ours"), ValueError("ours"), OSError("ours")])
def test_our_own_errors_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(error) == 1
    assert "Traceback" in (shown := capsys.readouterr().err) and "ours" in shown


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("path", [(), ("/x/y",)])
def test_a_full_disk_is_named(number: int, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the error is that of an open file, which has no name."""
    assert ended(OSError(number, os.strerror(number), *path)) == 2
    shown = capsys.readouterr().err
    place = f" {path[0]}" if path else ""
    assert shown.startswith(f"Error: Cannot write{place}: {os.strerror(number)}. What was written before is whole.")
    assert "Make room" in shown and "trainer.resume=auto" in shown and "Traceback" not in shown


def too_large_for_numpy() -> None:
    np.zeros(2**60, dtype=np.int8)


def too_large_for_torch() -> None:
    torch.zeros(2**60, dtype=torch.int8)


def too_large_for_python() -> None:
    bytearray(2**60)


def refused_by_the_system() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def refused_by_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nSee documentation")


@pytest.mark.parametrize(
    "work",
    [too_large_for_numpy, too_large_for_torch, too_large_for_python, refused_by_the_system, refused_by_cuda],
)
def test_memory_that_runs_out_anywhere_is_explained(
    work: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as raised:
        work()
    assert ended(raised.value) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Error: Out of memory: ") and "data.batch_size" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_outside_a_training_puts_everything_in_order(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "temporary"

    @exit_codes()
    def command() -> None:
        temporary.touch()
        try:
            signal.raise_signal(number)
        finally:
            temporary.unlink()

    with mock.patch.object(logging.root, "handlers", []), pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 75 and not temporary.exists()
    assert f"Stopped by {number.name} while no training was under way" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


def test_signals_that_are_ignored_or_awaited_stay_so() -> None:
    heard: list[int] = []
    before = {signal.SIGHUP: signal.SIG_IGN, signal.SIGUSR1: lambda number, frame: heard.append(number)}
    for number, handler in before.items():
        signal.signal(number, handler)
    try:
        with exit_codes():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_takes_what_is_written_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, name, None)
    with exit_codes():
        assert getattr(sys, name).read() == "" if name == "stdin" else getattr(sys, name).write("lost")
        getattr(sys, name).close()


def test_debug_shows_the_traceback_of_a_users_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "debug=True"])
    assert ended(UserError("a: wanted b.")) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("Error: a: wanted b.\n")


def test_an_exit_and_success_pass() -> None:
    def leave() -> None:
        sys.exit(7)

    guarded: Callable[[], None] = exit_codes()(leave)
    with pytest.raises(SystemExit, match="7"):
        guarded()
    with exit_codes():
        pass
