"""Weights of attention, which running a model never keeps: with them its outputs must come out again."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.attention import (
    Blocks,
    CrissCrossAttention,
    DualAttention,
    HardAttention,
    MultiHeadSelfAttention,
    NonLocal,
    ResidualAttention,
    SpatialTransformer,
    SqueezeExcitation,
)
from detr.models.attention.dual import PositionAttention
from detr.models.attention.spatial_transformer import warp
from detr.models.attention.views import Viewable
from detr.models.attention_maps import on_largest, token_at, watch
from detr.models.detr import DETR
from detr.models.layers.conditional import ConditionalCrossAttention, ConditionalSelfAttention
from detr.models.layers.deformable import DeformableCrossAttention, DeformableSelfAttention, spread
from detr.models.layers.multihead import MultiHead
from detr.models.layers.transformer import DecoderCrossAttention, EncoderSelfAttention
from detr.models.values import Memory, QueryPositions
from tests.helpers import make_batch

D_MODEL, QUERIES, SHAPES = 12, 7, ((5, 3), (3, 2))


def make_memory(shapes: tuple[tuple[int, int], ...], padded: bool) -> Memory:
    """Two images; if padded, the first has padding at the right and bottom of each level."""
    masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in shapes]
    if padded:
        for mask in masks:
            mask[0, -1:], mask[0, :, -1:] = True, True
    maps, positions = ([torch.randn(2, D_MODEL, *shape).double() for shape in shapes] for _ in range(2))
    return Memory.from_maps(maps, positions, masks, padded=padded)


def make_positions(dims: int) -> QueryPositions:
    anchors = torch.rand(2, QUERIES, dims).double() * 1.4 - 0.2  # some beyond the image
    position, spatial = torch.randn(2, 2, QUERIES, D_MODEL).double().unbind()
    return QueryPositions(position=position, anchors=anchors, spatial=spatial)


def shaken(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def values(attention: nn.Module, memory: Memory) -> Tensor:
    """(B, S, d_model) what the attention's weights are multiplied with."""
    if isinstance(attention, ConditionalCrossAttention):
        return attention.value(memory.tokens)
    if hasattr(attention, "value_proj"):
        return attention.value_proj(memory.tokens)
    weight, bias = attention.in_proj.weight, attention.in_proj.bias
    return F.linear(memory.tokens, weight[2 * D_MODEL :], bias[2 * D_MODEL :])


def project(attention: nn.Module, x: Tensor) -> Tensor:
    return (attention.output_proj if hasattr(attention, "output_proj") else attention.out_proj)(x)


CROSS = {
    "standard": lambda nhead: DecoderCrossAttention(d_model=D_MODEL, nhead=nhead),
    "conditional_first": lambda nhead: ConditionalCrossAttention(d_model=D_MODEL, nhead=nhead, dropout=0.0, first=True),
    "conditional": lambda nhead: ConditionalCrossAttention(d_model=D_MODEL, nhead=nhead, dropout=0.0, first=False),
    "deformable": lambda nhead: DeformableCrossAttention(d_model=D_MODEL, nhead=nhead, num_levels=2, num_points=3),
}
ENCODER = {
    "standard": lambda nhead: EncoderSelfAttention(d_model=D_MODEL, nhead=nhead),
    "deformable": lambda nhead: DeformableSelfAttention(d_model=D_MODEL, nhead=nhead, num_levels=2, num_points=3),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("kind", CROSS)
def test_cross_attention_is_its_weights_times_values(kind: str, dims: int, padded: bool) -> None:
    torch.manual_seed(0)
    attention, memory, place = shaken(CROSS[kind](1)), make_memory(SHAPES, padded), make_positions(dims)
    x = torch.randn(2, QUERIES, D_MODEL).double()
    weights = attention.weights(x, place, memory)
    equal(project(attention, weights @ values(attention, memory)), attention(x, place, memory))
    if padded:
        assert (weights[0][:, memory.mask[0]] == 0).all()
    if kind != "deformable":
        equal(weights.sum(-1), torch.ones(2, QUERIES).double())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ENCODER)
def test_encoder_attention_is_its_weights_times_values(kind: str, padded: bool) -> None:
    torch.manual_seed(0)
    attention, memory = shaken(ENCODER[kind](1)), make_memory(SHAPES, padded)
    output = attention(memory)
    for token in torch.tensor([[0, 7], [4, 0], [16, 20]]):
        weights = attention.weights(memory, token)
        mixed = project(attention, (weights[:, None] @ values(attention, memory))[:, 0])
        equal(mixed, torch.stack([output[0, token[0]], output[1, token[1]]]))


