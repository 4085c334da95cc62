"""Files from anywhere: read without running code from them, and written whole or not at all."""

import os
import pickle
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from detr.errors import UserError


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Load any file of tensors and plain values on the CPU; raises UserError for everything else.

    Reads PyTorch's format, and that of safetensors by the ending .safetensors.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"Checkpoint {path} is a folder. Give the file, such as {path / 'checkpoints' / 'best.pt'}.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"Checkpoint {path} does not exist. Give a .pt, .pth or .safetensors file.") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Checkpoint {path} is refused: it is damaged, or holds objects other than tensors and plain values, which "
            f"could run code ({_first_sentence(error)}). Use a checkpoint that this framework or published DETR wrote."
        ) from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        AssertionError,
        struct.error,
        BadZipFile,
        SafetensorError,
    ) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it is the file that cannot be opened, not what is in it
        raise UserError(
            f"Checkpoint {path} is cut short or damaged ({_first_sentence(error)}). Use an intact copy, "
            "such as last.pt instead of best.pt."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"Checkpoint {path} holds a {type(content).__name__}, wanted a dict with a 'model' state dict.")
    return content


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

    keep: how many to keep: those before it go on as NAME-1, NAME-2 ...
    Raises UserError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            if (newer := earlier(path, age - 1)).exists():
                with suppress(FileNotFoundError):
                    earlier(path, age).unlink()
                os.link(newer, earlier(path, age))  # so that there is no moment without a whole one
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself must survive a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        # torch reports a full disk by a RuntimeError of its own, raised from the error of the file.
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        raise UserError(
            f"Cannot write {path}: {cause}. What was saved before is whole. Make room or restore the folder, then go "
            "on with trainer.resume=auto and the same run_dir."
        ) from error


def earlier(path: Path, age: int) -> Path:
    """Where the file goes that was at `path` so many saves ago."""
    return path.with_stem(f"{path.stem}-{age}") if age else path


def _first_sentence(error: BaseException) -> str:
    """The message of an error of torch.load without its advice, which is not meant for files from elsewhere."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].split('. ')[0]}".removesuffix(": ")
