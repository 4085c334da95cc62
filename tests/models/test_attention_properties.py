"""What every attention block must hold to, with each of its options."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from detr.errors import UserError
from detr.models.attention import (
    CrissCrossAttention,
    DualAttention,
    HardAttention,
    MultiHeadSelfAttention,
    NonLocal,
    ResidualAttention,
    SpatialTransformer,
    SqueezeExcitation,
)
from detr.models.attention.masked import masked_mean
from detr.models.attention.non_local import MaskedGroupNorm
from detr.models.attention.residual import _enlarge
from detr.models.attention.spatial_transformer import warp

CHANNELS = 32
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "se": partial(SqueezeExcitation, CHANNELS, reduction=4),
    "se_bias": partial(SqueezeExcitation, CHANNELS, reduction=4, bias=True),
    "self_attention": partial(MultiHeadSelfAttention, CHANNELS),
    "criss_cross": partial(CrissCrossAttention, CHANNELS),
    "dual": partial(DualAttention, CHANNELS),
    "dual_position": partial(DualAttention, CHANNELS, channel=False),
    "dual_similar": partial(DualAttention, CHANNELS, position=False, favors="similar"),
    "residual": partial(ResidualAttention, CHANNELS),
    "residual_channel": partial(ResidualAttention, CHANNELS, depth=3, activation="channel"),
    "residual_spatial": partial(ResidualAttention, CHANNELS, depth=1, activation="spatial", variant="port"),
    "spatial_transformer": partial(SpatialTransformer, CHANNELS),
    "hard": partial(HardAttention, CHANNELS),
    "hard_gumbel": partial(HardAttention, CHANNELS, estimator="gumbel"),
    "non_local_scaled": partial(NonLocal, CHANNELS, scale=True),
    **{
        f"{mode}-{sub_sample}-{norm}": partial(NonLocal, CHANNELS, mode=mode, sub_sample=sub_sample, norm=norm)
        for mode in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
        for sub_sample, norm in (("none", "batch"), ("after", "group"), ("before", "none"))
    },
}
ONE_OF_EACH = (
    *("se", "self_attention", "criss_cross", "dual", "residual_spatial", "spatial_transformer", "hard", "hard_gumbel"),
    *("embedded_gaussian-after-group", "concatenation-before-none"),
)
every_block = pytest.mark.parametrize("name", BLOCKS)


def make(name: str) -> nn.Module:
    """With random parameters: at their start the blocks do nothing."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
    return block


def no_mask(x: Tensor) -> Tensor:
    return torch.zeros(len(x), *x.shape[2:], dtype=torch.bool)


def padded_batch() -> tuple[Tensor, Tensor]:
    """Two maps, of which the first has padding at the right and bottom."""
    torch.manual_seed(1)
    mask = torch.zeros(2, 7, 11, dtype=torch.bool)
    mask[0, 3:], mask[0, :, 5:] = True, True
    return torch.randn(2, CHANNELS, 7, 11), mask


def loss_of(block: nn.Module, output: Tensor) -> Tensor:
    """Some loss, with that of the policy where the block has one."""
    loss = output.square().mean()
    return loss + block.policy_loss(torch.arange(len(output)).to(loss)) if isinstance(block, HardAttention) else loss


@every_block
@pytest.mark.parametrize("size", [(5, 7), (1, 7), (5, 1)])
def test_blocks_start_as_the_identity(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name]().train(not name.startswith("hard"))  # which tosses in training
    x = torch.randn(2, CHANNELS, *size)
    torch.testing.assert_close(block(x, no_mask(x)), x, atol=1e-6, rtol=0)


@every_block
@pytest.mark.parametrize("size", [(3, 5), (4, 4), (1, 5), (5, 1), (1, 1)])
def test_padding_changes_nothing_and_alone_equals_batched(name: str, size: tuple[int, int]) -> None:
    height, width = size
    # Group norm enlarges the rounding where values are nearly equal, as they are with as few positions to sum over.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5 if name.endswith("group") else 1e-6)):
        block = make(name).to(dtype).eval()
        padded = padded_batch()[0].to(dtype)
        small = padded[:1, :, :height, :width].clone()
        mask = no_mask(padded)
        mask[0, height:], mask[0, :, width:] = True, True
        alone = block(small, mask[:1, :height, :width])
        assert size != (3, 5) or not torch.allclose(alone, small, atol=1e-3)
        together = block(padded, mask)
        limit = tolerance * float(alone.detach().abs().max())
        torch.testing.assert_close(together[:1, :, :height, :width], alone, atol=limit, rtol=0)
        other = block(torch.where(mask[:, None], 1e3, padded), mask)
        valid = (~mask)[:, None].expand_as(other)
        torch.testing.assert_close(other[valid], together[valid], atol=limit, rtol=0)
        assert other.isfinite().all()


@every_block
def test_every_parameter_learns_and_gradients_are_finite(name: str) -> None:
    """From the start, where some get a gradient of zero, for a few steps; all but one cell of an image is padding."""
    torch.manual_seed(0)
    block, (x, mask) = BLOCKS[name]().train(), padded_batch()
    mask[0] = True
    mask[0, 0, 0] = False
    x.requires_grad_()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(block, block(x, mask)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
        assert x.grad.isfinite().all()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in block.parameters() if p.dim() > 1)


