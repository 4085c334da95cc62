"""Errors of parts begin with their place in the configuration."""

import copy
import pickle
from pathlib import Path

import pytest

from detr.config import build, build_block, build_model, compose
from detr.errors import UserError

PARTS = """
from detr.errors import UserError

class Plain:
    def __init__(self, *, number: int = 0, inner: object = None) -> None:
        if number == 1:
            raise UserError("number: wanted another one, got 1.")
        if number == 2:
            raise UserError("Plain: wanted something else.")
        if number == 3:
            raise ValueError("three is too much")
        if number == 4:
            raise UserError("Wanted: another one.")
        self.number, self.inner = number, inner() if callable(inner) else inner
"""


@pytest.fixture(autouse=True)
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)


def node(**options: object) -> dict[str, object]:
    return {"_target_": "failing_parts.Plain", **options}


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "{}.number: wanted another one, got 1."),
        (2, "{}: wanted something else."),
        (3, "{}: three is too much. Correct the option."),
        (4, "{}: Wanted: another one."),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_a_part_is_named_by_its_path(number: int, message: str, partial: bool) -> None:
    inner = node(number=number, _partial_=partial)
    for content, path in ((node(number=number), "model"), (node(inner=inner), "model.inner")):
        with pytest.raises(UserError) as found:
            build(content, path="model", allow=("failing_parts",))
        assert str(found.value) == message.format(path)
    with pytest.raises(UserError) as found:
        build({"a": [inner, node()], "b": 7}, path="logger", allow=("failing_parts",))["a"][0]()
    assert str(found.value) == message.format("logger.a[0]")


def test_other_content_stays_as_it_is() -> None:
    content = {"a": [1, node(number=5)], "b": {"c": None}}
    built = build(content, path="x", allow=("failing_parts",))
    assert built["a"][0] == 1 and built["a"][1].number == 5 and built["b"] == {"c": None}
    assert build(None, path="x") is None and content["a"] == [1, node(number=5)]


def test_a_part_to_be_built_later_can_be_copied() -> None:
    part = build(node(number=1, _partial_=True), path="x.y", allow=("failing_parts",))
    for same in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert same(number=6).number == 6
        with pytest.raises(UserError, match=r"^x\.y\.number: wanted"):
            same()


def test_parts_of_a_model_are_named_by_their_path() -> None:
    with pytest.raises(UserError, match=r"^model\.neck: wanted num_levels of at least 1, .*got 0"):
        build_model(compose(["model.backbone.weights=null", "model.neck.num_levels=0"]).model, num_classes=3)
    with pytest.raises(
        UserError, match=r"^model\.attention\.se\.block\.reduction: wanted a value of at least 1, got 0"
    ):
        build_block(compose(["model/attention=se", "model.attention.se.block.reduction=0"]), "se", 16)
