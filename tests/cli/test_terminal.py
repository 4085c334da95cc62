"""Streams and the log take any text, whatever becomes of the other end."""

import io
import logging
import os
import sys
from pathlib import Path

import pytest

from detr.cli import terminal


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())


def stream(descriptor: int, encoding: str = "ascii") -> io.TextIOWrapper:
    return io.TextIOWrapper(os.fdopen(descriptor, "wb"), encoding=encoding)


def prepared(monkeypatch: pytest.MonkeyPatch, name: str, stream: io.TextIOWrapper | None) -> io.TextIOBase:
    monkeypatch.setattr(sys, name, stream)
    terminal.prepare()
    made = getattr(sys, name)
    terminal.prepare()
    assert getattr(sys, name) is made, "a second time changes nothing"
    return made


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_pipe_that_is_closed_takes_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    original = stream(writer)
    made = prepared(monkeypatch, name, original)
    print("heard", file=made, flush=True)
    assert os.read(reader, 99) == b"heard\n"
    os.close(reader)
    for _ in range(3):
        print("lost", file=made, flush=True)
    original.flush()  # as the interpreter does at its end
    assert made.fileno() == writer and not made.isatty()


def test_a_full_disk_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    made = prepared(monkeypatch, "stdout", stream(os.open("/dev/full", os.O_WRONLY)))
    print("lost" * 9999, file=made, flush=True)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_was_closed_at_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with prepared(monkeypatch, name, None) as made:
        print("lost", file=made, flush=True)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", rb"\u72d7 Gr\xf6\xdfe"), ("latin-1", b"\\u72d7 Gr\xf6\xdfe")]
)
def test_what_an_encoding_lacks_becomes_an_escape(
    encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    print("\u72d7 Größe \ud800", file=prepared(monkeypatch, "stdout", stream(file, encoding)), flush=True)
    assert (tmp_path / "out").read_bytes() == shown + b" \\ud800\n"


def test_control_characters_do_not_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    terminal.prepare()
    logging.getLogger("x").warning("name %s\nnext", "\x1b[31mred\x07 \u202egpj\ud800 狗")
    assert caplog.messages == ["name \\x1b[31mred\\x07 \\u202egpj\\ud800 狗\nnext"]
