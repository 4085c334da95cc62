"""What ends a command, with which exit code and message."""

import logging
import sys
from collections.abc import Callable
from unittest import mock

import pytest

from detr.cli import exit_codes
from detr.errors import Interrupted, UserError


def ended(error: BaseException) -> int | str | None:
    @exit_codes()
    def command() -> None:
        raise error

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
        (Interrupted("saved"), 75, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_ends_with_code_and_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(error) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [RuntimeError("ours"), ValueError("ours"), OSError("ours")])
def test_our_own_errors_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(error) == 1
    assert "Traceback" in (shown := capsys.readouterr().err) and "ours" in shown


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
