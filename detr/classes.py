"""Which classes of two sources are the same: of a checkpoint and of data, whose ids and order may differ."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from detr.types import Category


@dataclass(frozen=True)
class ClassMatch:
    """Pairs of the same class.

    labels: label in `wanted` to label in `known`, each at most once.
    alike: those of `labels` whose names differ in case, spaces, hyphens or underscores.
    ambiguous: labels in `wanted` that are left out, because their names fit several classes, or several fit one.
    """

    labels: dict[int, int]
    alike: list[int]
    ambiguous: list[int]


def match_classes(wanted: Sequence[Category], known: Sequence[Category]) -> ClassMatch:
    """Find each of the wanted classes among the known ones.

    A class is the same where id and name are; then where the name is, which must occur once on either side; then where
    the known one has its id for a name, as classes without names have; and at last where the names differ only in case,
    spaces, hyphens or underscores, and no other name of either side does so too.
    """
    labels: dict[int, int] = {}
    stages: list[tuple[Callable[[Category], Hashable], Callable[[Category], Hashable]]] = [
        (_identity, _identity),
        (_name, _name),
        (lambda category: str(category.id), lambda category: category.name if _nameless(category) else None),
        (_letters, _letters),
    ]
    for of_wanted, of_known in stages:
        mine, theirs = _occurring_once(map(of_wanted, wanted)), _occurring_once(map(of_known, known))
        taken = set(labels.values())
        pairs = {label: theirs[key] for key, label in mine.items() if key in theirs}
        new = {label: other for label, other in pairs.items() if label not in labels and other not in taken}
        labels |= new
        alike = [*new] if of_wanted is _letters else []
    letters = {_letters(category) for category in known}
    ambiguous = [i for i, category in enumerate(wanted) if i not in labels and _letters(category) in letters]
    return ClassMatch(labels=dict(sorted(labels.items())), alike=alike, ambiguous=ambiguous)


def _occurring_once(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    """The keys that occur once, with their places."""
    keys = [*keys]
    count = Counter(keys)
    return {key: place for place, key in enumerate(keys) if count[key] == 1}


def _identity(category: Category) -> Hashable:
    return category.id, category.name


def _name(category: Category) -> Hashable:
    return category.name


def _letters(category: Category) -> Hashable:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", category.name)).casefold()


def _nameless(category: Category) -> bool:
    return category.name == str(category.id)
