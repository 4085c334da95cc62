"""A folder for results, in which nothing is overwritten except, on request, what the program wrote there itself."""

import errno
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from detr.errors import UserError
from detr.files import read_regular

RECORD, _FORMAT = ".written.jsonl", '{"format": "detr-written-1"}'
_MOST = 2**28  # bytes of the record, which are two million files


class OutputFolder:
    """Writes files into a folder, which may hold other people's files as well.

    A file of an earlier run is replaced on request only, where this class wrote it and nobody has changed it since. To
    know them again, the folder's .written.jsonl keeps the SHA-256 of each. Links inside the folder are never followed;
    the folder itself may be one.

    names: all files that will be written, relative to the folder.
    overwrite: replace those that this class wrote earlier. option: what the user sets to choose another folder.
    Raises UserError, before anything is written, where one of them exists and may not be replaced, or would go through
    a link, and where the folder cannot be written to.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], *, overwrite: bool = False, option: str = "output=DIR"
    ) -> None:
        self.folder, self._option, self._record = folder, option, folder / RECORD
        self._written: dict[str, set[str]] = defaultdict(set)
        self._started = False
        self._check_folder()
        if os.path.lexists(self._record):
            self._read_record()
        for name in names:
            self._check(name, overwrite)

    def write(self, name: str, content: bytes) -> None:
        """Write one file; raises UserError where someone else has put one there meanwhile, or the disk is full."""
        path = self.folder / name
        self._check(name)
        with explained(path):
            self._start()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self.note(name, hashlib.sha256(content).hexdigest())
            _create(path, content)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """One file to write bit by bit. It has its name at the end, also after an error: what was written is kept.

        After a kill it is left over under another name, which ends in .part.
        """
        path = self.folder / name
        self._check(name)
        with explained(path):
            self._start()
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
            with part.open("x+b") as file:
                try:
                    yield file
                finally:
                    file.flush()
                    self._check(name)
                    self.note(name, _digest(part))
                    part.replace(path)

    def wrote(self, path: Path) -> bool:
        """Whether a file is in this folder, and as this class wrote it there."""
        root, place = (Path(os.path.realpath(any_path)) for any_path in (self.folder, path))
        return place.is_relative_to(root) and self._is_own(place.relative_to(root).as_posix())

    def _check_folder(self) -> None:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise UserError(
                f"Cannot write to {self.folder}: {there} is no folder. Choose another one with {self._option}."
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(
                f"Cannot write to {self.folder}: you may not write to {there}. Choose another one with {self._option}."
            )

    def _check(self, name: str, overwrite: bool = True) -> None:
        path = self.folder / name
        if os.path.lexists(path) and not self._is_own(name):
            raise self._refusal(path)
        if os.path.lexists(path) and not overwrite:
            raise UserError(
                f"{path} exists already: it is a result of an earlier run. Choose another folder with {self._option}, "
                "or replace earlier results with overwrite=true."
            )
        if not self._is_in_place(path.parent):
            raise UserError(
                f"{path} would be written to {os.path.realpath(path.parent)}, because a link leads there. Remove the "
                f"link, or choose another folder with {self._option}."
            )

    def _is_own(self, name: str) -> bool:
        path, digests = self.folder / name, self._written.get(name)
        if digests is None or not self._is_plain(path):
            return False
        return _digest(path) in digests

    def _is_plain(self, path: Path) -> bool:
        """Whether it is a file at this very place, and no link to another."""
        return path.is_file() and self._is_in_place(path)

    def _is_in_place(self, path: Path) -> bool:
        """Whether no link inside the folder leads to it; it need not exist."""
        place = Path(os.path.realpath(self.folder)) / path.relative_to(self.folder)
        return Path(os.path.realpath(path)) == place

    def _read_record(self) -> None:
        # A record that has a second name is written under both.
        if not self._is_plain(self._record) or self._record.stat().st_nlink > 1:
            raise self._refusal(self._record)
        text = read_regular(self._record, _MOST).decode(errors="replace")
        first, *lines = text.rpartition("\n")[0].splitlines() or [""]  # without a half line, which a crash leaves
        if first != _FORMAT:
            raise self._refusal(self._record)
        try:
            for row in map(json.loads, lines):
                self._written[row["file"]].add(row["sha256"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._refusal(self._record) from None

    def _start(self) -> None:
        """Before the first file: the record, without the half line that a crash or a full disk left at its end."""
        if self._started:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self._record):
            with self._record.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        else:
            _create(self._record, f"{_FORMAT}\n".encode())
        self._started = True

    def note(self, name: str, digest: str) -> None:
        """Know a file again. It comes before the file is written, so that what was written is known in any case."""
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "sha256": digest}) + "\n")
        self._written[name].add(digest)

    def _refusal(self, path: Path) -> UserError:
        return UserError(
            f"{path} exists already and would be overwritten, but this command did not write it, or it was changed "
            f"since. Choose another folder with {self._option}, or move the file away."
        )


class GrowingFile:
    """A file of an output folder that is whole after every addition, however the program ends.

    before, after: what the file has around the additions.
    """

    def __init__(self, output: OutputFolder, name: str, *, before: bytes = b"", after: bytes = b"") -> None:
        self._output, self._name, self._end = output, name, after
        self._place = len(before)
        self._digest = hashlib.sha256(before)  # of everything but the end
        output.write(name, before + after)

    def append(self, content: bytes) -> None:
        """Write more, which is in the file when this returns; raises UserError where the disk is full."""
        if not content:
            return
        self._digest.update(content)
        whole = self._digest.copy()
        whole.update(self._end)
        path = self._output.folder / self._name
        with explained(path), path.open("r+b", buffering=0) as file:
            self._output.note(self._name, whole.hexdigest())
            file.seek(self._place)
            try:
                if file.write(content + self._end) < len(content + self._end):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.seek(self._place)
                file.write(self._end)  # as before, where there was room for it
                file.truncate()
                raise
        self._place += len(content)


class RowFile(GrowingFile):
    """A list in a JSON file of an output folder, which is valid JSON after every row, however the program ends.

    before, after: what the file has around the rows.
    """

    def __init__(self, output: OutputFolder, name: str, *, before: str = "[", after: str = "]") -> None:
        super().__init__(output, name, before=before.encode(), after=f"\n{after}\n".encode())
        self._first = True

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write further rows, which are in the file when this returns; raises UserError where the disk is full."""
        text = ",".join(f"\n{json.dumps(row)}" for row in rows).encode()
        if text:
            self.append(text if self._first else b"," + text)
            self._first = False


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the disk refuses, as one message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. What was written before is whole. Make room, or choose "
            "another folder that you may write to."
        ) from error


def _create(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:
            path.unlink()  # rather none than a part of it
            raise


def _digest(path: Path) -> str:
    """SHA-256 of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
