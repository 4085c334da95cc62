"""Attention blocks against the published implementations' fixtures: outputs and all gradients, in float64.

Squeeze-and-excitation inside residual blocks is in test_placement.py. Left out, as no block here is like them:
hard_ram's `retina` and `ram_T3`, a recurrent model that moves a crop over the image, where HardAttention keeps positions of a map;
the straight-through gradient of `categorical_hard`, one choice of six, where HardAttention tosses a coin for each position (two
choices are compared with torch's); ran's `preact_unit_8_16_s2`, a unit that halves the map, where ResidualAttention keeps its size.
"""

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

from detr.models.attention import CrissCrossAttention, HardAttention, NonLocal, ResidualAttention, SqueezeExcitation
from detr.models.attention.dual import ChannelAttention, PositionAttention
from detr.models.attention.residual import Unit, activate
from detr.models.attention.spatial_transformer import inverse, warp
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.multihead import MultiHeadAttention
from detr.models.layers.transformer import EncoderLayer
from detr.models.values import Memory, Queries

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
        return ResidualAttention(config["in_channels"], depth=depth, variant=config["variant"], identity_start=False)
    if block == "ccnet":
        return CrissCrossAttention(config["in_dim"], recurrence=config["R"])
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
    mask = no_mask(x)
    parameters = dict(module.named_parameters())
    mine = {name: parameters[ours(block, name, depth)] for name in case["grad_params"] if name not in unused}
    compare(case, module(x, mask), {"x": x}, mine)
    buffers = dict(module.named_buffers())
    for name, expected in case["buffers_after"].items():
        close(buffers[ours(block, name, depth)].double(), expected.double())


def compare(
    case: Mapping[str, Any], output: Tensor, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """Output and gradients; parameters by their names in the fixture, with the same entries in any shape."""
    (output * case["weight"]).sum().backward()
    close(output, case["output"])
    for name, x in inputs.items():
        close(x.grad, case["grad_input"][name])
    # Some gradients are zero but for rounding: the bias of keys before a softmax.
    largest = max((float(gradient.abs().max()) for gradient in case["grad_params"].values()), default=0.0)
    for name, parameter in parameters.items():
        expected = case["grad_params"][name].view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-9 * largest, rtol=0, msg=name)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9 * float(expected.detach().abs().max()), rtol=0)


def no_mask(x: Tensor) -> Tensor:
    return torch.zeros(len(x), *x.shape[2:], dtype=torch.bool)


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
    close(activate(x, no_mask(x), activation), case["output"])


def test_weights_of_non_local_attention(shared: Path) -> None:
    """The map of all pairs, which the block itself never makes."""
    cases = {name: case for name, case in load(shared, "nonlocal").items() if "_ss0_" in name}
    assert len(cases) == 12
    for case in cases.values():
        block = build("nonlocal", case).double().train(case["training"])
        state = {ours("nonlocal", name): tensor for name, tensor in case["state_dict"].items()}
        own = block.state_dict()
        block.load_state_dict({name: tensor.view_as(own[name]) for name, tensor in state.items()})
        x = case["input"]["x"]
        for token in (0, 17, 41):
            weights = block.view(x, no_mask(x), torch.full((len(x),), token)).values.detach()
            close(weights.flatten(1), case["nl_map"][:, token])


def test_head_of_dual_attention(shared: Path) -> None:
    """The published segmentation head: each attention between two convolutions, and classifiers of both and of all."""
    case = load(shared, "danet")["head_32_5"]

    def convolution(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def classifier() -> nn.Module:
        return nn.Sequential(nn.Identity(), nn.Conv2d(8, 5, 1))  # in place of dropout

    parts: dict[str, nn.Module] = {"sa": PositionAttention(8), "sc": ChannelAttention()}
    parts |= {"conv5a": convolution(32), "conv5c": convolution(32), "conv51": convolution(8), "conv52": convolution(8)}
    parts |= {name: classifier() for name in ("conv6", "conv7", "conv8")}
    head = nn.ModuleDict(parts).double().eval()
    head.load_state_dict({ours("danet", name): tensor for name, tensor in case["state_dict"].items()})
    x = case["input"]["x"].clone().requires_grad_()
    position = head["conv51"](head["sa"](head["conv5a"](x), no_mask(x)))
    channel = head["conv52"](head["sc"](head["conv5c"](x), no_mask(x)))
    outputs = head["conv8"](position + channel), head["conv6"](position), head["conv7"](channel)
    parameters = dict(head.named_parameters())
    mine = {name: parameters[ours("danet", name)] for name in case["grad_params"]}
    compare(case, torch.stack(outputs), {"x": x}, mine)


def of_transformer(name: str) -> str:
    name = name.replace("multihead_attn", "cross_attn").replace("in_proj_", "in_proj.")
    return re.sub(r"(?<=\.)linear|^linear", "ffn.linear", name)


@pytest.mark.parametrize("name", ["mhsa", "encoder_layer_pre0", "encoder_layer_pre1"])
def test_attention_and_encoder_layer_of_the_published_transformer(shared: Path, name: str) -> None:
    case = load(shared, "detr_transformer")[name]
    config, mask = case["config"], case["input"]["mask"]
    model = TransformerEncoder(
        position=nn.Identity(),
        d_model=config["d"],
        nhead=config["heads"],
        num_layers=1,
        dim_feedforward=config.get("ff", 1),
        dropout=0.0,
        norm_first=config.get("pre_norm", False),
    )
    layer = model.layers[0]
    module: EncoderLayer | MultiHeadAttention = (layer.self_attn if name == "mhsa" else layer).double()
    module.load_state_dict({of_transformer(name): tensor for name, tensor in case["state_dict"].items()})
    leaves = {name: case["input"][name].clone().requires_grad_() for name in ("x", "pos")}  # (tokens, batch, d_model)
    x, position = (leaf.transpose(0, 1).unflatten(1, mask.shape[1:]).permute(0, 3, 1, 2) for leaf in leaves.values())
    output = module(Memory.from_maps([x], [position], [mask], padded=True))
    parameters = dict(module.named_parameters())
    mine = {name: parameters[of_transformer(name)] for name in case["grad_params"]}
    compare(case, output.transpose(0, 1), leaves, mine)


class Given(nn.Module):
    """Positional encodings of the fixture."""

    def __init__(self, encoding: Tensor) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, mask: Tensor) -> Tensor:
        return self.encoding


