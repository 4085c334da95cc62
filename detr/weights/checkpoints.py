"""Checkpoints of a training on disk: saved so that one is whole at any moment, and the newest whole one found.

A checkpoint is a dict of tensors and plain values, so that loading runs no code from the file:
`format`, `version` (of this project, which wrote it), `model` (state dict), `config` (the composed configuration),
`categories` (id and name of each class, and whether it is of things, in the order of the labels), `thresholds` (of the
last evaluation, as detr.evaluation.Thresholds gives them; None where there are none) and `training`, which holds what
it takes to go on: `step` (steps done), `skipped` (how many of these changed nothing), `images` (in one step, of all
processes), and the states of `optimizer` (its `class`, and `state` by the names of parameters), `scaler` (of the loss)
and `callbacks` (by name). With a moving average, `model` is the average, and `training` has a `model` of its own: the
raw weights, which go on training.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detr.errors import UserError
from detr.files import write_tensors
from detr.version import __version__
from detr.weights.reading import FORMAT, Checkpoint, read_checkpoint

logger = logging.getLogger(__name__)


def save(path: str | Path, checkpoint: Mapping[str, Any], *, keep: int = 1) -> None:
    """Write a checkpoint so that `path` holds either the old or the new one, whole, whatever happens meanwhile.

    keep: how many to keep: those before it go on as NAME-1, NAME-2 ...
    Raises UserError where it cannot be written.
    """
    write_tensors(path, {"format": FORMAT, "version": __version__, **checkpoint}, keep=keep)


def newest(path: Path) -> Checkpoint | None:
    """The newest whole one of the checkpoints that `save` keeps for `path`; None where there is none at all.

    A damaged one is passed over with a warning. Raises UserError where all are damaged.
    """
    name = re.compile(rf"{re.escape(path.stem)}-(0|[1-9][0-9]*)\.pt")  # last-backup.pt is the user's own
    found = [(int(match[1]), file) for file in path.parent.glob("*.pt") if (match := name.fullmatch(file.name))]
    candidates = [file for file in [path, *(file for _, file in sorted(found))] if file.is_file()]
    for candidate in candidates:
        try:
            return read_checkpoint(candidate)
        except UserError as error:
            if candidate == candidates[-1]:
                raise
            logger.warning("%s The one before it is taken.", error)
    return None
