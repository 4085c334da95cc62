"""What a file of weights is, decided once: a checkpoint of ours, published weights, or a state dict alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from detr.errors import UserError
from detr.files import read_tensors
from detr.types import Category
from detr.weights import version1
from detr.weights.families import Converted, convert, recognize

FORMAT = "detr-checkpoint-2"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A state dict under our names, and the file that it is from."""

    path: Path
    state: dict[str, Tensor]

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class Published(Weights):
    """Weights of DETR or its family from elsewhere. converted: what they were converted from."""

    converted: Converted

    def __str__(self) -> str:
        return f"{self.path}, {self.converted}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Weights):
    """What training saves: weights with all that it takes to use them.

    config: the composed configuration. categories: the classes, in the order of the labels.
    training: what it takes to go on, as detr.weights.checkpoints describes it; None for a checkpoint of version 1.
    """

    config: dict[str, Any]
    categories: list[Category]
    training: dict[str, Any] | None


def read_weights(path: str | Path) -> Weights:
    """Read any file of weights: a Checkpoint of any version, Published weights, or a state dict of ours alone.

    Raises UserError where it is missing, damaged, incomplete, or none of these.
    """
    path, content = Path(path), read_tensors(path)
    if str(content.get("format")).startswith("detr-checkpoint-"):
        return _checkpoint(content, path)
    state = content.get("model", content)
    if not is_state_dict(state):
        raise UserError(f"{path} holds no 'model' state dict. Use a checkpoint of this framework or of published DETR.")
    if recognize(state) is None:
        return Weights(path=path, state=state)
    converted = convert(state)
    return Published(path=path, state=converted.state, converted=converted)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours; raises UserError for any other file."""
    return as_checkpoint(read_weights(path))


def as_checkpoint(weights: Weights) -> Checkpoint:
    """The weights, if they are those of a checkpoint of ours; raises UserError otherwise."""
    if isinstance(weights, Checkpoint):
        return weights
    kind, remedy = "is another program's file or holds weights alone", ""
    if isinstance(weights, Published):
        found = weights.converted
        kind = f"is of {found.family.name}, from {found.source}"
        remedy = f"; to evaluate or predict with them, name the model too, as in {found.options}"
    raise UserError(
        f"Checkpoint {weights.path} {kind}, wanted a checkpoint of this framework, which holds its configuration and "
        f"class names. To start training from other weights, set weights=PATH{remedy}."
    )


def is_state_dict(state: Any) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def _checkpoint(content: dict[str, Any], path: Path) -> Checkpoint:
    if content["format"] not in (FORMAT, version1.FORMAT):
        raise UserError(
            f"Checkpoint {path} is of format {content['format']}, wanted {FORMAT} or {version1.FORMAT}. Use it with "
            "the version of this framework that wrote it."
        )
    for place in (("model",), ("categories",), ("training",), ("config", "data"), ("config", "model")):
        part: Any = content
        for key in place:
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, dict | list):
            raise UserError(f"Checkpoint {path} lacks {'.'.join(place)}, so it is incomplete. Use an intact copy.")
    try:
        if content["format"] == version1.FORMAT:
            content = version1.upgraded(content, path)
        categories = [Category(id=row["id"], name=row["name"]) for row in content["categories"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"Checkpoint {path} is incomplete: {error!r}. Use an intact copy.") from None
    if not is_state_dict(content["model"]):
        raise UserError(f"Checkpoint {path} holds no 'model' state dict, so it is incomplete. Use an intact copy.")
    return Checkpoint(
        path=path,
        state=content["model"],
        config=content["config"],
        categories=categories,
        training=content["training"],
    )