@pytest.mark.parametrize("name", ["transformer_pre0", "transformer_pre1"])
def test_published_transformer(shared: Path, name: str) -> None:
    case = load(shared, "detr_transformer")[name]
    config, mask = case["config"], case["input"]["mask"]
    options = {
        "d_model": config["d"],
        "nhead": config["heads"],
        "dim_feedforward": config["ff"],
        "dropout": 0.0,
        "norm_first": config["pre_norm"],
    }
    leaves = {name: case["input"][name].clone().requires_grad_() for name in ("x", "pos", "q")}
    encoder = TransformerEncoder(position=Given(leaves["pos"]), num_layers=config["enc"], **options)
    model = nn.ModuleDict(
        {"encoder": encoder, "decoder": TransformerDecoder(num_layers=config["dec"], **options)}
    ).double()
    model.load_state_dict({of_transformer(name): tensor for name, tensor in case["state_dict"].items()})
    memory = encoder([leaves["x"]], [mask])
    position = leaves["q"].expand(len(mask), -1, -1)
    queries = Queries(content=torch.zeros_like(position), anchors=None, position=lambda anchors: position)
    output, _ = model["decoder"](queries, memory)
    parameters = dict(model.named_parameters())
    mine = {name: parameters[of_transformer(name)] for name in case["grad_params"]}
    compare(case, output, leaves, mine)


def test_mean_of_reinforce_over_all_masks_is_the_exact_policy_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block, x = HardAttention(3, weight=1.0).double().train(), torch.randn(1, 3, 2, 2).double()
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


def test_policy_gradient_of_a_categorical_choice(shared: Path) -> None:
    """REINFORCE with the fixture's rewards, baseline and choices of one out of six, each with its probability."""
    case = load(shared, "hard_ram")["categorical_hard"]
    logits = case["input"]["logits"].clone().requires_grad_()
    images, choices = logits.shape
    mean = torch.zeros_like(logits)
    for choice in range(choices):
        block = HardAttention(3, weight=1.0)
        block._policy = logits.log_softmax(1)[:, choice], case["input"]["baseline"]
        loss = block.policy_loss(-case["input"]["reward"][:, choice])
        mean += images * logits.detach().softmax(1)[:, choice, None] * torch.autograd.grad(loss, logits)[0]
    close(-mean, case["exact_policy_grad"])


