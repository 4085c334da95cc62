"""D-FINE in training against numbers from the published implementation."""

from typing import Any

import pytest

from detr.models.detr import DETR
from tests.helpers.d_fine import TRAININGS, check_training


@pytest.mark.parametrize("case", TRAININGS)
def test_training(published: dict[str, Any], model: DETR, case: str) -> None:
    check_training(model, "d_fine_s", published["images"], published[case])
