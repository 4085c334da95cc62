"""Weights into a model: exactly, or as a start whose classes, queries and sizes may be others."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from detr.classes import ClassMatch, match_classes
from detr.errors import UserError
from detr.models.added import Added
from detr.models.rows import Rows, rows_of
from detr.text import printable
from detr.types import Category
from detr.weights.mapping import Correspondence, map_rows
from detr.weights.reading import Published, Weights, read_weights
from detr.weights.report import LoadReport

logger = logging.getLogger(__name__)

_COUNT = "num_batches_tracked"
_TRAINING_ONLY = "denoising."  # the part that either side may lack
_SHOWN = 10  # classes in a line


def load_weights(model: nn.Module, path: str | Path, categories: Sequence[Category]) -> LoadReport:
    """Start from the weights of any file that `read_weights` knows, whose classes, queries or sizes may be others.

    The model's `Rowed` parts say what rows of their tensors stand for. Those of classes are found by `match_classes`,
    those of queries by their number in their group, those of cells by their place. What the file lacks stays as in a
    new model. Where the file does not name its classes, as many classes are taken for the same. Attention blocks and
    other new parts may be missing in the file. The report says all this.

    categories: the classes of the model. Raises UserError where anything else differs: the file is of another model.
    """
    own, weights = model.state_dict(), read_weights(path)
    known = weights.categories
    match = None if known is None else match_classes(categories, known)
    file = Correspondence(match=match, num_classes=len(known or ()), num_queries=weights.num_queries)
    state = {name: tensor for name, tensor in weights.state.items() if name in own or not name.endswith(_COUNT)}
    skipped = _in_excess(own, state, weights)
    fresh = dict.fromkeys(_lacking(model, state), "not in the file")
    mapped: dict[str, str] = {}
    start = {name: tensor for name, tensor in state.items() if name not in skipped}
    start |= {name: own[name] for name in fresh}
    for name, rows in rows_of(model).items():
        mine, found = own[name], start.get(name)
        if name in fresh or found is None or found.shape[1:] != mine.shape[1:]:
            continue  # what is missing or of another width is refused with the rest
        pairs = file.pairs(rows, len(mine), len(found))
        if len(mine) == len(found) == len(pairs) and all(row == other for row, other in pairs.items()):
            continue
        start[name] = map_rows(mine, found, pairs)
        (mapped if pairs else fresh)[name] = _told(rows, pairs, len(mine), len(found))
    load_state(model, start, weights)
    report = LoadReport(
        source=str(weights),
        loaded=[name for name in start if name not in mapped and name not in fresh],
        mapped=mapped,
        fresh=fresh,
        skipped=skipped,
        classes=_classes(match, categories, known),
    )
    logger.info("%s", report)
    return report


def _in_excess(own: Mapping[str, Tensor], state: Mapping[str, Tensor], weights: Weights) -> dict[str, str]:
    """Why tensors of the file are not used, by their names; those of a published one have nearly all a place."""
    names = [name for name in state if name not in own]
    dropped: Mapping[str, str] = {}
    if isinstance(weights, Published):
        names, dropped = [name for name in names if name.startswith(_TRAINING_ONLY)], weights.converted.dropped
    return {**dropped, **dict.fromkeys(names, "no place in the model")}


def _lacking(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What a file may lack because it is from before that was added: a part of the training alone, attention blocks."""
    added = (_TRAINING_ONLY, *(f"{name}." for name, part in model.named_modules() if isinstance(part, Added)))
    return [name for name in model.state_dict() if name.startswith(added) and name not in state]


def _told(rows: Rows, pairs: Mapping[int, int], own: int, found: int) -> str:
    if not pairs:
        return f"no {rows.of} known from the file, which has {found} rows, wanted {own}"
    of_model = own - rows.further
    return f"rows of {sum(row < of_model for row in pairs)} of {of_model} {rows.of}; {found} rows in the file"


def _classes(match: ClassMatch | None, categories: Sequence[Category], known: Sequence[Category] | None) -> list[str]:
    """Which classes go on from those of the file, and which start anew."""
    if match is None or known is None:
        return ["classes: not named in the file"]
    names, others = ([printable(category.name) for category in side] for side in (categories, known))
    anew = [name for label, name in enumerate(names) if label not in match.labels]
    unused = [name for label, name in enumerate(others) if label not in match.labels.values()]
    lines = [f"classes: {len(match.labels)} of {len(names)} from the file: {_some([names[i] for i in match.labels])}"]
    alike = [f"{names[label]} from {others[match.labels[label]]}" for label in match.alike]
    for text, found in (
        ("classes of nearly the same name", alike),
        ("classes that start anew", anew),
        ("classes whose names fit several", [names[label] for label in match.ambiguous]),
        ("classes of the file alone", unused),
    ):
        lines += [f"{text}: {len(found)}: {_some(found)}"] if found else []
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"


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
