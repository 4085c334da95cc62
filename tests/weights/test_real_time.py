"""Names of weights of the real-time family."""

import re

import pytest
import torch

from detr.config import build_model, compose
from detr.errors import UserError
from detr.weights import to_published
from detr.weights.families import D_FINE, RT_DETRV2, Family


@pytest.mark.parametrize(
    ("model", "family", "features", "message"),
    [
        ("rt_detrv2_r18", RT_DETRV2, [8, 16], "have 3 feature maps, this one has 2,"),
        ("d_fine_n", D_FINE, [4, 8, 16, 32], "have 2 or 3 feature maps, this one has 4,"),
    ],
)
def test_other_numbers_of_maps_have_no_published_names(
    model: str, family: Family, features: list[int], message: str
) -> None:
    maps = len(features)
    options = [f"backbone.features={features}", f"neck.num_levels={maps}", f"decoder.num_points={[4] * maps}"]
    overrides = [f"model={model}", "model.backbone.weights=null", *(f"model.{option}" for option in options)]
    with torch.device("meta"):
        built = build_model(compose(overrides).model, num_classes=3, pretrained=False)
    with pytest.raises(UserError, match=re.escape(message)):
        to_published(built.state_dict(), family)
