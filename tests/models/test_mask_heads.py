"""Heads of masks: what holds for every recipe, and padding. Parity with published masks is in tests/parity."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detr.config import build_criterion, build_model, compose
from detr.errors import UserError
from detr.folders import CONFIGS
from detr.losses import SetCriterion
from detr.models.detr import DETR
from detr.models.mask_heads import DETRMaskHead, DotProductMaskHead, MaskHead
from detr.models.values import Detail, Memory
from detr.types import Target
from tests.helpers import make_batch, random_targets

CLASSES = 3
SIZES = ((96, 128), (64, 96))
RECIPES = ("detr", "conditional_detr", "dab_detr", "deformable_detr", "dino", "small", "rt_detr_r18", "d_fine_s")
HEADS = sorted(path.stem for path in (CONFIGS / "model" / "masks").glob("*.yaml") if path.stem != "none")
TINY = (
    "model/backbone=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze=[]",
    "model.num_queries=7",
    "model.encoder.d_model=128",
    "model.encoder.nhead=4",
    "model.encoder.num_layers=1",
    "model.decoder.num_layers=2",
    "model.encoder.dim_feedforward=24",
    "model.encoder.dropout=0.0",
)


def build(*options: str) -> tuple[DETR, SetCriterion]:
    torch.manual_seed(0)
    config = compose([*TINY, "data.root=DATA", *options])
    return build_model(config.model, CLASSES, pretrained=False), build_criterion(config.criterion, CLASSES)


def with_masks(targets: Sequence[Target]) -> list[Target]:
    """The boxes, filled."""
    found = []
    for target, (height, width) in zip(targets, SIZES, strict=True):
        masks = torch.zeros(len(target), height, width, dtype=torch.bool)
        for mask, (x, y, w, h) in zip(masks, target.boxes.tolist(), strict=True):
            rows = slice(int((y - h / 2) * height), int((y + h / 2) * height))
            mask[rows, int((x - w / 2) * width) : int((x + w / 2) * width)] = True
        found.append(replace(target, masks=masks))
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_learns_whatever_the_images_hold(recipe: str, head: str) -> None:
    model, criterion = build(f"model={recipe}", f"model/masks={head}")
    images = make_batch([torch.rand(3, *size) for size in SIZES])
    for counts in ([0, 0], [2, 0], [1, 9]):
        targets = with_masks(random_targets(counts, CLASSES))
        model.zero_grad()
        predictions = model.train()(images, targets)
        assert predictions.masks is None and predictions.mask_of is not None
        losses = criterion(predictions, targets)
        losses["loss"].backward()
        assert {"loss_mask", "loss_dice"} <= losses.keys() and "loss_mask_0" not in losses
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert all(value.isfinite() for value in losses.values())
        assert (float(losses["loss_dice"]) > 0) == (sum(counts) > 0)
    with torch.no_grad():
        found = model.eval()(images)
    assert found.masks is not None and found.masks.shape == (1, 2, 7, 24, 32)


@pytest.mark.parametrize("backbone", ["resnet50_dc5", "resnet18_vd", "timm"])
def test_masks_have_the_stride_of_the_finest_map(backbone: str) -> None:
    pytest.importorskip("timm", reason="needs the extra 'timm'")
    name = ("model.backbone.name=resnet18d",) if backbone == "timm" else ("model.backbone.features=[layer4]",)
    for head in HEADS:
        model, _ = build("model=detr", f"model/backbone={backbone}", *name, f"model/masks={head}")
        with torch.no_grad():
            masks = model.eval()(make_batch([torch.rand(3, 67, 101)])).masks
        assert masks is not None and masks.shape == (1, 1, 7, 17, 26)


def run(head: MaskHead, queries: Tensor, boxes: Tensor, maps: list[Tensor], neck: list[Tensor], mask: Tensor) -> Tensor:
    masks = [mask[:, :: -(-mask.shape[1] // level.shape[2]), :: -(-mask.shape[2] // level.shape[3])] for level in neck]
    memory = Memory.from_maps(neck, [level.flip(1) for level in neck], masks, padded=bool(mask.any()))
    height, width = mask.shape[1:]
    detail = Detail(maps=maps, neck=neck, mask=mask if mask.any() else None, size=(height, width))
    with torch.no_grad():
        return head(queries, boxes, memory, detail)


def test_padding_changes_no_mask_of_dot_products() -> None:
    torch.manual_seed(0)
    head = DotProductMaskHead(
        d_model=32, in_channels=32, channels=[5, 7, 9], strides=[4, 8, 16], selected=[1, 2], embed_dim=16
    )
    sizes = [(12, 20), (6, 10), (3, 5)]
    maps = [torch.randn(1, channels, *size) for channels, size in zip((5, 7, 9), sizes, strict=True)]
    neck = [torch.randn(1, 32, *size) for size in sizes[1:]]
    queries, boxes = torch.randn(1, 3, 32), 0.2 + 0.3 * torch.rand(1, 3, 4)
    alone = run(head, queries, boxes, maps, neck, torch.zeros(1, 48, 80, dtype=torch.bool))

    def padded(level: Tensor, by: int) -> Tensor:
        more = torch.full((1, level.shape[1], level.shape[2] + by, level.shape[3] + by), 9.0)
        more[:, :, : level.shape[2], : level.shape[3]] = level
        return more

    mask = torch.ones(1, 80, 112, dtype=torch.bool)
    mask[:, :48, :80] = False
    wide = run(
        head,
        queries,
        boxes,
        [padded(level, by) for level, by in zip(maps, (8, 4, 2), strict=True)],
        [padded(level, by) for level, by in zip(neck, (4, 2), strict=True)],
        mask,
    )
    torch.testing.assert_close(wide[..., :12, :20], alone, atol=1e-5, rtol=0)


def test_masks_of_dot_products_fall_off_outside_of_the_box() -> None:
    """Against the distance of each cell, one by one, in an image of 44 x 28 pixels that is padded to 48 x 32."""
    sizes = {"d_model": 8, "in_channels": 8, "channels": [3, 4], "strides": [4, 8], "selected": [1]}
    torch.manual_seed(0)
    plain = DotProductMaskHead(**sizes, embed_dim=8, falloff=0.0)
    head = DotProductMaskHead(**sizes, embed_dim=8, falloff=1.5)
    head.load_state_dict(plain.state_dict())
    maps, neck = [torch.randn(1, 3, 8, 12), torch.randn(1, 4, 4, 6)], [torch.randn(1, 8, 4, 6)]
    mask = torch.ones(1, 32, 48, dtype=torch.bool)
    mask[:, :28, :44] = False
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.3], [0.1, 0.8, 0.3, 0.5]]])
    inputs = (torch.randn(1, 2, 8), boxes, maps, neck, mask)
    lost = run(plain, *inputs) - run(head, *inputs)
    for query, (x, y, width, height) in enumerate(boxes[0].tolist()):
        left, right = (x - width / 2) * 44, (x + width / 2) * 44
        top, bottom = (y - height / 2) * 28, (y + height / 2) * 28
        for row in range(7):
            for column in range(11):
                at_x, at_y = 4 * column + 2, 4 * row + 2
                outside = max(left - at_x, at_x - right, top - at_y, at_y - bottom, 0.0)
                assert abs(float(lost[0, query, row, column]) - 1.5 * outside / 4) < 1e-4


def test_queries_see_no_padding_in_the_head_of_detr() -> None:
    head = DETRMaskHead(d_model=32, in_channels=32, channels=[9, 7], strides=[16, 32], selected=[1])
    neck = [torch.randn(1, 32, 4, 6)]
    mask = torch.zeros(1, 128, 192, dtype=torch.bool)
    mask[:, :, 96:] = True
    memory = Memory.from_maps(neck, None, [mask[:, ::32, ::32]], padded=True)
    with torch.no_grad():
        weights = head._attention(torch.randn(1, 3, 32), memory)
    torch.testing.assert_close(weights.sum((2, 3, 4)), torch.ones(1, 3))  # over all heads together, as published
    assert float(weights[..., 3:].abs().max()) == 0


def test_too_few_channels_are_named() -> None:
    with pytest.raises(UserError, match="wanted channels of the neck as a multiple of 128, for 3 finer maps, got 32"):
        build("model=detr", "model.encoder.d_model=32", "model/masks=detr")


def test_terms_of_masks_need_a_head() -> None:
    model, _ = build("model=detr")
    _, criterion = build("model=detr", "model/masks=detr")
    targets = with_masks(random_targets([1, 2], CLASSES))
    predictions = model(make_batch([torch.rand(3, *size) for size in SIZES]))
    with pytest.raises(UserError, match=r"criterion.terms.mask: wanted a model that predicts masks, with model/masks="):
        criterion(predictions, targets)


def test_masks_need_targets_with_masks() -> None:
    model, criterion = build("model=detr", "model/masks=dot_product")
    predictions = model(make_batch([torch.rand(3, *size) for size in SIZES]))
    with pytest.raises(UserError, match="wanted targets with masks"):
        criterion(predictions, random_targets([1, 2], CLASSES))
