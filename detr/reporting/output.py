"""A folder for results, in which nothing is overwritten except what the program wrote there itself."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from detr.errors import UserError
from detr.files import read_regular

_RECORD, _FORMAT = ".written.jsonl", '{"format": "detr-written-1"}'
_MOST = 2**26  # bytes of the record, which are half a million files


class OutputFolder:
    """Writes files into a folder, which may hold other people's files as well.

    A file is replaced only where this class wrote it earlier and nobody has changed it since. To know them again, the
    folder's .written.jsonl keeps the SHA-256 of each. Links inside the folder are never followed; the folder itself may
    be one.

    names: all files that will be written, relative to the folder. option: what the user sets to choose another folder.
    Raises UserError, before anything is written, where one of them would replace a file of someone else or go through
    a link.
    """

    def __init__(self, folder: Path, names: Iterable[str], *, option: str = "output=DIR") -> None:
        self.folder, self._option, self._record = folder, option, folder / _RECORD
        first_time = not os.path.lexists(self._record)
        self._written = {} if first_time else self._read_record()
        for name in names:
            self._check(name)
        folder.mkdir(parents=True, exist_ok=True)
        if first_time:
            _create(self._record, f"{_FORMAT}\n".encode())
        else:
            self._cut_record()

    def write(self, name: str, content: bytes) -> None:
        """Write one file; raises UserError where someone else has put one there meanwhile."""
        path = self.folder / name
        self._check(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._note(name, hashlib.sha256(content).hexdigest())
        _create(path, content)

    def _check(self, name: str) -> None:
        path = self.folder / name
        if os.path.lexists(path) and not self._is_own(name):
            raise self._refusal(path)
        if not self._is_in_place(path.parent):
            raise UserError(
                f"{path} would be written to {os.path.realpath(path.parent)}, because a link leads there. Remove the "
                f"link, or choose another folder with {self._option}."
            )

    def _is_own(self, name: str) -> bool:
        path, digest = self.folder / name, self._written.get(name)
        if digest is None or not self._is_plain(path):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest

    def _is_plain(self, path: Path) -> bool:
        """Whether it is a file at this very place, and no link to another."""
        return path.is_file() and self._is_in_place(path)

    def _is_in_place(self, path: Path) -> bool:
        """Whether no link inside the folder leads to it; it need not exist."""
        place = Path(os.path.realpath(self.folder)) / path.relative_to(self.folder)
        return Path(os.path.realpath(path)) == place

    def _read_record(self) -> dict[str, str]:
        # A record that has a second name is written under both.
        if not self._is_plain(self._record) or self._record.stat().st_nlink > 1:
            raise self._refusal(self._record)
        text = read_regular(self._record, _MOST).decode(errors="replace")
        first, *lines = text.rpartition("\n")[0].splitlines() or [""]  # without a half line, which a crash leaves
        if first != _FORMAT:
            raise self._refusal(self._record)
        try:
            return {row["file"]: row["sha256"] for row in map(json.loads, lines)}
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._refusal(self._record) from None

    def _cut_record(self) -> None:
        """Remove the half line that a crash or a full disk left, so that the next one stands alone."""
        with self._record.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def _note(self, name: str, digest: str) -> None:
        """Before the file is written, so that one that was written is known, whatever happens then."""
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "sha256": digest}) + "\n")
        self._written[name] = digest

    def _refusal(self, path: Path) -> UserError:
        return UserError(
            f"{path} exists already and would be overwritten, but this program did not write it, or it was changed "
            f"since. Choose another folder with {self._option}, or move the file away."
        )


def _create(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
