"""Attention blocks against the published implementations' fixtures, and what all of them must hold to."""

import copy
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.models.attention import (
    CrissCross,
    Dual,
    Hard,
    NonLocal,
    Residual,
    SelfAttention,
    SpatialTransformer,
    SqueezeExcitation,
)
from detr.models.attention.dual import ChannelAttention, PositionAttention
from detr.models.attention.residual import Unit, activate
from detr.models.attention.spatial_transformer import inverse, warp

DEPTHS = {"A": 3, "B": 2, "C": 1}
RENAMED = {
    "ccnet": {"cca.": "", "_conv": ""},
    "danet": {"_conv": ""},
    "se": {"fc.0.weight": "squeeze.weight", "fc.2.weight": "excite.weight"},
    "nonlocal": {
        "W.0.": "out.",
        "W.1.": "norm.",
        "W.": "out.",
        "g.0.": "g.",
        "phi.0.": "phi.",
        "concat_project.0.weight": "concat.weight",
    },
}


def load(shared: Path, name: str) -> dict[str, dict[str, Any]]:
    content = torch.load(shared / "fixtures" / "attention" / f"{name}.pt", weights_only=True)
    return {case["name"]: case for case in content["cases"]}


def ours(block: str, name: str, depth: int = 0) -> str:
    if block == "ran":
        return of_residual(name, depth)
    for theirs, here in RENAMED[block].items():
        name = name.replace(theirs, here, 1)
    return name


def of_residual(name: str, depth: int) -> str:
    for theirs, here in (("first_residual_blocks", "first.0"), ("trunk_branches", "trunk"), ("last_blocks", "last.0")):
        if name.startswith(theirs):
            return name.replace(theirs, here)
    if found := re.match(r"skip(\d)_connection_residual_block\.(.*)", name):
        return f"skip.{int(found[1]) - 1}.0.{found[2]}"
    if not (found := re.match(r"softmax(\d)_blocks\.(.*)", name)):
        return name
    number, rest = int(found[1]), found[2]
    if number <= depth:
        return f"down.{number - 1}.{rest if number == depth else f'0.{rest}'}"
    return f"up.{2 * depth - 1 - number}.0.{rest}" if number < 2 * depth else f"mask.{rest}"


def build(block: str, case: Mapping[str, Any]) -> nn.Module:
    config = case["config"]
    if block == "ran":
        if case["name"].startswith("preact"):
            return Unit(config["i"])
        depth = DEPTHS[config["module"]]
        return Residual(config["in_channels"], depth=depth, variant=config["variant"], identity_start=False)
    if block == "ccnet":
        return CrissCross(config["in_dim"], recurrence=config["R"])
    if block == "se":
        return SqueezeExcitation(config["channel"], reduction=config["reduction"], identity_start=False)
    if block == "danet":
        return PositionAttention(config["in_dim"]) if case["name"].startswith("pam") else ChannelAttention()
    return NonLocal(
        config["in_channels"],
        mode=config["mode"],
        sub_sample="after" if config["sub_sample"] else "none",
        norm="batch" if config["bn_layer"] else "none",
    )


