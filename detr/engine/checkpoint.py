"""Checkpoints on disk: atomic saving, safe loading, and weights in the names of the published DETR.

A checkpoint is a dict of tensors and plain values, so that loading runs no code from the file:
`model` (state dict), `config` (the composed configuration), `categories` (id and name of each class, in the order of
the labels) and `training` (optimiser state, position in the run, best result).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr.errors import UserError
from detr.files import read_tensors
from detr.types import Category

logger = logging.getLogger(__name__)

FORMAT = "detr-checkpoint-1"

# Names in the published DETR and in ours, of whole branches and of parts within; both directions.
_BRANCHES = (
    ("backbone.0.body.", "backbone.body."),
    ("backbone.1.", "position."),
    ("input_proj.", "neck.levels.0.0."),
    ("query_embed.", "queries.position."),
    ("class_embed.", "heads.0.class_head."),
    ("bbox_embed.", "heads.0.box_head."),
)
_PARTS = (
    (".multihead_attn.", ".cross_attn."),
    (".in_proj_", ".in_proj."),
    (".linear1.", ".ffn.linear1."),
    (".linear2.", ".ffn.linear2."),
)
# Parts whose shape follows the data set or the number of queries: where it differs, they are trained anew.
_REPLACEABLE = ("class_head.", "queries.position.", "queries.content.", "queries.anchors.")


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the published DETR under our names."""
    return {_renamed(name, _BRANCHES, _PARTS): tensor for name, tensor in state_dict.items()}


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours under the names of the published DETR."""
    branches, parts = ([(ours, published) for published, ours in table] for table in (_BRANCHES, _PARTS))
    return {_renamed(name, branches, parts): tensor for name, tensor in state_dict.items()}


def _renamed(name: str, branches: Sequence[tuple[str, str]], parts: Sequence[tuple[str, str]]) -> str:
    for old, new in branches:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in parts:
        name = name.replace(old, new)
    return name


def save(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either the old or the new one, whole, whatever happens meanwhile."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **checkpoint}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself must survive a power cut
    finally:
        os.close(folder)


def load(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint that `save` wrote; raises UserError for any other file."""
    return checked(read_tensors(path), path)


def checked(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The content of a file if `save` wrote it; raises UserError otherwise."""
    if checkpoint.get("format") != FORMAT:
        kind = "the published DETR's weights" if is_published(checkpoint) else "another program's file"
        raise UserError(
            f"Checkpoint {path} is {kind}, wanted a checkpoint of this framework, which holds its configuration and "
            "class names. To start training from published weights, set weights=PATH; to evaluate or predict with "
            "them, name the model too, as in model=detr."
        )
    for place in (("model",), ("categories",), ("training",), ("config", "data"), ("config", "model")):
        part: Any = checkpoint
        for key in place:
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, dict | list):
            raise UserError(f"Checkpoint {path} lacks {'.'.join(place)}, so it is incomplete. Use an intact copy.")
    return checkpoint


def is_published(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a loaded file holds weights under the names of the published DETR."""
    return "class_embed.weight" in _published_state(checkpoint)


def model_state(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights in a loaded file, ours or published, under our names."""
    state = from_published(_published_state(checkpoint)) if is_published(checkpoint) else checkpoint.get("model")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no 'model' state dict. Use a checkpoint of this framework or of published DETR.")
    return state


def _published_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    state = checkpoint.get("model", checkpoint)
    return state if isinstance(state, Mapping) else {}


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
    """Start from the weights of a checkpoint, ours or published, whose classes or queries may be others.

    categories: the classes of the new model. Where the file's are others, its class head is not used; the same goes
    for queries of another shape. The report names them. Raises UserError where anything else differs: the checkpoint
    is of another model then.
    """
    own = model.state_dict()
    content = read_tensors(path)
    state = model_state(content, path)
    replaced = {
        name: f"file {list(state[name].shape)}, model {list(tensor.shape)}"
        for name, tensor in own.items()
        if any(part in name for part in _REPLACEABLE) and name in state and state[name].shape != tensor.shape
    }
    if content.get("format") == FORMAT and content.get("categories") != [asdict(category) for category in categories]:
        replaced |= {name: "file of other classes" for name in own if "class_head." in name}
    unused = [name for name in state if name not in own]
    loaded = {name: tensor for name, tensor in state.items() if name in own and name not in replaced}
    load_model_state(model, loaded | {name: own[name] for name in replaced}, path)
    report = LoadReport(loaded=list(loaded), replaced=replaced, unused=unused)
    logger.info("From %s: %s.", path, report)
    return report


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load exactly the tensors that the model has; raises UserError that names what differs."""
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in state]
    differences += [f"{name} is not known" for name in state if name not in own]
    differences += [
        f"{name} is {list(state[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if differences:
        raise UserError(
            f"Checkpoint {path} is not of the model that is configured. {len(differences)} tensors differ: "
            f"{'; '.join(differences[:4])}{'; ...' if len(differences) > 4 else ''}. Set the model options that it was "
            "trained with (config.yaml in its run folder), or use another checkpoint."
        )
    model.load_state_dict(state)
