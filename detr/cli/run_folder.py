"""The folder that a command writes to."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from detr import distributed
from detr.cli.agreement import check_processes
from detr.config import in_sweep, job, save, written_by_us
from detr.errors import UserError
from detr.reporting.output import RECORD

logger = logging.getLogger(__name__)
# What a training writes, beside its log and checkpoints.
_RESULTS = (
    "config.yaml",
    "weights.txt",
    "tensorboard",
    "evaluation",
    "predictions",
    "failures",
    "profile",
    "training_batch.jpg",
)


@contextmanager
def run_directory(config: Any) -> Iterator[Path]:
    """The folder of this run; that of a training has the composed configuration saved in it.

    The other commands write theirs with their results, by an OutputFolder: neither replaces what is there already.
    Raises UserError where another training is at work in it, its results would be overwritten, or the processes of the
    run differ.
    """
    running = job()
    if distributed.launched() and not running.sets("run_dir"):
        raise UserError("Several processes need run_dir=PATH on the command line, the same for all of them.")
    check_processes(config)
    if distributed.rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)  # the others report only what goes wrong
        yield running.folder
        return
    trains = running.name == "train"
    with _alone_in(running.folder) if trains else nullcontext():
        if trains:
            _check_unused(running.folder, resumes=config.trainer.resume is not None)
            logger.info("Everything goes to %s.", running.folder)
            save(config, running.folder / "config.yaml")
        yield running.folder


@contextmanager
def removed_unless_used() -> Iterator[None]:
    """A command that fails before it has results leaves no folder behind."""
    running = job()
    folder, log = running.folder, f"{running.name}.log"
    before = _names(folder)
    if log in before and (folder / log).stat().st_size == 0:  # Hydra has just made it
        before.remove(log)
    try:
        yield
    except BaseException:
        begun = {log, "config.yaml", "weights.txt", f"{running.name}.yaml", ".lock", RECORD}
        made = _names(folder) - before
        if made <= begun and not in_sweep() and not distributed.launched():
            with suppress(OSError):
                for name in made:
                    (folder / name).unlink()
                if not before and not running.sets("run_dir"):
                    folder.rmdir()
        raise


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _check_unused(folder: Path, *, resumes: bool) -> None:
    """Refuse what another training, or someone else, has put there."""
    # An empty file is of a training that ended at its start, such as by a tracker that it could not log in to.
    trained = [name for name in ("checkpoints", "metrics.jsonl") if _holds_something(folder / name)]
    if trained and not resumes:
        raise UserError(
            f"{folder} holds a training already ({' and '.join(trained)}), which this one would overwrite. Go on with "
            "it: trainer.resume=auto. Or choose another folder: run_dir=PATH."
        )
    foreign = [name for name in _RESULTS if os.path.lexists(folder / name)]
    if foreign and not trained and not written_by_us(folder / "config.yaml"):
        raise UserError(
            f"{folder} holds {' and '.join(foreign)} of something else than a training, which this one would "
            "overwrite. Choose another folder: run_dir=PATH."
        )


def _holds_something(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_file() and path.stat().st_size == 0)


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
