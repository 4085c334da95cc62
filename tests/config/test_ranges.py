"""Every option with a range is refused outside of it, whichever configuration it is in."""

import dataclasses
import re
from collections.abc import Iterator

import pytest

from detr.config import compose
from detr.config.schema import EvaluateConfig, ExportConfig, PredictConfig, TrainConfig
from detr.errors import UserError

# For composing what has no value of its own.
NEEDED = {
    "train": [],
    "evaluate": ["checkpoint=x"],
    "predict": ["checkpoint=x", "source=x"],
    "export": ["checkpoint=x"],
}
# Far outside of any range, as a number and as a name.
FAR = ("-1000000", "nothing_like_it")


def limited(kind: type, path: str = "") -> Iterator[str]:
    """The options below a schema that have a range."""
    for one in dataclasses.fields(kind):
        place = f"{path}.{one.name}".lstrip(".")
        if dataclasses.is_dataclass(one.type):
            yield from limited(one.type, place)
        elif one.metadata:
            yield place


SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig, "predict": PredictConfig, "export": ExportConfig}
LIMITED = [(name, option) for name, schema in SCHEMAS.items() for option in limited(schema)]


def test_there_are_as_many_as_there_should_be() -> None:
    assert len([option for name, option in LIMITED if name == "train"]) == 40
    assert ("evaluate", "evaluation.max_dets") in LIMITED and ("predict", "batch_size") in LIMITED


@pytest.mark.parametrize(("name", "option"), LIMITED)
def test_refused_outside_of_its_range(name: str, option: str) -> None:
    names = option.endswith(("precision", "non_finite", "unreadable", "backend", "check", "formats", "format"))
    far = FAR[names]
    given = f"[{far}]" if option.endswith(("_sizes", "formats")) else far
    with pytest.raises(UserError, match=rf"^{option}: wanted .+, got \[?'?{re.escape(far)}"):
        compose([*NEEDED[name], f"{option}={given}"], name)
