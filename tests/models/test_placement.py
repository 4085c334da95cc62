"""Attention blocks in their places: inside residual blocks, after stages, at the neck; with all recipes and weights."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detr import Detector
from detr.config import build_block, build_criterion, build_model, compose
from detr.engine.optim import adamw
from detr.errors import UserError
from detr.models.added import added_to
from detr.models.attention import (
    Blocks,
    CrissCrossAttention,
    HardAttention,
    NonLocal,
    Placement,
    SqueezeExcitation,
)
from detr.models.attention.placement import blocks_for
from detr.models.backbones.resnet import ResNet, run_with_attention
from detr.types import Category
from detr.weights import load_weights, read_checkpoint, save, to_published
from tests.helpers import make_batch, random_targets
from tests.helpers.commands import REPOSITORY, TINY_MODEL

KINDS = ("se", "non_local", "criss_cross", "dual", "residual", "spatial_transformer", "hard", "self_attention")
RECIPES = ("detr", "conditional_detr", "dab_detr", "dn_detr", "deformable_detr", "dino", "small")
IMAGES = [torch.randn(3, 64, 96), torch.randn(3, 96, 64)]


def model_config(*overrides: str) -> Any:
    return compose([*TINY_MODEL, *overrides]).model


def residual_block(case: dict[str, Any], state: dict[str, torch.Tensor]) -> BasicBlock | Bottleneck:
    config, kind = case["config"], BasicBlock if case["name"].startswith("sebasic") else Bottleneck
    stride, out = config.get("stride", 1), config["planes"] * kind.expansion
    downsample = None
    if any(name.startswith("downsample") for name in state):
        downsample = nn.Sequential(
            nn.Conv2d(config["inplanes"], out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
        )
    return kind(config["inplanes"], config["planes"], stride, downsample)


def test_squeeze_and_excitation_in_residual_blocks(shared: Path) -> None:
    """The published blocks, and the four placements by their formulas."""
    content = torch.load(shared / "fixtures" / "attention" / "se.pt", weights_only=True)
    cases = [case for case in content["cases"] if not case["name"].startswith("selayer")]
    assert len(cases) == 10
    for case in cases:
        where = case["name"].partition("placement_")[2] or "standard"
        state = {name.removeprefix("block."): tensor for name, tensor in case["state_dict"].items()}
        block = residual_block(case, state)
        gates = {name: Blocks() for name in ("pre", "standard", "identity", "post")}
        channels = block.bn1.num_features * block.expansion
        gates[where] = Blocks(
            {"se": SqueezeExcitation(channels, reduction=case["config"]["reduction"], identity_start=False)}
        )
        block.attention = nn.ModuleDict(gates)
        block = block.double().train(case["training"])

        def ours(name: str, where: str = where) -> str:
            if not name.startswith("se."):
                return name.removeprefix("block.")
            return f"attention.{where}.{name}".replace("fc.0", "squeeze").replace("fc.2", "excite")

        block.load_state_dict({ours(name): tensor for name, tensor in state.items()})
        x = case["input"]["x"].clone().requires_grad_()
        output = run_with_attention(block, x, torch.zeros(len(x), *x.shape[2:], dtype=torch.bool))
        (output * case["weight"]).sum().backward()
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        expected = {"output": case["output"], "x": case["grad_input"], **case["grad_params"]}
        expected["x"] = expected["x"]["x"] if isinstance(expected["x"], dict) else expected["x"]
        for name, value in expected.items():
            found = {"output": output, "x": x.grad}.get(name)
            found = gradients[ours(name)] if found is None else found
            torch.testing.assert_close(
                found, value, atol=1e-9 * float(value.abs().max()), rtol=0, msg=f"{case['name']} {name}"
            )


def test_blocks_go_where_they_are_put() -> None:
    backbone = ResNet(name="resnet18", norm="batch", freeze=[], features=["layer2", "layer3"])
    backbone.plug(
        {
            "se": Placement(block=SqueezeExcitation, stages=["backbone"], where="standard"),
            "first": Placement(block=CrissCrossAttention, stages=["layer2"], where="pre"),
            "second": Placement(block=CrissCrossAttention, stages=["layer2", "layer3"]),
            "other": Placement(block=NonLocal, stages=["layer3"]),
        }
    )
    places = {name: list(blocks) for name, blocks in backbone.named_modules() if isinstance(blocks, Blocks) and blocks}
    inside = {f"body.layer{stage}.{index}.attention.standard": ["se"] for stage in (1, 2, 3) for index in (0, 1)}
    pre = {f"body.layer2.{index}.attention.pre": ["first"] for index in (0, 1)}
    assert places == {**inside, **pre, "attention.layer2": ["second"], "attention.layer3": ["second", "other"]}
    channels = [backbone.body.layer2[index].attention["pre"]["first"].value.in_channels for index in (0, 1)]
    assert channels == [64, 128]


def test_neck_gets_a_block_for_every_map() -> None:
    options = ["model=deformable_detr", "model/attention=[criss_cross,se]", "model.attention.se.stages=[neck]",
               "model.attention.se.where=after"]  # fmt: skip
    model = build_model(model_config(*options), num_classes=3)
    assert [list(blocks) for blocks in model.attention] == [["criss_cross", "se"]] * 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_block_trains_in_every_recipe(recipe: str) -> None:
    torch.manual_seed(0)
    config = compose([f"model={recipe}", *TINY_MODEL, f"model/attention=[{','.join(KINDS)}]"])
    model = build_model(config.model, num_classes=5).train()
    criterion = build_criterion(config.criterion, num_classes=5)
    targets = random_targets([3, 0], num_classes=5)
    predictions = model(make_batch(IMAGES), targets)
    policies = [block for blocks in added_to(model) for block in blocks.values() if isinstance(block, HardAttention)]
    cost = criterion.per_image(predictions, targets)
    loss = criterion(predictions, targets)["loss"] + sum(block.policy_loss(cost) for block in policies)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None and ".attention." in f".{name}"]
    assert not missing


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ("se", "dual") else pytest.mark.slow) for k in KINDS]
)
def test_published_weights_give_the_same_with_a_block(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    categories = [Category(id=index, name=str(index)) for index in range(5)]
    plain = build_model(model_config(), num_classes=5).eval()
    torch.save({"model": to_published(plain.state_dict())}, tmp_path / "published.pth")
    for stages in (["neck"], ["layer1", "layer2", "layer3", "layer4"]):
        places = [f"model.attention.{kind}.stages=[{','.join(stages)}]", f"model.attention.{kind}.where=after"]
        model = build_model(model_config(f"model/attention={kind}", *places), num_classes=5).eval()
        report = load_weights(model, tmp_path / "published.pth", categories)
        assert set(report.fresh.values()) == {"not in the file"}
        expected, found = (each(make_batch(IMAGES)) for each in (plain, model))
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-5, rtol=0)


def test_blocks_keep_their_weights_from_our_own_checkpoints(tmp_path: Path) -> None:
    model = build_model(model_config("model/attention=se"), num_classes=5)
    nn.init.normal_(model.backbone.body.layer1[0].attention["standard"]["se"].excite.weight)
    save(
        tmp_path / "last.pt",
        {"model": model.state_dict(), "categories": [], "training": {}, "config": {"data": {}, "model": {}}},
    )
    other = build_model(model_config("model/attention=[se,criss_cross]"), num_classes=5)
    report = load_weights(other, tmp_path / "last.pt", [])
    assert all("criss_cross" in name or "class_head" in name for name in report.fresh)
    torch.testing.assert_close(other.state_dict()["backbone.body.layer1.0.attention.standard.se.excite.weight"],
                               model.state_dict()["backbone.body.layer1.0.attention.standard.se.excite.weight"])  # fmt: skip


def test_new_blocks_train_at_the_main_rate_even_in_frozen_stages() -> None:
    options = ["model.backbone.norm=frozen", "model.backbone.freeze=[stem,layer1]"]
    model = build_model(
        model_config("model/attention=[se,non_local]", "model.attention.non_local.stages=[layer1]", *options), 5
    )
    optimizer = adamw(model, lr=1e-3, backbone_lr=1e-5, lr_factors={".se.": 0.1})
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if ".se." in name:
            assert groups[id(parameter)]["lr"] == pytest.approx(1e-4), name
        elif "attention.layer1" in name:
            assert groups[id(parameter)]["lr"] == 1e-3, name
        elif name.startswith("backbone.body.layer1"):
            assert id(parameter) not in groups, name
    model.train()
    assert model.backbone.attention["layer1"]["non_local"].norm.training
    assert not model.backbone.body.layer1.training

    model.backbone.freeze()
    trains = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trains and all("attention" in name for name in trains)


@pytest.mark.parametrize(
    "options, message",
    [
        (["model/attention=se", "model=small", "model.attention.se.stages=[layer3]"],
         r"model\.attention\.se\.stages: layer3 is not built.*Choose some of layer1, layer2, backbone and neck"),
        (["model/attention=se", "model.attention.se.stages=[neck]"], r"where=standard is in residual blocks.*neck has none"),
        (["model/attention=dual", "model.attention.dual.stages=[layer5]"], r"stages: layer5 is no stage of the backbone\. Choose some of layer1,"),
        (["model/attention=dual", "model.attention.dual.stages=[]"], r"dual: wanted stages of the backbone, backbone or neck, got none"),
        (["model/attention=dual", "model.attention.dual.where=before"], r"model\.attention\.dual\.where: wanted .*got 'before'"),
        (["model/attention=dual", "+model.attention.dual.block.reductoin=4"], r"dual\.block\.reductoin is not an option.*Did you mean reduction"),
    ],
)  # fmt: skip
def test_impossible_places_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(compose(["model.backbone.weights=null", *options]).model, num_classes=3)


def test_one_block_alone_from_the_configuration() -> None:
    config = compose(["model/attention=criss_cross", "model.attention.criss_cross.block.recurrence=3"])
    block = build_block(config, "criss_cross", 16)
    assert isinstance(block, CrissCrossAttention) and block.recurrence == 3 and block.value.in_channels == 16
    with pytest.raises(UserError, match=r"no block 'se', only: criss_cross\. .*model/attention=se"):
        build_block(config, "se", 16)


def test_cost_of_each_image_is_its_loss_alone() -> None:
    torch.manual_seed(0)
    config = compose([*TINY_MODEL, "model=dino", "model.aux_loss=true"])
    model = build_model(config.model, num_classes=5).train()
    criterion = build_criterion(config.criterion, num_classes=5)
    targets = random_targets([3, 0, 7], num_classes=5)
    predictions = model(make_batch([*IMAGES, torch.randn(3, 64, 64)]), targets)
    cost = criterion.per_image(predictions, targets)
    for index, target in enumerate(targets):
        alone = type(predictions)(
            logits=predictions.logits[-1:, index : index + 1], boxes=predictions.boxes[-1:, index : index + 1]
        )
        torch.testing.assert_close(cost[index], criterion(alone, [target])["loss"].detach())


def test_every_placement_can_be_swept_by_name() -> None:
    text = (Path(__file__).parents[2] / "configs" / "experiment" / "attention_sweep.yaml").read_text()
    swept = re.search(r"model/attention=(\S+)", text)[1].split(",")
    assert swept == ["none", *KINDS]


def test_a_block_of_ones_own_as_documented(tiny_options: list[str], tmp_path: Path) -> None:
    """From a folder outside of the checkout, by the very lines of docs/attention.md."""
    text = (REPOSITORY / "docs" / "attention.md").read_text()
    (code,) = re.findall(r"```python\n(# my_blocks\.py\n.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"```bash\nPYTHONPATH=\. python PATH/train\.py (.*?)```", text, re.DOTALL)
    (tmp_path / "my_blocks.py").write_text(code)
    options = [*command.replace("\\\n", " ").split(), *tiny_options, "run_dir=run", "trainer.max_steps=2"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *options]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    weights = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").state
    assert weights["backbone.attention.layer2.custom.conv.weight"].shape == (128, 1, 3, 3)
    with pytest.raises(UserError, match=r"my_blocks\.Mine' is refused.*allow_targets"):
        Detector.from_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")


def test_an_error_in_a_block_of_ones_own_is_shown_with_its_traceback(tiny_options: list[str], tmp_path: Path) -> None:
    code = "from torch import nn\nclass Fails(nn.Conv2d):\n    def __init__(self, channels): super().__init__(channels, 8, 1)\n"
    code += "    def forward(self, x, mask): return super().forward(x) + [][x.ndim]\n"
    (tmp_path / "my_blocks.py").write_text(code)
    own = ["model/attention=custom", "model.attention.custom.block._target_=my_blocks.Fails"]
    command = [sys.executable, "train.py", *tiny_options, *own, "allow_targets=[my_blocks]", f"run_dir={tmp_path}/run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "IndexError: list index out of range" in done.stderr, done.stderr
    assert "terminate called" not in done.stderr


class Halves(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels // 2, kernel_size=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)


class WithoutMask(Halves):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class WithMore(Halves):
    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels)


@pytest.mark.parametrize("kind, message", [(WithoutMask, "too many positional arguments"), (WithMore, "'size'")])
def test_a_block_of_ones_own_that_does_not_fit_is_named(kind: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.attention\.mine\.block, for 8 channels: .*{message}"):
        blocks_for({"mine": Placement(block=kind, stages=["neck"])}, "neck", "after", 8)


def test_a_block_of_ones_own_that_changes_the_shape_is_named() -> None:
    blocks = blocks_for({"mine": Placement(block=Halves, stages=["neck"])}, "neck", "after", 8)
    with pytest.raises(UserError, match=r"model\.attention\.mine: its block made \(2, 4, 3, 5\) of .* \(2, 8, 3, 5\)"):
        blocks(torch.randn(2, 8, 3, 5), torch.zeros(2, 3, 5, dtype=torch.bool))
