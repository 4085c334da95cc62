"""Weights into a model: exactly, or as a start whose classes and queries may be others."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from detr.errors import UserError
from detr.models.added import Added
from detr.models.queries import ObjectQueries
from detr.types import Category
from detr.weights.reading import Published, Weights, read_weights

logger = logging.getLogger(__name__)

# Parts whose shape follows the data set or the number of queries: where it differs, they are trained anew.
_OF_CLASSES = ("class_head.", "denoising.labels.")
_REPLACEABLE = (*_OF_CLASSES, "queries.")
_COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` made of each tensor, by name.

    loaded: taken over. adapted: taken over in part, and which part. replaced: left to be trained anew, and why.
    unused: what the file had in excess.
    """

    loaded: list[str]
    adapted: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors"]
        lines += [f"loaded in part: {name} ({part})" for name, part in self.adapted.items()]
        lines += [f"trained anew: {name} ({why})" for name, why in self.replaced.items()]
        lines += [f"left in the file: {name}" for name in self.unused]
        return "; ".join(lines)


def load_weights(model: nn.Module, path: str | Path, categories: Sequence[Category]) -> LoadReport:
    """Start from the weights of any file that `read_weights` knows, whose classes or queries may be others.

    categories: the classes of the new model. Where the file's are others, those of the same name keep their rows, and
    the rest of the class heads starts anew; the same goes for queries of another shape. Attention blocks and other new
    parts may be missing in the file. The report names all these. Raises UserError where anything else differs: the file
    is of another model then.
    """
    own, weights = model.state_dict(), read_weights(path)
    shared = _shared(weights, categories)
    adapted = _adapted(model, weights, categories, shared) if shared else {}
    replaced = _replaced(model, weights, categories)
    replaced = {name: why for name, why in replaced.items() if name not in adapted}
    state = {name: tensor for name, tensor in weights.state.items() if name in own or not name.endswith(_COUNT)}
    unused = [name for name in state if name not in own and not isinstance(weights, Published)]
    loaded = {name: tensor for name, tensor in state.items() if name not in (*adapted, *replaced, *unused)}
    kept = {name: own[name] for name in replaced}
    load_state(model, kept | loaded | adapted, weights)
    part = f"rows of {len(shared)} of {len(categories)} classes, by their names"
    report = LoadReport(loaded=list(loaded), adapted=dict.fromkeys(adapted, part), replaced=replaced, unused=unused)
    logger.info("From %s: %s.", weights, report)
    return report


def _shared(weights: Weights, categories: Sequence[Category]) -> dict[int, int]:
    """Labels of the model's classes that the file has by name, with their labels there; none where all are the same."""
    if weights.categories is None or weights.categories == list(categories):
        return {}
    labels = {category.name: label for label, category in enumerate(weights.categories)}
    return {label: labels[one.name] for label, one in enumerate(categories) if one.name in labels}


def _adapted(
    model: nn.Module, weights: Weights, categories: Sequence[Category], shared: Mapping[int, int]
) -> dict[str, Tensor]:
    """Tensors with a row for each class: the file's rows of shared classes, the model's own ones of all others."""
    own, adapted = model.state_dict(), {}
    before, now = len(weights.categories or ()), len(categories)
    for name in _of_classes(model):
        tensor, found = own[name].clone(), weights.state.get(name)
        further = len(tensor) - now  # one, for no object, in the heads of softmax losses
        if found is None or further not in (0, 1) or found.shape != (before + further, *tensor.shape[1:]):
            continue
        rows = {**shared, now: before} if further else shared
        tensor[list(rows)] = found[list(rows.values())].to(tensor.dtype)
        adapted[name] = tensor
    return adapted


def _replaced(model: nn.Module, weights: Weights, categories: Sequence[Category]) -> dict[str, str]:
    """Why tensors of the model are trained anew, by their names."""
    own, state = model.state_dict(), weights.state
    replaced = {
        name: f"file {list(state[name].shape)}, model {list(tensor.shape)}"
        for name, tensor in own.items()
        if any(part in name for part in _REPLACEABLE) and name in state and state[name].shape != tensor.shape
    }
    if weights.categories is not None and weights.categories != list(categories):
        replaced |= dict.fromkeys(_of_classes(model), "file of other classes")
    # What a file from before it was added lacks: a part of the training alone, attention blocks.
    added = ("denoising.", *(f"{name}." for name, part in model.named_modules() if isinstance(part, Added)))
    return replaced | {name: "not in the file" for name in own if name.startswith(added) and name not in state}


def _of_classes(model: nn.Module) -> list[str]:
    """The tensors of the class heads and of what else knows the classes, by name."""
    agnostic = any(isinstance(part, ObjectQueries) and part.class_agnostic for part in model.modules())
    others = ("proposal_head.",) if agnostic else ()
    names = [name for name in model.state_dict() if any(part in name for part in _OF_CLASSES)]
    return [name for name in names if not name.startswith(others)]


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: Weights | str | Path) -> None:
    """Load exactly the tensors that the model has; raises UserError that names what differs.

    Counts of batches may be missing or be left over: nothing depends on them, and frozen norms have none.
    source: what the state is from, for that message.
    """
    check_state(model, state, source)
    own = model.state_dict()
    counts = {name: tensor for name, tensor in own.items() if name.endswith(_COUNT)}
    model.load_state_dict(counts | {name: tensor for name, tensor in state.items() if name in own})


def check_state(model: nn.Module, state: Mapping[str, Tensor], source: Weights | str | Path) -> None:
    """Raise the UserError of `load_state`, and load nothing; the model may be a sketch without data."""
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in state and not name.endswith(_COUNT)]
    differences += [f"{name} is not known" for name in state if name not in own and not name.endswith(_COUNT)]
    differences += [
        f"{name} is {list(state[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    differences += [
        f"{name} is of {state[name].dtype}, wanted {tensor.dtype}"
        for name, tensor in own.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    ]
    if differences:
        path, kind = (source.path if isinstance(source, Weights) else source), ""
        if isinstance(source, Published):
            kind = f": it holds {source.converted.family.name}, set {source.converted.options}"
        raise UserError(
            f"Checkpoint {path} is not of the model that is configured{kind}. {len(differences)} tensors differ: "
            f"{'; '.join(differences[:4])}{'; ...' if len(differences) > 4 else ''}. Set the model options that it was "
            "trained with (config.yaml in its run folder), or use another checkpoint."
        )