@pytest.mark.parametrize("kind", CROSS)
def test_weights_of_several_heads_are_their_mean(kind: str) -> None:
    """Token by token: with values of 1 there and 0 elsewhere, each head puts out its weight of that token."""
    torch.manual_seed(0)
    attention, memory, place = shaken(CROSS[kind](4)), make_memory(SHAPES, True), make_positions(4)
    projection = attention.output_proj if kind == "deformable" else attention.out_proj
    nn.init.eye_(projection.weight)
    nn.init.zeros_(projection.bias)
    x = torch.randn(2, QUERIES, D_MODEL).double()
    weights = attention.weights(x, place, memory)
    for token in range(memory.tokens.shape[1]):
        only = torch.zeros_like(memory.tokens)
        only[:, token] = 1.0
        if kind == "deformable":
            attention.value_proj = nn.Identity()
            # The memory's tokens are values only: queries come from x, and locations from anchors.
            output = attention(x, place, replace(memory, tokens=only))
        else:
            attention.mix = partial(with_values, attention, only)
            output = attention(x, place, memory)
        equal(weights[:, :, token], output.unflatten(-1, (4, -1))[..., 0].mean(-1))


def with_values(attention: MultiHead, values: Tensor, q: Tensor, k: Tensor, _: Tensor, keep: Tensor | None) -> Tensor:
    return MultiHead.mix(attention, q, k, attention.heads(values), keep)


def test_points_outside_of_a_map_count_only_as_far_as_they_reach_in() -> None:
    locations = torch.tensor([[-0.4, 0.5], [0.0, 0.5], [1 / 6, 0.0], [0.5, 0.5], [3.0, -2.0]]).view(1, 5, 1, 1, 2)
    weights = spread([(5, 3)], [locations], [torch.ones(1, 5, 1, 1)]).view(5, 5, 3)
    torch.testing.assert_close(weights.sum((1, 2)), torch.tensor([0.0, 0.5, 0.5, 1.0, 0.0]))
    assert weights[1, 2, 0] == 0.5 and weights[2, 0, 0] == 0.5 and weights[3, 2, 1] == 1.0


def test_conditional_attention_names_heads_that_do_not_fit() -> None:
    with pytest.raises(
        UserError, match="ConditionalSelfAttention: wanted d_model as a multiple of nhead, got 10 and 3"
    ):
        ConditionalSelfAttention(d_model=10, nhead=3, dropout=0.0)


def test_levels_are_added_where_they_cover_the_image() -> None:
    torch.manual_seed(0)
    weights = torch.rand(3, 8 * 12 + 4 * 6 + 2 * 3)
    total = on_largest(weights, [(8, 12), (4, 6), (2, 3)])
    torch.testing.assert_close(total.sum((1, 2)), weights.sum(1))
    one = torch.zeros(1, 15)
    one[0, token_at((0.9, 0.4), 3, 5)] = 1.0  # row 1, column 4
    assert torch.equal(on_largest(one, [(3, 5)])[0].nonzero(), torch.tensor([[1, 4]]))


def test_corners_lie_in_the_corner_cells() -> None:
    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)]
    assert [int(token_at(corner, 3, 5)) for corner in corners] == [0, 4, 10, 14, 7]


C = 8
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "self_attention": lambda: MultiHeadSelfAttention(C, nhead=1),
    "position": lambda: PositionAttention(C, reduction=2),
    "dual": lambda: DualAttention(C, channel=False),
    "criss_cross": lambda: CrissCrossAttention(C, reduction=2),
    **{
        f"{mode}-{sub}-{scale}": lambda mode=mode, sub=sub, scale=scale: NonLocal(
            C, mode=mode, sub_sample=sub, scale=scale, norm="none"
        )
        for mode in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
        for sub, scale in (("none", False), ("none", True), ("after", False), ("before", False))
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_adds_its_weights_times_values(name: str) -> None:
    """The first image is padded, the position another one in each."""
    torch.manual_seed(0)
    block = shaken(BLOCKS[name]())
    x, mask = torch.randn(2, C, 5, 7).double(), torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0, 4:], mask[0, :, 5:] = True, True
    token = torch.tensor([2 * 7 + 3, 4 * 7 + 6])
    weights = block.view(x, mask, token).values
    assert weights.shape == (2, 5, 7) and (weights[0][mask[0]] == 0).all()
    change = (block(x, mask) - x).flatten(2)
    found = torch.stack([change[0, :, token[0]], change[1, :, token[1]]])
    equal(added(block, x, mask, weights), found)
    if not name.startswith(("dot_product", "concatenation")):
        equal(weights.sum((1, 2)), torch.ones(2).double())


