"""Files from anywhere: read without running code from them, and written whole or not at all."""

import argparse
import errno
import os
import pickle
import stat
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from detr.archive import check_archive, is_archive, seal
from detr.errors import UserError

# What torch and zipfile raise for content that is none.
_DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    BadZipFile,
    SafetensorError,
)
FULL = (errno.ENOSPC, errno.EDQUOT)  # what systems say of a disk or a quota that has no more room
# What file systems answer that cannot do what is asked, or need not.
_UNSUPPORTED = (
    errno.EINVAL,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
)


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Load any file of tensors and plain values, options of argparse included, on the CPU.

    Raises UserError for everything else.

    Reads PyTorch's format, and that of safetensors by the ending .safetensors. Checksums are checked.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"Checkpoint {path} is a folder. Give the file, such as {path / 'checkpoints' / 'best.pt'}.")
    try:
        with open_regular(path) as file:
            content = _load(file, path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"Checkpoint {path} does not exist. Give a .pt, .pth or .safetensors file.") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Checkpoint {path} is refused: it is damaged, or holds objects other than tensors and plain values, which "
            f"could run code ({_first_sentence(error)}). Use a checkpoint that this framework or published DETR wrote."
        ) from None
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.filename is not None:  # it is the file, not what is in it
            raise UserError(f"Checkpoint {path} cannot be opened: {error.strerror}. Give a file to read.") from None
        raise UserError(
            f"Checkpoint {path} is cut short or damaged ({_first_sentence(error)}). Use an intact copy, "
            "such as another checkpoint of its folder."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"Checkpoint {path} holds a {type(content).__name__}, wanted a dict with a 'model' state dict.")
    return content


def _load(file: BinaryIO, path: Path) -> Any:
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if is_archive(file):
        check_archive(file)
    file.seek(0)
    # Published files hold the options of their training beside the weights, as argparse has them: attributes alone.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes.

    Raises UserError where it is larger, or a device or a pipe, which might never end.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path} has {size} bytes, wanted at most {most}. Replace or remove it.")
        return file.read(most)


def open_regular(path: str | Path) -> BinaryIO:
    """A file, open for reading. Raises UserError where it is a device or a pipe, for which one could wait for ever."""
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise UserError(f"{path} is a device or a pipe, wanted a file. Replace or remove it.")


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for a pipe's writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_tensors(path: str | Path, content: Mapping[str, Any], *, keep: int = 1) -> None:
    """Write tensors and plain values so that `path` holds either the old or the new file, whole, whatever happens.

    keep: how many to keep: those before it go on as NAME-1, NAME-2 ... An old one is dropped last of all, when the new
    one is in its place; NAME-0 is there meanwhile.
    Raises UserError where it cannot be written.
    """
    path = Path(path)
    temporary, before = path.with_suffix(".tmp"), path.with_stem(f"{path.stem}-0")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a training that was killed
        with temporary.open("x+b") as file:
            torch.save(dict(content), file)
            file.flush()
            seal(file)
            file.flush()
            _sync(file.fileno())
        aside = keep > 1 and path.is_file()
        if aside:
            _set_aside(path, before)
        temporary.replace(path)
        if aside:
            for age in range(keep - 1, 0, -1):
                with suppress(OSError):  # there is none of that age yet, or a folder in its place
                    (earlier(path, age - 1) if age > 1 else before).replace(earlier(path, age))
        _sync_folder(path.parent)  # the new names themselves must survive a power cut
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        # torch reports a full disk by a RuntimeError of its own, raised from the error of the file.
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        remedy = "Make room" if getattr(cause, "errno", None) in FULL else "See to it that the folder can be written"
        raise UserError(
            f"Cannot write {path}: {cause}. What was saved before is whole. {remedy}, then go on with "
            "trainer.resume=auto and the same run_dir."
        ) from error


def earlier(path: Path, age: int) -> Path:
    """Where the file goes that was at `path` so many saves ago."""
    return path.with_stem(f"{path.stem}-{age}") if age else path


def _set_aside(path: Path, before: Path) -> None:
    """Give a file a second name, so that there is no moment without it; another one where there are no hard links."""
    before.unlink(missing_ok=True)
    try:
        os.link(path, before)
    except OSError:
        path.replace(before)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Have a file or folder written to the disk, as far as its file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _first_sentence(error: BaseException) -> str:
    """The message of an error of torch.load without its advice, which is not meant for files from elsewhere."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].split('. ')[0]}".removesuffix(": ")
