"""Files of weights from elsewhere: published checkpoints by name, and repositories of the Hugging Face hub."""

import hashlib
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock, Timeout

from detr.errors import UserError
from detr.files import FULL, read_tensors
from detr.published import PUBLISHED, PublishedCheckpoint, file_name

logger = logging.getLogger(__name__)

HUB = "hf:"
_SILENCE = 60.0  # seconds without a byte, after which a server counts as gone
# What repositories of transformers call their weights, the newer name first.
_FILES_OF_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")


def weights_file(reference: str | Path) -> Path:
    """The file that is meant by a path, the name of a published checkpoint, or hf:OWNER/REPOSITORY[/FILE].

    What is not on this machine yet is fetched: published checkpoints into torch's cache
    (`torch.hub.get_dir()`/checkpoints), where their size and checksum are compared with the published ones at each use,
    and repositories into the cache of huggingface_hub. A file in a cache is never replaced.
    Raises UserError where it cannot be had, or is not what was published. A path may lead nowhere.
    """
    text = str(reference)
    if text in PUBLISHED:
        return _published(text)
    if text.startswith(HUB):
        return _from_hub(text)
    path = Path(reference)
    if not path.exists() and (name := _meant(path)):
        raise UserError(f"Checkpoint {path} does not exist. The name {name}, without a path, fetches a published one.")
    return path


def _meant(path: Path) -> str | None:
    """The published checkpoint whose file, or nearly whose name, is at the end of a path that leads nowhere."""
    of_file = next((name for name in PUBLISHED if file_name(name) == path.name), None)
    misspelt = get_close_matches(path.name, PUBLISHED, 1, cutoff=0.8) if str(path) == path.name else []
    return of_file or next(iter(misspelt), None)


def _published(name: str) -> Path:
    published = PUBLISHED[name]
    file = Path(torch.hub.get_dir()) / "checkpoints" / file_name(name)
    if not file.exists():
        _make_folder(file, published)
        with _alone(file):
            if not file.exists():
                _download(published, file)
                return file
    if difference := _difference(file, published):
        raise UserError(
            f"{file} is not {name} as published: {difference}. Remove or rename it, and the next use fetches it from "
            f"{published.url}; or give the path of another file."
        )
    return file


def _make_folder(file: Path, published: PublishedCheckpoint) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(file, published, error) from error


def _unwritable(file: Path, published: PublishedCheckpoint, error: OSError) -> UserError:
    return UserError(
        f"{file.parent} cannot be written ({error.strerror}), where {published.url} would be kept. Set TORCH_HOME to a "
        "folder that can be, or give the path of a file that you fetched yourself."
    )


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process fetches a file; the others wait for it."""
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("Waiting for another process, which fetches %s.", file)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.debug("%s cannot be locked (%s): several processes may fetch it, each of them whole.", file, error)
    try:
        yield
    finally:
        lock.release()


def _download(published: PublishedCheckpoint, file: Path) -> None:
    """Fetch into a folder beside, and give the file its name when it is known to be whole."""
    size = "" if published.size is None else f", {published.size / 1e6:.0f} MB,"
    logger.info("Fetching %s%s to %s.", published.url, size, file)
    try:
        folder = TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent)
    except OSError as error:
        raise _unwritable(file, published, error) from error
    with folder as name:
        part = Path(name) / file.name
        try:
            with _no_longer_silent_than(_SILENCE):
                torch.hub.download_url_to_file(published.url, str(part), progress=sys.stderr.isatty())
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            raise _failed(published, file, str(error)) from error
        if difference := _difference(part, published) or _flaw(part, published):
            raise _failed(published, file, f"what came is not what was published: {difference}")
        part.rename(file)


def _failed(published: PublishedCheckpoint, file: Path, why: str) -> UserError:
    return UserError(
        f"{published.url} could not be fetched: {why or 'the connection ended'}. Start the same command again; or "
        f"fetch it elsewhere, and put it to {file}, or give its path instead of the name."
    )


@contextmanager
def _no_longer_silent_than(seconds: float) -> Iterator[None]:
    """torch.hub gives its connections no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _difference(file: Path, published: PublishedCheckpoint) -> str | None:
    """In what a file differs from the published one; None where nothing is known to differ."""
    size = file.stat().st_size
    if published.size is not None and size != published.size:
        return f"{size} bytes, wanted {published.size}"
    if published.sha256 is None:
        return None
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    found = digest.hexdigest()
    return None if found.startswith(published.sha256) else f"sha256 {found}, wanted {published.sha256}"


def _flaw(file: Path, published: PublishedCheckpoint) -> str | None:
    """What is wrong with a new file of which no checksum is known."""
    if published.sha256 is None:
        try:
            read_tensors(file)
        except UserError:
            return f"{file.stat().st_size} bytes, which are cut short, damaged or no weights"
    return None


def _from_hub(reference: str) -> Path:
    """A file of a repository on the Hugging Face hub. Beside it lies config.json, if there is one, with class names."""
    owner, _, rest = reference.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise UserError(f"{reference}: wanted {HUB}OWNER/REPOSITORY or {HUB}OWNER/REPOSITORY/FILE.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"{reference} needs the package huggingface_hub. Install it with pip install 'detr-framework[huggingface]'."
        ) from None

    def fetched(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(f"{owner}/{repository}", name))
        except LocalEntryNotFoundError:  # there is no connection, so that nobody knows
            raise
        except EntryNotFoundError:
            return None

    try:
        found = next(filter(None, map(fetched, [file] if file else _FILES_OF_TRANSFORMERS)), None)
        if found is not None:
            fetched("config.json")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{reference} could not be fetched from https://huggingface.co/{owner}/{repository}: {why} Check the name "
            "and the connection, or fetch the file elsewhere and give its path."
        ) from error
    if found is None:
        raise UserError(
            f"{reference}: https://huggingface.co/{owner}/{repository} has no file "
            f"{file or ' or '.join(_FILES_OF_TRANSFORMERS)}. Name one of its files, as in "
            f"{HUB}{owner}/{repository}/FILE."
        )
    return found
