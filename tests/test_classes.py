"""The same classes of two sources."""

import pytest

from detr.classes import match_classes
from detr.types import Category


def named(*names: str, start: int = 1) -> list[Category]:
    return [Category(number, name) for number, name in enumerate(names, start)]


@pytest.mark.parametrize(
    ("wanted", "known", "pairs", "alike", "ambiguous"),
    [
        (named("b", "a"), named("a", "c", "b", start=50), {0: 2, 1: 0}, [], []),
        (named("Traffic Light", "sports_ball"), named("sports ball", "traffic-light"), {0: 1, 1: 0}, [0, 1], []),
        (named("cat"), named("Cat", "cat"), {0: 1}, [], []),
        (named("CAT"), named("Cat", "cat"), {}, [], [0]),
        (named("Cat", "CAT"), named("cat"), {}, [], [0, 1]),
        (named("cat", "CAT"), named("cat"), {0: 0}, [], [1]),
        (named("N/A", "N/A"), named("N/A", "N/A"), {0: 0, 1: 1}, [], []),
        (named("N/A", "N/A", start=5), named("N/A", "N/A"), {}, [], [0, 1]),
        (named("cat", start=2), named("cat", "cat"), {0: 1}, [], []),
        (named("cat", "dog"), named("0", "1", "2", start=0), {0: 1, 1: 2}, [], []),
        (named("1", "0"), named("0", "1", start=0), {0: 1, 1: 0}, [], []),
        (named("straße"), named("STRASSE"), {0: 0}, [0], []),
        ([], named("a"), {}, [], []),
        (named("a"), [], {}, [], []),
    ],
)
def test_names_decide(
    wanted: list[Category], known: list[Category], pairs: dict[int, int], alike: list[int], ambiguous: list[int]
) -> None:
    match = match_classes(wanted, known)
    assert (match.labels, match.alike, match.ambiguous) == (pairs, alike, ambiguous)
