"""Training computes what it computed when the golden curves were recorded."""

import json
import math
from pathlib import Path

import pytest

from tests.golden.curves import CASES, CURVES, curve_of, difference

# Measured on one machine with the instruction sets that other processors would use (no vector instructions, AVX2,
# AVX-512, oneDNN limited to SSE4.1) and with one and two threads: sums in another order.
TOLERANCE = 2e-3


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_are_as_recorded(case: str, tmp_path: Path) -> None:
    curve = curve_of(case, tmp_path)
    assert all(math.isfinite(value) for values in curve.values() for value in values)
    assert difference(curve, json.loads(CURVES.read_text())[case]) <= TOLERANCE
