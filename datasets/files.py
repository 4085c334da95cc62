"""The image files that annotations name: where they are, and that they are inside of their folder."""

import logging
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from datasets.findings import Finding, some
from datasets.formats.base import ImageRecord
from detr.errors import UserError, brief

logger = logging.getLogger(__name__)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


def with_files(records: Sequence[ImageRecord], folder: Path, source: Path) -> list[ImageRecord]:
    """The records with the names that their files have in the folder.

    A name may have the slashes of Windows, other capitals, or its accents composed otherwise; a warning counts these.
    Raises UserError where a file is missing or no regular one, or where its name or a link leads out of the folder.
    """
    found, problems = find_files(records, folder, source)
    for problem in problems:
        raise UserError(str(problem))
    return found


def find_files(records: Sequence[ImageRecord], folder: Path, source: Path) -> tuple[list[ImageRecord], list[Finding]]:
    """Likewise, but without the records whose files are missing, or outside of the folder, and findings of these."""
    for record in records:
        _check_name(record, source)
    if not folder.is_dir():
        raise UserError(
            f"Image folder {folder} does not exist. Set data.root, or data.train.images and data.val.images."
        )
    names = [record.file_name for record in records]
    present, outside = _listed(folder, names)
    if missing := [name for name in names if _plain(name) not in present]:
        records, names = _found_otherwise(records, set(missing), folder, source)
        present, outside = _listed(folder, names)
        missing = [name for name in names if _plain(name) not in present]
    leading = [name for name in names if _plain(name) in outside]
    kinds = (
        (
            "missing images",
            missing,
            f"missing in {folder}",
            "Complete the folder, or remove the images from the annotation file.",
        ),
        (
            "images outside",
            leading,
            f"links that lead out of {folder}",
            "Put the files themselves there, or name the folder that holds them all.",
        ),
    )
    problems = [
        Finding(
            kind=kind,
            severity="error",
            count=len(wrong),
            text=f"{len(wrong)} of {len(records)} image files are {what}, the first is {brief(wrong[0])}.",
            advice=advice,
            files=some(wrong),
        )
        for kind, wrong, what, advice in kinds
        if wrong
    ]
    lost = {*missing, *leading}
    return [record for record in records if record.file_name not in lost], problems


def _check_name(record: ImageRecord, source: Path) -> None:
    name, parts = record.file_name, PureWindowsPath(record.file_name)  # which takes both kinds of slashes for one
    problem = None
    if _ADDRESS.match(name):
        problem = "is an address. Download the images"
    elif parts.root or parts.drive:
        problem = "is an absolute path, and may lead out of the image folder"
    elif ".." in parts.parts or "\0" in name:
        problem = "leads out of the image folder or is no name at all"
    if problem:
        raise UserError(
            f"{source}: image {record.id} has the file name {brief(name)}, which {problem}. Give names relative to the "
            "folder in data.train.images and data.val.images."
        )


def _listed(folder: Path, names: Collection[str]) -> tuple[set[str], set[str]]:
    """Names of the files in the folders of these, and of those that links lead out of `folder`.

    One listing a folder instead of one system call an image; links alone are looked at.
    """
    root, present, outside = folder.resolve(), set(), set()
    for parent in {PurePosixPath(name).parent for name in names}:
        if not (folder / parent).is_dir():
            continue
        inside = (folder / parent).resolve().is_relative_to(root)
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                name = str(parent / entry.name)
                if entry.is_file():
                    present.add(name)
                if not inside or (entry.is_symlink() and not Path(entry).resolve().is_relative_to(root)):
                    outside.add(name)
    return present, outside


def _found_otherwise(
    records: Sequence[ImageRecord], missing: Collection[str], folder: Path, source: Path
) -> tuple[list[ImageRecord], list[str]]:
    """The records, and their names, with the names of files that are alike in place of those that are missing."""
    alike = cache(_alike)

    def found(name: str) -> str | None:
        place = Path()
        for part in PurePosixPath(name.replace("\\", "/")).parts:
            names = alike(folder / place)
            same = [part] if part in names else [other for other in names if names[other] == _folded(part)]
            if len(same) != 1:
                return None
            place /= same[0]
        return place.as_posix()

    names = {name: other for name in missing if (other := found(name)) is not None}
    if names:
        name, other = next(iter(names.items()))
        text = "%s: %d file names are written otherwise than in %s, such as %s for %s. These files are used."
        logger.warning(text, source, len(names), folder, ascii(name), ascii(other))
    renamed = [replace(record, file_name=names.get(record.file_name, record.file_name)) for record in records]
    return renamed, [record.file_name for record in renamed]


def _alike(folder: Path) -> dict[str, str]:
    """The names in a folder, each with what it has in common with those that are meant by it."""
    return {name: _folded(name) for name in os.listdir(folder)} if folder.is_dir() else {}  # noqa: PTH208


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _plain(name: str) -> str:
    return str(PurePosixPath(name))
