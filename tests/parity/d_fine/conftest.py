"""The fixtures of D-FINE, their weights and the model with these."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from detr.models.detr import DETR
from tests.helpers.d_fine import build
from tests.helpers.published import fixture_or_skip, weights_of


@pytest.fixture(scope="module", params=["base", "holdout"])
def published(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    return fixture_or_skip(shared, f"d_fine/{request.param}.pt")


@pytest.fixture(scope="module")
def state(published: dict[str, Any], shared: Path) -> dict[str, Tensor]:
    return weights_of(shared, "d_fine/base.pt", published)


@pytest.fixture(scope="module")
def model(published: dict[str, Any], state: dict[str, Tensor]) -> DETR:
    return build(published["config"], state)