def added(block: nn.Module, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    if isinstance(block, MultiHeadSelfAttention):
        weight, bias = block.attention.in_proj.weight, block.attention.in_proj.bias
        seen = torch.einsum("bhw,bchw->bc", weights, x)
        return block.attention.out_proj(F.linear(seen, weight[2 * C :], bias[2 * C :]))
    if isinstance(block, NonLocal):
        g = block.g(F.max_pool2d(x, 2) if block.sub_sample == "before" else x)
        if block.sub_sample == "after":
            g = F.max_pool2d(g, 2)
        if block.sub_sample != "none":
            weights = F.avg_pool2d(weights[:, None], 2)[:, 0] * 4
        return block.out(torch.einsum("bhw,bchw->bc", weights, g))
    if isinstance(block, CrissCrossAttention):
        once = CrissCrossAttention(C, recurrence=1, reduction=2).double()
        once.load_state_dict(block.state_dict())
        last = once(x, mask)
        seen = torch.einsum("bhw,bchw->bc", weights, block.value(last))
        before = (last - x).flatten(2)
        return block.gamma * seen + torch.stack([before[0, :, 2 * 7 + 3], before[1, :, 4 * 7 + 6]])
    position = block.position if isinstance(block, DualAttention) else block
    return position.gamma * torch.einsum("bhw,bchw->bc", weights, position.value(x))


def test_criss_cross_shows_its_column_and_row_only() -> None:
    torch.manual_seed(0)
    block, x = shaken(CrissCrossAttention(C)), torch.randn(1, C, 5, 7).double()
    weights = block.view(x, torch.zeros(1, 5, 7, dtype=torch.bool), torch.tensor([2 * 7 + 3])).values[0]
    assert (weights[2] > 0).all() and (weights[:, 3] > 0).all()
    weights[2], weights[:, 3] = 0.0, 0.0
    assert (weights == 0).all()


def test_what_other_blocks_show_is_what_they_do() -> None:
    torch.manual_seed(0)
    x, mask, token = torch.randn(2, C, 6, 7), torch.zeros(2, 6, 7, dtype=torch.bool), torch.tensor([0, 1])
    gates = shaken(SqueezeExcitation(C)).float()
    torch.testing.assert_close(gates(x, mask), x * gates.view(x, mask, token).values[..., None, None])
    hard = shaken(HardAttention(C)).float()
    kept = hard.view(x, mask, token).values > 0.5
    torch.testing.assert_close(hard(x, mask), x * kept[:, None])
    transformer = shaken(SpatialTransformer(C)).float()
    theta = transformer.view(x, mask, token).theta
    assert (theta - torch.eye(2, 3)).abs().max() > 0.1 and warp(x, theta, mask).isfinite().all()
    residual = ResidualAttention(C).eval()
    soft = residual.view(x, mask, token).values
    assert soft.shape == (2, 6, 7) and ((soft > 0) & (soft < 1)).all()
    assert DualAttention(C, position=False).view(x, mask, token) is None


def test_all_blocks_have_something_to_show() -> None:
    kinds = (
        CrissCrossAttention,
        DualAttention,
        HardAttention,
        NonLocal,
        ResidualAttention,
        MultiHeadSelfAttention,
        SpatialTransformer,
        SqueezeExcitation,
    )
    assert all(isinstance(kind(C), Viewable) for kind in kinds) and not isinstance(nn.Identity(), Viewable)


class Silent(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


def test_a_watched_model_computes_the_same_and_is_left_alone(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr().eval()
    model.attention = nn.ModuleList([Blocks({"mine": Silent(), "se": SqueezeExcitation(32)})])
    batch = make_batch([torch.randn(3, 64, 96)])
    before = model(batch)
    with watch(model, (0.5, 0.5)) as seen:
        during = model(batch)
    assert torch.equal(before.logits, during.logits) and torch.equal(before.boxes, during.boxes)
    assert seen.decoder.shape == (11, 4, 6) and seen.encoder.shape == (4, 6) and [*seen.blocks] == ["attention.0.se"]
    torch.testing.assert_close(seen.decoder.sum((1, 2)), torch.ones(11))
    assert not any(module._forward_pre_hooks for module in model.modules())
