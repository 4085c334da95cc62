"""The folder that a command writes to."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from detr import distributed
from detr.config import job, save
from detr.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def run_directory(config: Any) -> Iterator[Path]:
    """The folder of this run; that of a training has the composed configuration saved in it.

    The other commands write theirs with their results, by an OutputFolder: neither replaces what is there already.
    Raises UserError where another training is at work in it.
    """
    running = job()
    if distributed.launched() and not any(option.startswith("run_dir=") for option in running.overrides):
        raise UserError("Several processes need run_dir=PATH on the command line, the same for all of them.")
    if distributed.rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)  # the others report only what goes wrong
        yield running.folder
        return
    trains = running.name == "train"
    with _alone_in(running.folder) if trains else nullcontext():
        logger.info("Everything goes to %s.", running.folder)
        if trains:
            save(config, running.folder / "config.yaml")
        yield running.folder


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two trainings would overwrite each other's checkpoints."""
    # Processes that load data outlive one that was killed by a few seconds, and hold its lock.
    lock = FileLock(folder / ".lock", timeout=15)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another training is at work in {folder}. Give this one a folder of its own with run_dir=PATH, or end the "
            "other one first."
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): see to it that no other training writes there.", folder, error)
    try:
        yield
    finally:
        lock.release()