def check(block: str, case: Mapping[str, Any]) -> None:
    module = build(block, case).double().train(case["training"])
    own = module.state_dict()
    depth = DEPTHS.get(case["config"].get("module"), 0)
    unused = case["unused_params"]  # of the published code, which ours has none of
    state = {ours(block, name, depth): part for name, part in case["state_dict"].items() if name not in unused}
    assert state.keys() == own.keys()
    module.load_state_dict({name: tensor.view_as(own[name]) for name, tensor in state.items()})
    x = case["input"]["x"].clone().requires_grad_()
    mask = torch.zeros(len(x), *x.shape[2:], dtype=torch.bool)
    output = module(x, mask)
    (output * case["weight"]).sum().backward()
    close(output, case["output"])
    close(x.grad, case["grad_input"]["x"] if isinstance(case["grad_input"], Mapping) else case["grad_input"])
    gradients = {name: p.grad for name, p in module.named_parameters()}
    largest = max(gradient.abs().max() for gradient in case["grad_params"].values()) if case["grad_params"] else 0
    for name, expected in case["grad_params"].items():
        if name in unused:
            continue
        found = gradients[ours(block, name, depth)]
        torch.testing.assert_close(found, expected.view_as(found), atol=1e-9 * float(largest), rtol=0)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "block, prefix",
    [
        ("ccnet", "rcca"),
        ("danet", ("pam", "cam")),
        ("se", "selayer"),
        ("nonlocal", ""),
        ("ran", ("A_", "B_", "C_", "preact_unit_8_8")),
    ],
)
def test_published_implementations(shared: Path, block: str, prefix: str | tuple[str, ...]) -> None:
    cases = {name: case for name, case in load(shared, block).items() if name.startswith(prefix)}
    assert cases
    for name, case in cases.items():
        try:
            check(block, case)
        except AssertionError as error:
            raise AssertionError(f"{block} {name}: {error}") from None


@pytest.mark.parametrize("activation", ["mixed", "channel", "spatial"])
def test_mask_activations_of_residual_attention(shared: Path, activation: str) -> None:
    case = load(shared, "ran")[f"mask_activation_{activation}"]
    x = case["input"]["x"]
    close(activate(x, torch.zeros(len(x), *x.shape[2:], dtype=torch.bool), activation), case["output"])


BLOCKS = {
    "se": lambda: SqueezeExcitation(32, reduction=4),
    "self_attention": lambda: SelfAttention(32),
    "criss_cross": lambda: CrissCross(32),
    "dual": lambda: Dual(32),
    "residual": lambda: Residual(32),
    "residual_channel": lambda: Residual(32, depth=3, activation="channel"),
    "residual_spatial": lambda: Residual(32, depth=1, activation="spatial", variant="port"),
    "spatial_transformer": lambda: SpatialTransformer(32),
    "dual_similar": lambda: Dual(32, position=False, favours="similar"),
    **{
        f"{mode}-{sub}-{norm}": lambda mode=mode, sub=sub, norm=norm: NonLocal(32, mode=mode, sub_sample=sub, norm=norm)
        for mode in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
        for sub, norm in (("none", "batch"), ("after", "group"), ("before", "none"))
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_start_as_the_identity(name: str) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 32, 5, 7), torch.zeros(2, 5, 7, dtype=torch.bool)
    torch.testing.assert_close(BLOCKS[name]().train()(x, mask), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_changes_nothing_and_alone_equals_batched(name: str) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name]().double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    small, padded = torch.randn(1, 32, 3, 5).double(), torch.randn(2, 32, 7, 11).double()
    padded[:1, :, :3, :5] = small
    mask = torch.zeros(2, 7, 11, dtype=torch.bool)
    mask[0, 3:], mask[0, :, 5:] = True, True
    alone = block(small, mask[:1, :3, :5])
    assert not torch.allclose(alone, small, atol=1e-3)
    together = block(padded, mask)
    torch.testing.assert_close(together[:1, :, :3, :5], alone, atol=1e-9, rtol=0)
    other = block(torch.where(mask[:, None], 1e3, padded), mask)
    valid = (~mask)[:, None].expand_as(other)
    torch.testing.assert_close(other[valid], together[valid], atol=1e-9, rtol=0)
    assert other.isfinite().all()


def test_mean_of_reinforce_over_all_masks_is_the_exact_policy_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block, x = Hard(3).double().train(), torch.randn(1, 3, 2, 2).double()
    nn.init.normal_(block.score.weight)
    mask, costs = torch.zeros(1, 2, 2, dtype=torch.bool), torch.randn(16).double()
    choices = [torch.tensor(c).double().view(1, 2, 2) for c in itertools.product((0.0, 1.0), repeat=4)]

    logits = block.score(x)[:, 0]
    chances = torch.stack([torch.where(c > 0, logits.sigmoid(), (-logits).sigmoid()).prod() for c in choices])
    exact = torch.autograd.grad((chances * costs).sum(), block.score.weight)[0]

    mean = torch.zeros_like(exact)
    for choice, chance, cost in zip(choices, chances.detach(), costs, strict=True):
        monkeypatch.setattr(torch, "bernoulli", lambda p, choice=choice: choice)
        again = copy.deepcopy(block)  # with the same baseline, which each call moves
        torch.testing.assert_close(again(x, mask), x * choice[:, None])
        mean += chance * torch.autograd.grad(again.policy_loss(cost[None]), again.score.weight)[0]
    torch.testing.assert_close(mean, exact, atol=1e-12, rtol=0)


def test_hard_attention_tosses_in_training_and_decides_in_evaluation() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, 8, 16, 16), torch.zeros(4, 16, 16, dtype=torch.bool)
    for estimator in ("reinforce", "gumbel"):
        block = Hard(8, estimator=estimator, keep=0.9)
        kept = (block.train()(x, mask) != 0).float().mean().item()
        assert kept == pytest.approx(0.9, abs=0.05)
        assert torch.equal(block.eval()(x, mask), x)
    block = Hard(8, estimator="gumbel").train()
    block(x, mask).square().sum().backward()
    assert block.score.weight.grad.abs().sum() > 0 and block.policy_loss(torch.ones(4)) == 0


