"""A model that is deployed predicts what it did."""

import pytest
import torch
from torch import nn

from detr.config import build_model, compose
from detr.models.deployment import deployed
from tests.helpers import make_batch
from tests.helpers.commands import TINY_MODEL


@pytest.mark.parametrize(
    "options",
    [
        ["model=detr"],
        ["model=deformable_detr", "model.refine=true", "model.shared_heads=false"],
        ["model=rt_detr_r18", "model.decoder.eval_layers=1"],
        ["model=d_fine_n", "model.decoder.num_layers=3", "model.decoder.eval_layers=2", "model/attention=se"],
    ],
)
@torch.no_grad()
def test_it_predicts_what_the_last_layer_used_in_evaluation_does(options: list[str]) -> None:
    torch.manual_seed(0)
    config = compose([*TINY_MODEL, *options]).model
    model = build_model(config, num_classes=5, pretrained=False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    before, batch = (
        sum(p.numel() for p in model.parameters()),
        make_batch([torch.rand(3, 64, 96), torch.rand(3, 96, 64)]),
    )
    expected, plain = model(batch), deployed(model)
    found = plain(batch)
    assert len(found.boxes) == 1
    torch.testing.assert_close(found.logits[0], expected.logits[-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.boxes[0], expected.boxes[-1], atol=1e-5, rtol=0)
    assert not plain.training and sum(p.numel() for p in model.parameters()) == before
