"""Attention blocks on one map of 256 channels, forward and backward on one thread, against their formulas as written.

Those keep a weight for each pair of positions, criss-cross attention for each pair in one row or column. Memory is what
a step needs beyond what is held before it: output, gradients and everything between.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import extra_memory, in_new_process
from benchmarks.results import Row
from detr.models.attention import CrissCrossAttention, MultiHeadSelfAttention, NonLocal
from detr.models.attention.dual import PositionAttention
from tools.timing import medians

CHANNELS, SIZES = 256, (32, 64, 96)


@dataclass(frozen=True)
class Case:
    """share: of the written form's memory, the most that is wanted on the largest map."""

    block: Callable[[int], nn.Module]
    as_written: Callable[[nn.Module, Tensor], Tensor]
    share: float | None = None


def run(*, repeats: int) -> Iterator[Row]:
    for name, case in CASES.items():
        for size in SIZES:
            seconds = in_new_process(_seconds, name, size, repeats)
            ours, written = (in_new_process(_memory, name, size, form) for form in ("ours", "as_written"))
            of = f"{name}, {size}x{size}"
            yield Row(of, "forward and backward", "s", seconds["ours"], published=seconds["as_written"])
            target = case.share * written if case.share and size == max(SIZES) else None
            yield Row(of, "extra memory", "MiB", ours, target, published=written)


def _seconds(name: str, size: int, repeats: int) -> dict[str, float]:
    steps = _steps(name, size)
    # Output and gradient of the map: other sums may round differently; other formulas would differ more.
    for ours, written in zip(steps["ours"]()[:2], steps["as_written"]()[:2], strict=True):
        if (ours - written).norm() > 1e-4 * written.norm():
            raise ValueError(f"{name}, {size}x{size}: the two forms differ.")
    return medians(steps, repeats, warmup=0)


def _memory(name: str, size: int, form: str) -> float:
    _steps(name, 8)[form]()  # what is loaded and made once is not the block's
    return extra_memory(_steps(name, size)[form])


def _steps(name: str, size: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name]
    block = case.block(CHANNELS).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=CHANNELS**-0.5)  # at their start the blocks do nothing
    x = torch.randn(1, CHANNELS, size, size, requires_grad=True)
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    weight = torch.randn_like(x)  # of the output in the loss
    forms = {"ours": partial(block, x, mask), "as_written": partial(case.as_written, block, x)}

    def step(form: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        output = form()
        return output.detach(), *torch.autograd.grad(output, (x, *block.parameters()), weight)

    return {side: partial(step, form) for side, form in forms.items()}


def _non_local(block: NonLocal, x: Tensor) -> Tensor:
    theta, phi, g = (part(x).flatten(2) for part in (block.theta, block.phi, block.g))
    if block.mode == "concatenation":
        of_theta, of_phi = block.concat.weight[0].chunk(2)
        weights = ((of_theta @ theta)[:, :, None] + (of_phi @ phi)[:, None]).relu() / g.shape[-1]
    elif block.mode == "dot_product":
        weights = theta.transpose(1, 2) @ phi / g.shape[-1]
    else:
        weights = (theta.transpose(1, 2) @ phi).softmax(-1)
    y = (weights @ g.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
    return x + block.norm(F.conv2d(y, block.out.weight[..., None, None], block.out.bias))


def _position(block: PositionAttention, x: Tensor) -> Tensor:
    query, key, value = (part(x).flatten(2) for part in (block.query, block.key, block.value))
    weights = (query.transpose(1, 2) @ key).softmax(-1)
    return x + block.gamma * (weights @ value.transpose(1, 2)).transpose(1, 2).view_as(x)


def _self_attention(block: MultiHeadSelfAttention, x: Tensor) -> Tensor:
    value = x.flatten(2).transpose(1, 2)
    position = block.position(torch.zeros(len(x), *x.shape[2:], dtype=torch.bool)).flatten(2).transpose(1, 2)
    weight, bias = block.attention.in_proj.weight.chunk(3), block.attention.in_proj.bias.chunk(3)
    q, k, v = (
        F.linear(part, w, b).unflatten(-1, (block.attention.nhead, -1)).transpose(1, 2)
        for part, w, b in zip((value + position, value + position, value), weight, bias, strict=True)
    )
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    seen = block.attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    return x + seen.transpose(1, 2).unflatten(2, x.shape[2:])


def _criss_cross(block: CrissCrossAttention, x: Tensor) -> Tensor:
    """As the published code goes about it, with contiguous batches of all columns and of all rows."""
    batch, _, height, width = x.shape

    def columns(part: Tensor) -> Tensor:
        return part.permute(0, 3, 1, 2).contiguous().flatten(0, 1)

    def rows(part: Tensor) -> Tensor:
        return part.permute(0, 2, 1, 3).contiguous().flatten(0, 1)

    for _ in range(block.recurrence):
        query, key, value = block.query(x), block.key(x), block.value(x)
        itself = torch.full((height,), torch.inf).diag().repeat(batch * width, 1, 1)
        column = columns(query).transpose(1, 2) @ columns(key) - itself
        row = rows(query).transpose(1, 2) @ rows(key)
        both = (column.unflatten(0, (batch, width)).transpose(1, 2), row.unflatten(0, (batch, height)))
        weights = torch.cat(both, dim=-1).softmax(-1)
        column = weights[..., :height].transpose(1, 2).contiguous().flatten(0, 1)
        row = weights[..., height:].contiguous().flatten(0, 1)
        of_columns = (columns(value) @ column.transpose(1, 2)).unflatten(0, (batch, width)).permute(0, 2, 3, 1)
        of_rows = (rows(value) @ row.transpose(1, 2)).unflatten(0, (batch, height)).permute(0, 2, 1, 3)
        x = block.gamma * (of_columns + of_rows) + x
    return x


CASES = {
    "non-local, embedded gaussian": Case(NonLocal, _non_local, share=0.1),
    "non-local, dot product": Case(partial(NonLocal, mode="dot_product"), _non_local),
    "non-local, concatenation": Case(partial(NonLocal, mode="concatenation"), _non_local),
    "position attention": Case(PositionAttention, _position),
    "self-attention": Case(MultiHeadSelfAttention, _self_attention),
    "criss-cross": Case(CrissCrossAttention, _criss_cross, share=0.8),
}