def test_baseline_learns_the_reward_and_steadies_the_policy() -> None:
    torch.manual_seed(0)
    block, x = Hard(8).train(), torch.randn(4, 8, 5, 5)
    mask = torch.zeros(4, 5, 5, dtype=torch.bool)
    optimizer = torch.optim.Adam(block.baseline.parameters(), lr=0.1)
    for _ in range(200):
        block(x, mask)
        optimizer.zero_grad()
        block.policy_loss(torch.full((4,), 3.0)).backward()
        optimizer.step()
    block(x, mask)
    torch.testing.assert_close(block._policy[1] + block.average, torch.full((4,), -3.0), atol=0.05, rtol=0)


def test_warp_equals_the_published_spatial_transformer(shared: Path) -> None:
    case = load(shared, "stn")["tutorial_ac0"]
    x, state = case["input"]["x"], case["state_dict"]
    features = x
    for layer in ("localization.0", "localization.3"):
        features = F.conv2d(features, state[f"{layer}.weight"], state[f"{layer}.bias"])
        features = F.max_pool2d(features, 2).relu()
    hidden = F.linear(features.flatten(1), state["fc_loc.0.weight"], state["fc_loc.0.bias"]).relu()
    theta = F.linear(hidden, state["fc_loc.2.weight"], state["fc_loc.2.bias"]).view(-1, 2, 3)
    close(warp(x, theta, torch.zeros(len(x), *x.shape[2:], dtype=torch.bool)), case["output"])


def test_features_return_to_their_boxes() -> None:
    """Under the transform an object is where the inverse maps its box; back again, it is in its box."""
    theta = torch.tensor([[[1.2, 0.3, 0.1], [-0.2, 0.9, -0.15]]]).double()
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[:, 50:], mask[:, :, 70:] = True, True
    x = torch.zeros(1, 1, 60, 80).double()
    x[..., 20:26, 30:40] = 1.0  # the box: centre (35, 23) of 70 x 50

    def centre(map_: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
        return torch.stack([(map_[0, 0] * axis).sum() / map_.sum() for axis in (columns, rows)])

    seen = warp(x, theta, mask)
    place = torch.tensor([35 / 70 * 2 - 1, 23 / 50 * 2 - 1, 1.0]).double()
    expected = (inverse(theta)[0] @ place + 1) / 2 * torch.tensor([70.0, 50.0])
    torch.testing.assert_close(centre(seen), expected, atol=0.1, rtol=0)
    assert (centre(seen) - torch.tensor([35.0, 23.0])).abs().max() > 2
    torch.testing.assert_close(
        centre(warp(seen, inverse(theta), mask)), torch.tensor([35.0, 23.0]).double(), atol=0.1, rtol=0
    )
