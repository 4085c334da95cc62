"""A model's classes under the ids of the data that it is evaluated on."""

import logging
from collections.abc import Sequence
from pathlib import Path

from detr.classes import match_classes
from detr.errors import UserError
from detr.text import printable
from detr.types import Category

logger = logging.getLogger(__name__)
_SHOWN = 5


def categories_of_data(
    model: Sequence[Category], data: Sequence[Category], source: str | Path
) -> list[Category | None]:
    """The category of the data that each of a model's classes is, by `match_classes`; None where it is none of them.

    source: of the data, for messages. A warning names the data's categories that the model does not know, which count
    as missed; classes of nearly the same name, and those that the data do not have, are reported too. Raises UserError
    where no class is the same.
    """
    match = match_classes(data, model)
    found: list[Category | None] = [None] * len(model)
    for label, of_model in match.labels.items():
        found[of_model] = data[label]
    if not match.labels:
        raise UserError(
            f"{source} has no category that the model knows: it has {_some(data)}, and the model was trained on "
            f"{_some(model)}. Use annotations with classes of the same names, or another checkpoint."
        )
    if renumbered := sum(data[label].id != model[of_model].id for label, of_model in match.labels.items()):
        logger.info("%s has %d of the model's classes under other ids, which detections get.", source, renumbered)
    if match.alike:
        pairs = [(data[label].name, model[match.labels[label]].name) for label in match.alike]
        logger.info(
            "Taken for the same classes, of %s and of the model: %s.",
            source,
            printable(", ".join(f"{one} and {other}" for one, other in pairs)),
        )
    if left_out := [category for category, its in zip(model, found, strict=True) if its is None]:
        text = "%s does not have %d of the model's %d classes, whose detections are left out: %s."
        logger.info(text, source, len(left_out), len(model), _some(left_out))
    if unknown := [category for label, category in enumerate(data) if label not in match.labels]:
        why = f" The names of {len(match.ambiguous)} of them fit several classes." if match.ambiguous else ""
        text = "%s has %d of %d categories that the model does not know; their objects count as missed: %s.%s"
        logger.warning(text, source, len(unknown), len(data), _some(unknown), why)
    return found


def _some(categories: Sequence[Category]) -> str:
    names = [f"{category.id} '{category.name}'" for category in categories[:_SHOWN]]
    return printable(", ".join(names) + (", ..." if len(categories) > _SHOWN else ""))
