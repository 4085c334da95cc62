"""The fixtures of RT-DETR and RT-DETRv2, their weights and the model with these."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from detr.models.detr import DETR
from tests.helpers.published import fixture_or_skip
from tests.helpers.rt_detr import build, state_of

FILES = ("base", "base_v2", "holdout", "holdout_v2")


@pytest.fixture(scope="module", params=FILES)
def published(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    return fixture_or_skip(shared, f"rt_detr/{request.param}.pt")


@pytest.fixture(scope="module")
def state(published: dict[str, Any], shared: Path) -> dict[str, Tensor]:
    return state_of(shared, published)


@pytest.fixture(scope="module")
def model(published: dict[str, Any], state: dict[str, Tensor]) -> DETR:
    return build(published["config"], state)
