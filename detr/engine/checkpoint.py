"""Checkpoints on disk: atomic saving, safe loading, and weights from elsewhere.

A checkpoint is a dict of tensors and plain values, so that loading runs no code from the file:
`model` (state dict), `config` (the composed configuration), `categories` (id and name of each class, in the order of
the labels) and `training` (optimiser state, position in the run, best result).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from detr.engine.convert import DETR, Converted, Renaming, convert, recognise
from detr.errors import UserError
from detr.files import read_tensors
from detr.models.attention import Blocks
from detr.types import Category

logger = logging.getLogger(__name__)

FORMAT = "detr-checkpoint-1"

# Parts whose shape follows the data set or the number of queries: where it differs, they are trained anew.
_REPLACEABLE = ("class_head.", "denoising.labels.", "queries.position.weight", "queries.content.", "queries.anchors.")
_OF_CLASSES = ("class_head.", "denoising.labels.")


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the published DETR, or of another model that `detr.engine.convert` knows, under our names."""
    return convert(state_dict, recognise(state_dict) or DETR).state


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of our DETR under the names of the published one."""
    renamed = Renaming([(ours, theirs) for theirs, ours in DETR.authors])
    return {renamed(name): tensor for name, tensor in state_dict.items()}


def save(path: str | Path, checkpoint: Mapping[str, Any], *, keep: int = 1) -> None:
    """Write a checkpoint so that `path` holds either the old or the new one, whole, whatever happens meanwhile.

    keep: how many to keep: those before it go on as NAME-1, NAME-2 ...
    Raises UserError where it cannot be written.
    """
    write(path, {"format": FORMAT, **checkpoint}, keep=keep)


def write(path: str | Path, content: Mapping[str, Any], *, keep: int = 1) -> None:
    """Write tensors and plain values as `save` does."""
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
        # torch tells of a full disk by a RuntimeError of its own, raised from what the file said.
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        raise UserError(
            f"Cannot write {path}: {cause}. What was saved before is whole. Make room or restore the folder, then go "
            "on with trainer.resume=auto and the same run_dir."
        ) from error


def earlier(path: Path, age: int) -> Path:
    """Where the checkpoint goes that was at `path` so many saves ago."""
    return path.with_stem(f"{path.stem}-{age}") if age else path


def newest(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The newest whole one of the checkpoints that `save` keeps for `path`; None where there is none at all.

    A damaged one is passed over with a warning. Raises UserError where all are damaged.
    """
    ages = [int(found.stem.rpartition("-")[2]) for found in path.parent.glob(f"{path.stem}-*.pt")]
    candidates = [found for age in [0, *sorted(ages)] if (found := earlier(path, age)).exists()]
    for candidate in candidates:
        try:
            return candidate, load(candidate)
        except UserError as error:
            if candidate == candidates[-1]:
                raise
            logger.warning("%s The one before it is taken.", error)
    return path, None


def load(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint that `save` wrote; raises UserError for any other file."""
    return checked(read_tensors(path), path)


def checked(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The content of a file if `save` wrote it; raises UserError otherwise."""
    if checkpoint.get("format") != FORMAT:
        foreign = converted(checkpoint)
        kind = f"of {foreign.family.name}, from {foreign.source}" if foreign else "another program's file"
        raise UserError(
            f"Checkpoint {path} is {kind}, wanted a checkpoint of this framework, which holds its configuration and "
            "class names. To start training from other weights, set weights=PATH; to evaluate or predict with them, "
            f"name the model too, as in {foreign.options if foreign else DETR.options}."
        )
    for place in (("model",), ("categories",), ("training",), ("config", "data"), ("config", "model")):
        part: Any = checkpoint
        for key in place:
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, dict | list):
            raise UserError(f"Checkpoint {path} lacks {'.'.join(place)}, so it is incomplete. Use an intact copy.")
    return checkpoint


def converted(checkpoint: Mapping[str, Any]) -> Converted | None:
    """The weights in a loaded file from elsewhere, under our names; None for a file of ours and for unknown ones."""
    state = checkpoint.get("model", checkpoint)
    if checkpoint.get("format") == FORMAT or not _is_state_dict(state) or recognise(state) is None:
        return None
    return convert(state)


def model_state(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights in a loaded checkpoint of ours."""
    state = checkpoint.get("model")
    if not _is_state_dict(state):
        raise UserError(f"{path} holds no 'model' state dict. Use a checkpoint of this framework or of published DETR.")
    return state


def _is_state_dict(state: Any) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


@dataclass(frozen=True)
class LoadReport:
    """Which tensors `load_weights` took over, which it left to be trained anew, and which the file had in excess."""

    loaded: list[str]
    replaced: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors"]
        lines += [f"trained anew: {name} ({why})" for name, why in self.replaced.items()]
        lines += [f"left in the file: {name}" for name in self.unused]
        return "; ".join(lines)


def load_weights(model: nn.Module, path: str | Path, categories: Sequence[Category]) -> LoadReport:
    """Start from the weights of a checkpoint, ours or from elsewhere, whose classes or queries may be others.

    categories: the classes of the new model. Where the file's are others, its class head is not used; the same goes
    for queries of another shape. Attention blocks may be missing in the file. The report names all these. Raises
    UserError where anything else differs: the checkpoint is of another model then.
    """
    own = model.state_dict()
    content = read_tensors(path)
    foreign = converted(content)
    state = foreign.state if foreign else model_state(content, path)
    replaced = {
        name: f"file {list(state[name].shape)}, model {list(tensor.shape)}"
        for name, tensor in own.items()
        if any(part in name for part in _REPLACEABLE) and name in state and state[name].shape != tensor.shape
    }
    if content.get("format") == FORMAT and content.get("categories") != [asdict(category) for category in categories]:
        replaced |= {name: "file of other classes" for name in own if any(part in name for part in _OF_CLASSES)}
    # What a file from before it was added lacks: a part of the training alone, attention blocks.
    added = ("denoising.", *(f"{name}." for name, part in model.named_modules() if isinstance(part, Blocks)))
    replaced |= {name: "not in the file" for name in own if name.startswith(added) and name not in state}
    unused = [name for name in state if name not in own and not foreign]
    loaded = {name: tensor for name, tensor in state.items() if name not in (*replaced, *unused)}
    load_model_state(model, loaded | {name: own[name] for name in replaced}, path, foreign)
    report = LoadReport(loaded=list(loaded), replaced=replaced, unused=unused)
    logger.info("From %s%s: %s.", path, f", {foreign}" if foreign else "", report)
    return report


def load_model_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, foreign: Converted | None = None
) -> None:
    """Load exactly the tensors that the model has; raises UserError that names what differs.

    foreign: what the weights were converted from, to name the model that they are of.
    """
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in state]
    differences += [f"{name} is not known" for name in state if name not in own]
    differences += [
        f"{name} is {list(state[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if differences:
        kind = f": it holds {foreign.family.name}, set {foreign.options}" if foreign else ""
        raise UserError(
            f"Checkpoint {path} is not of the model that is configured{kind}. {len(differences)} tensors differ: "
            f"{'; '.join(differences[:4])}{'; ...' if len(differences) > 4 else ''}. Set the model options that it was "
            "trained with (config.yaml in its run folder), or use another checkpoint."
        )
    model.load_state_dict(state)