@every_block
def test_gradients_equal_differences_for_a_batch_of_one(name: str) -> None:
    """torch's batch norm has wrong gradients on some views of one map, which look channels last by their strides."""
    block = make(name).double().train(not name.startswith("hard"))  # coins would fall anew for each difference
    x = torch.randn(1, CHANNELS, 9, 11).double().to(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, *block.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: block(x, no_mask(x)), inputs, fast_mode=True, atol=1e-4)


@every_block
def test_bfloat16_is_finite_and_close(name: str) -> None:
    """Under autocast behind a convolution, whose output is bfloat16, and with maps that are still float32."""
    block, (x, mask) = make(name).eval(), padded_batch()
    convolution = nn.Conv2d(CHANNELS, CHANNELS, kernel_size=1)
    valid = (~mask)[:, None].expand_as(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = convolution(x)
        found = {torch.bfloat16: block(low, mask), torch.float32: block(low.float(), mask)}
    expected = block(low.float(), mask)
    if isinstance(block, HardAttention):
        valid = valid & (block.score(low.float()).abs() > 0.05)  # where it is even, rounding may decide
    assert low.dtype == torch.bfloat16
    for dtype, output in found.items():
        assert output.dtype == dtype and output.isfinite().all()
        limit = 0.03 * float(expected.detach().abs().max())
        torch.testing.assert_close(output[valid].float(), expected[valid], atol=limit, rtol=0)

    block.train()
    with torch.autocast("cpu", torch.bfloat16):
        output = block(convolution(x), mask)
    loss_of(block, output.float()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert convolution.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "block, message",
    [
        (partial(CrissCrossAttention, 8, recurrence=0), "wanted recurrence of at least 1, got 0"),
        (partial(DualAttention, 8, position=False, channel=False), "wanted position, channel, or both, got neither"),
        (partial(ResidualAttention, 8, depth=0), "wanted depth of at least 1, got 0"),
        (partial(HardAttention, 8, keep=0.3), "wanted keep between 0.5 and 1, .* got 0.3, 1.0 and 0.01"),
        (partial(HardAttention, 8, weight=-1.0), "weight of at least 0, got 0.98, 1.0 and -1.0"),
        (partial(SpatialTransformer, 8, hidden=0), "wanted hidden of at least 1, got 0"),
        (partial(MultiHeadSelfAttention, 8, dropout=2.0), "wanted dropout as a probability, got 2.0"),
        (partial(NonLocal, 24, norm="group"), "a multiple of 32 channels, got 24. Set norm=batch"),
        (partial(MultiHeadSelfAttention, 24, nhead=5), "d_model as a multiple of nhead, got 24 and 5"),
    ],
)
def test_bad_options_are_named(block: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message):
        block()


def test_options_do_what_their_formulas_say() -> None:
    """Each against the formula itself, over a map of 12 cells without padding."""
    torch.manual_seed(0)
    x = torch.randn(1, 32, 3, 4, dtype=torch.float64)
    rows, nothing = x.flatten(2), no_mask(x)

    non_local = NonLocal(32, scale=True, norm="none").double()
    torch.nn.init.normal_(non_local.out.weight)
    theta, phi, g = (part(x).flatten(2).transpose(1, 2) for part in (non_local.theta, non_local.phi, non_local.g))
    seen = (theta @ phi.transpose(1, 2) / 16**0.5).softmax(-1) @ g
    torch.testing.assert_close(non_local(x, nothing), x + non_local.out(seen).transpose(1, 2).view_as(x))

    for favors, sign in (("similar", 1.0), ("dissimilar", -1.0)):
        dual = DualAttention(32, position=False, favors=favors).double()
        torch.nn.init.ones_(dual.channel.gamma)
        energy = rows @ rows.transpose(1, 2)
        torch.testing.assert_close(dual(x, nothing), x + ((sign * energy).softmax(-1) @ rows).view_as(x))

    norm = MaskedGroupNorm(64).double()
    wide = 0.01 * torch.randn(2, 64, 3, 4, dtype=torch.float64)  # so small that eps matters
    torch.testing.assert_close(norm(wide, no_mask(wide)), torch.nn.functional.group_norm(wide, 32))

    def sizes(bias: bool) -> int:
        return sum(p.numel() for p in SqueezeExcitation(32, reduction=4, bias=bias).parameters())

    assert sizes(True) - sizes(False) == 8 + 32

    block = MultiHeadSelfAttention(32, nhead=4).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    judge = nn.MultiheadAttention(32, 4, batch_first=True).double()
    own = dict(block.named_parameters())
    names = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias", "out_proj.weight": "out_proj.weight"}
    names["out_proj.bias"] = "out_proj.bias"
    judge.load_state_dict({name: next(p for n, p in own.items() if n.endswith(end)) for name, end in names.items()})
    position = block.position(nothing).flatten(2).transpose(1, 2).double()
    features = rows.transpose(1, 2)
    seen = judge(features + position, features + position, features, need_weights=False)[0]
    torch.testing.assert_close(block(x, nothing), x + seen.transpose(1, 2).view_as(x), atol=1e-6, rtol=1e-6)


def test_large_maps_do_not_overflow_float16() -> None:
    x = torch.full((1, 2, 256, 256), 2.0).half()
    torch.testing.assert_close(masked_mean(x, no_mask(x)), torch.full((1, 2), 2.0).half())
    torch.manual_seed(0)
    block, features = NonLocal(8, mode="dot_product", norm="none").eval(), 20 * torch.rand(1, 8, 64, 64)
    torch.nn.init.normal_(block.out.weight)
    with torch.no_grad():
        expected = block(features, no_mask(features))
        with torch.autocast("cpu", torch.float16):
            found = block(features, no_mask(features))
    torch.testing.assert_close(found, expected, atol=0.01 * float(expected.abs().max()), rtol=0)


def test_an_image_that_is_all_padding_harms_no_other() -> None:
    block, x = make("spatial_transformer"), torch.randn(2, CHANNELS, 5, 7)
    mask = no_mask(x)
    mask[0] = True
    block(x, mask)[1].sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters() if p.grad is not None)


