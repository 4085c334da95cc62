"""Colors of classes."""

import numpy as np
import pytest

from detr.reporting.draw import class_color


@pytest.mark.parametrize("step", [1, 2])
def test_classes_beside_one_another_have_colors_far_apart(step: int) -> None:
    colors = np.array([class_color(label) for label in range(91)])
    assert colors.min() >= 0 and colors.max() == 255 and len(np.unique(colors, axis=0)) == 91
    assert (np.abs(colors[step:] - colors[:-step]).max(axis=1) > 128).all()
