"""Ranges of options."""

import math
import pickle
from dataclasses import dataclass, field

import pytest

from detr.errors import UserError
from detr.ranges import at_least, check_ranges, one_of


@dataclass
class Inner:
    count: int = at_least(2, default=3)
    share: float = at_least(0, most=1, default=0.5)


@dataclass
class Outer:
    decay: float = at_least(0, below=1, default=0.0)
    limit: int | None = at_least(1, default=None)
    kind: str = one_of("round", "square", default="round", former={"disk": "round"})
    inner: Inner = field(default_factory=Inner)
    free: int = -7


def test_defaults_and_limits_themselves_fit() -> None:
    check_ranges(Outer())
    check_ranges(Outer(decay=0.999, limit=1, kind="square", inner=Inner(count=2, share=1.0)))
    assert pickle.loads(pickle.dumps(Outer())) == Outer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Outer(decay=1.0), "decay: wanted at least 0 and below 1, got 1.0."),
        (Outer(decay=math.nan), "decay: wanted at least 0 and below 1, got nan."),
        (Outer(limit=0), "limit: wanted at least 1, got 0."),
        (Outer(kind="oval"), "kind: wanted round or square, got 'oval'."),
        (Outer(kind="disk"), "kind: wanted round or square, got 'disk'. 'disk' is replaced: write 'round'."),
        (Outer(inner=Inner(count=1)), "inner.count: wanted at least 2, got 1."),
        (Outer(inner=Inner(share=1.5)), "inner.share: wanted at least 0 and at most 1, got 1.5."),
    ],
)
def test_what_is_out_of_range_is_named(options: Outer, message: str) -> None:
    with pytest.raises(UserError) as found:
        check_ranges(options)
    assert str(found.value) == message
    with pytest.raises(UserError) as found:
        check_ranges(options, "part")
    assert str(found.value) == f"part.{message}"