def test_a_map_comes_back_from_where_it_was_transformed_to() -> None:
    """What is found at a place in the transformed map goes to where that came from."""
    torch.manual_seed(0)
    block, x = SpatialTransformer(1).double().eval(), torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    x[..., 12:15, 24:27] = 1.0
    for convolution, middle in ((block.process, (0, 0, 1, 1)), (block.out, (0, 0, 0, 0))):
        torch.nn.init.zeros_(convolution.weight), torch.nn.init.zeros_(convolution.bias)
        convolution.weight.data[middle] = 1.0
    block.locate.bias.data = torch.tensor([0.3, -0.4, 0.5, 0.4, -0.2, -0.3], dtype=torch.float64)
    with torch.no_grad():
        assert (block.transform(x, no_mask(x)) - torch.eye(2, 3)).abs().min() > 0.05, "no identity"
        added = (block(x, no_mask(x)) - x)[0, 0]
    places = torch.arange(41.0, dtype=torch.float64)
    assert float((added.sum(0) * places).sum() / added.sum()) == pytest.approx(25.0, abs=0.3)
    assert float((added.sum(1) * places).sum() / added.sum()) == pytest.approx(13.0, abs=0.3)


def test_places_in_a_wide_map_stay_exact_in_bfloat16() -> None:
    """bfloat16 has only 256 places from one edge to the other."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 5, 300).bfloat16().float()
    theta = torch.tensor([[[1.1, 0.2, 0.1], [-0.1, 0.9, -0.15]]])
    expected, larger = warp(x, theta, no_mask(x)), torch.zeros(1, 9, 599, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(warp(x, theta, no_mask(x)), expected)
        torch.testing.assert_close(warp(x.bfloat16(), theta, no_mask(x)), expected.bfloat16())
        enlarged = _enlarge(x.bfloat16(), no_mask(x), larger)
    torch.testing.assert_close(enlarged, _enlarge(x, no_mask(x), larger).bfloat16())


@every_block
def test_channels_last_comes_out_as_it_went_in(name: str) -> None:
    block, (x, mask) = make(name).eval(), padded_batch()
    output = block(x.to(memory_format=torch.channels_last), mask)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, block(x, mask), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, names",
    [("eager", ONE_OF_EACH), *(pytest.param("aot_eager", (name,), id=name) for name in BLOCKS)],
)
def test_blocks_compile_without_graph_breaks_for_all_sizes(backend: str, names: tuple[str, ...]) -> None:
    """In a process of its own, which has no hook that checks shapes."""
    mp.spawn(compile_all, args=(backend, names), nprocs=1)


def compile_all(_: int, backend: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    for name in names:
        torch._dynamo.reset()
        block, counter = make(name).train(), CompileCounterWithBackend(backend)
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        for size in ((17, 19), (20, 28), (32, 18)):
            outputs, x = [], torch.randn(2, CHANNELS, *size)
            mask = no_mask(x)
            mask[0, 5:] = True
            for form in (block, compiled):
                torch.manual_seed(0)  # of the coins
                outputs.append(form(x, mask))
                loss_of(block, outputs[-1]).backward()
            torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4, msg=f"{name} {size}")
        # Once for the first size, and once for any.
        assert counter.frame_count <= 2, f"{name}: compiled {counter.frame_count} times"


@pytest.mark.slow
def test_distributed_training_finds_no_unused_parameter(tmp_path: Path) -> None:
    mp.spawn(train_all, args=(str(tmp_path / "store"),), nprocs=2)


def train_all(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, new in BLOCKS.items():
        torch.manual_seed(0)
        block = new().train()
        parallel = DistributedDataParallel(block)
        x, mask = padded_batch()
        for _ in range(2):  # the second would fail after a first that left a parameter out
            loss_of(block, parallel(x + rank, mask)).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in block.parameters()])
        other = gradients.clone()
        dist.broadcast(other, src=0)
        torch.testing.assert_close(gradients, other, msg=f"{name}: ranks differ")
    dist.destroy_process_group()