def test_straight_through_gradient_equals_torch_gumbel_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coin is a choice of two, whose noises differ by what the coin draws."""
    block, x = HardAttention(3, estimator="gumbel", temperature=0.7).double().train(), torch.randn(2, 3, 5, 7).double()
    nn.init.normal_(block.score.weight)
    logits = torch.cat((block.score(x), torch.zeros(2, 1, 5, 7)), dim=1)
    torch.manual_seed(0)
    noise = -torch.empty_like(logits).exponential_().log()
    torch.manual_seed(0)
    kept = F.gumbel_softmax(logits, tau=0.7, hard=True, dim=1)[:, :1]
    monkeypatch.setattr(torch, "rand_like", lambda x: (noise[:, 0] - noise[:, 1]).sigmoid())
    output, weight = block(x, no_mask(x)), torch.randn_like(x)
    close(output, x * kept)
    found, expected = (torch.autograd.grad((o * weight).sum(), block.score.weight) for o in (output, x * kept))
    close(found[0], expected[0])


def test_hard_attention_tosses_in_training_and_decides_in_evaluation() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, 8, 16, 16), torch.zeros(4, 16, 16, dtype=torch.bool)
    for estimator in ("reinforce", "gumbel"):
        block = HardAttention(8, estimator=estimator, keep=0.9)
        kept = (block.train()(x, mask) != 0).float().mean().item()
        assert kept == pytest.approx(0.9, abs=0.05)
        assert torch.equal(block.eval()(x, mask), x)
    block = HardAttention(8, estimator="gumbel").train()
    block(x, mask).square().sum().backward()
    assert block.score.weight.grad.abs().sum() > 0 and block.policy_loss(torch.ones(4)) == 0


def test_baseline_learns_the_reward_and_steadies_the_policy() -> None:
    torch.manual_seed(0)
    block, x = HardAttention(8).train(), torch.randn(4, 8, 5, 5)
    mask = torch.zeros(4, 5, 5, dtype=torch.bool)
    optimizer = torch.optim.Adam(block.baseline.parameters(), lr=0.1)
    for _ in range(200):
        block(x, mask)
        optimizer.zero_grad()
        block.policy_loss(torch.full((4,), 3.0)).backward()
        optimizer.step()
    block(x, mask)
    torch.testing.assert_close(block._policy[1] + block.average, torch.full((4,), -3.0), atol=0.05, rtol=0)


def of_centers(height: int, width: int) -> Tensor:
    """x and y of the outermost cells' centers, (2, 1), where 1 is the edge of the map, as it is for `warp`.

    With align_corners=True the centers are at 1, so that places have to be scaled by this.
    """
    return 1 - 1 / torch.tensor([[width], [height]]).double()


@pytest.mark.parametrize("align_corners", [False, True])
def test_warp_equals_the_published_spatial_transformer(shared: Path, align_corners: bool) -> None:
    case = load(shared, "stn")[f"tutorial_ac{int(align_corners)}"]
    x = case["input"]["x"].clone().requires_grad_()
    state = {name: tensor.clone().requires_grad_() for name, tensor in case["state_dict"].items()}
    features = x
    for layer in ("localization.0", "localization.3"):
        features = F.conv2d(features, state[f"{layer}.weight"], state[f"{layer}.bias"])
        features = F.max_pool2d(features, 2).relu()
    hidden = F.linear(features.flatten(1), state["fc_loc.0.weight"], state["fc_loc.0.bias"]).relu()
    theta = F.linear(hidden, state["fc_loc.2.weight"], state["fc_loc.2.bias"]).view(-1, 2, 3)
    if align_corners:
        scale = of_centers(*x.shape[2:])
        theta = scale * torch.cat((theta[..., :2] / scale.T, theta[..., 2:]), dim=-1)
    compare(case, warp(x, theta, no_mask(x)), {"x": x}, state)


@pytest.mark.parametrize("name", ["fxia22_identity", "fxia22_random"])
def test_warp_equals_the_first_port_of_the_spatial_transformer(shared: Path, name: str) -> None:
    """Its maps are channels last, its places (y, x), and its grid starts at -1 and ends one cell before 1."""
    case = load(shared, "stn")[name]
    x, given = (case["input"][name].clone().requires_grad_() for name in ("x", "theta"))
    batch, height, width, _ = x.shape
    theta = given.flip(1)[..., [1, 0, 2]]
    matrix, shift = theta[..., :2], theta[..., 2:]
    start = 1 / torch.tensor([[width], [height]]).double()  # from the edge to the center of the first cell
    theta = of_centers(height, width) * torch.cat((matrix, shift - matrix @ start), dim=-1)
    output = warp(x.permute(0, 3, 1, 2), theta, torch.zeros(batch, height, width, dtype=torch.bool))
    output = output.permute(0, 2, 3, 1)
    (output * case["weight"]).sum().backward()
    close(output, case["output"])
    close(x.grad, case["grad_input"]["x"])
    if name == "fxia22_identity":
        return  # places are where bilinear interpolation bends: it has a slope to each side there
    rows, columns = (torch.arange(size).double() * 2 / size - 1 for size in (height, width))
    places = torch.stack((*torch.meshgrid(rows, columns, indexing="ij"), torch.ones(height, width)), dim=-1)
    close(given.grad, torch.einsum("bhwi,hwj->bij", case["grad_input"]["grid"], places))


def test_features_return_to_their_boxes() -> None:
    """Under the transform an object is where the inverse maps its box; back again, it is in its box."""
    theta = torch.tensor([[[1.2, 0.3, 0.1], [-0.2, 0.9, -0.15]]]).double()
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[:, 50:], mask[:, :, 70:] = True, True
    x = torch.zeros(1, 1, 60, 80).double()
    x[..., 20:26, 30:40] = 1.0  # the box: center (35, 23) of 70 x 50

    def center(map_: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
        return torch.stack([(map_[0, 0] * axis).sum() / map_.sum() for axis in (columns, rows)])

    seen = warp(x, theta, mask)
    place = torch.tensor([35 / 70 * 2 - 1, 23 / 50 * 2 - 1, 1.0]).double()
    expected = (inverse(theta)[0] @ place + 1) / 2 * torch.tensor([70.0, 50.0])
    torch.testing.assert_close(center(seen), expected, atol=0.1, rtol=0)
    assert (center(seen) - torch.tensor([35.0, 23.0])).abs().max() > 2
    torch.testing.assert_close(
        center(warp(seen, inverse(theta), mask)), torch.tensor([35.0, 23.0]).double(), atol=0.1, rtol=0
    )
