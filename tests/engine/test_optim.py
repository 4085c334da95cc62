"""Parameter groups and schedules."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from detr.engine.optim import Cosine, FlatCosine, StepDecay, adamw
from detr.errors import UserError
from detr.models.attention import Placement, SqueezeExcitation
from detr.models.backbones.base import Backbone
from detr.models.backbones.resnet import ResNet
from detr.models.detr import DETR

ODD = [math.nan, math.inf]


def test_groups_partition_the_trainable_parameters(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr()
    groups = {group["name"]: group for group in adamw(model, lr=1e-3, backbone_lr=1e-5).param_groups}
    assert groups["lr"]["lr"] == 1e-3 and groups["lr_backbone"]["lr"] == 1e-5
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert {id(p) for p in groups["lr_backbone"]["params"]} == {id(p) for p in model.backbone.parameters()}


def test_what_does_not_train_is_in_no_group(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr()
    model.backbone = ResNet(name="resnet18", norm="batch", freeze=[])
    assert [group["name"] for group in adamw(model, backbone_lr=0.0).param_groups] == ["lr_backbone", "lr"]
    assert all(p.requires_grad for p in model.parameters())
    model.backbone.freeze()
    assert [group["name"] for group in adamw(model).param_groups] == ["lr"]


def test_step_decay_is_the_published_schedule() -> None:
    steps_per_epoch, schedule = 7, StepDecay(drops=[0.66666666667])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, step_size=200)
    for epoch in range(300):
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            assert schedule(step, 300 * steps_per_epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_cosine_and_warmup() -> None:
    schedule = Cosine(final=0.1, warmup=0.2)
    assert [schedule(step, 100) for step in (0, 9, 19)] == pytest.approx([1 / 20, 10 / 20, 1.0])
    assert schedule(60, 100) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule(100, 100) == pytest.approx(0.1)
    rates = [StepDecay(drops=[0.5], warmup=0.1)(step, 100) for step in (0, 4, 9, 49, 50)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.1])


def test_warmup_in_steps() -> None:
    for total in (100, 1000):
        rates = [StepDecay(drops=[], warmup_steps=4)(step, total) for step in (0, 1, 3, 4, 99)]
        assert rates == pytest.approx([0.25, 0.5, 1, 1, 1])
        assert Cosine(warmup_steps=4)(4, total) == 1
    with pytest.raises(UserError, match="warmup_steps: wanted at least 1, got 0"):
        Cosine(warmup_steps=0)


@pytest.mark.parametrize("epochs, flat, plain", [(132, 64, 12), (102, 49, 12), (58, 29, 8), (120, 64, 3), (60, 34, 2)])
def test_flat_cosine_is_the_published_schedule(epochs: int, flat: int, plain: int) -> None:
    """DEIM's, in epochs: a quadratic rise over 2000 steps; then 1; from `flat` to the last `plain` ones down to 0.5."""
    fractions = {"flat": round(flat / epochs, 11), "until": round((epochs - plain) / epochs, 11)}
    schedule = FlatCosine(**fractions, final=0.5, warmup_steps=2000, warmup_power=2.0)
    for length in (924, 3697, 7393):  # steps of an epoch: COCO's in batches of 128, 32 and 16
        total = epochs * length

        def at(epoch: float, total: int = total, length: int = length) -> float:
            return schedule(round(epoch * length), total)

        assert [schedule(step, total) for step in (0, 499, 999, 1999)] == pytest.approx([0.25e-6, 1 / 16, 1 / 4, 1])
        assert at(3) == at(flat) == schedule(2000, total) == 1 and at(flat + 1) < 1
        middle, third = (flat + epochs - plain) / 2, flat + (epochs - plain - flat) / 3
        assert at(middle) == pytest.approx(0.75, abs=1e-4)
        assert at(third) == pytest.approx(0.5 + 0.5 * 0.75, abs=1e-4)  # cos(60 degrees) is a half
        assert schedule((epochs - plain) * length - 1, total) > 0.5
        assert at(epochs - plain) == at(epochs - 1) == schedule(total - 1, total) == 0.5


def test_flat_to_the_end_never_falls() -> None:
    schedule = FlatCosine(flat=1.0, final=0.1, warmup=0.1, warmup_power=2.0)
    assert [schedule(step, 100) for step in (0, 4, 9, 10, 50, 99)] == pytest.approx([0.01, 0.25, 1, 1, 1, 1])
    assert FlatCosine(flat=0.0)(50, 100) == pytest.approx(0.5), "linear, and all of the training is the cosine"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flat": 0.9, "until": 0.8}, r"flat: wanted at least 0 and at most until=0\.8, got 0\.9"),
        ({"flat": 64.0}, r"flat: wanted at least 0 and at most until=1\.0, got 64\.0"),
        ({"flat": 0.5, "until": 1.1}, r"until: wanted at least 0 and at most 1, got 1\.1"),
        ({"flat": 0.5, "final": -0.1}, r"final: wanted at least 0, got -0\.1"),
        ({"flat": 0.5, "warmup_power": 0.0}, r"warmup_power: wanted a number above 0, got 0\.0"),
        ({"flat": math.nan}, r"flat: wanted at least 0"),
        ({"flat": 0.5, "warmup_power": math.nan}, r"warmup_power: wanted a number above 0"),
    ],
)
def test_ranges_of_flat_cosine(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlatCosine(**options)


def test_null_leaves_out_a_rate_by_name(tiny_detr: Callable[..., DETR]) -> None:
    decays = {"no such name": None, "bias": None, "norm": 0.0}
    optimizer = adamw(tiny_detr(), weight_decay=0.1, weight_decays=decays)
    assert {group["name"] for group in optimizer.param_groups if group["weight_decay"] == 0} == {"lr_norm"}


def test_bad_fractions_are_named() -> None:
    with pytest.raises(UserError, match=r"fractions between 0 and 1, got \[200\.0\]"):
        StepDecay(drops=[200.0])
    with pytest.raises(UserError, match="fraction of the training"):
        Cosine(warmup=500.0)


def test_rates_of_their_own_by_name(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr()
    optimizer = adamw(model, lr=1e-3, backbone_lr=1e-5, lr_factors={"box_head": 0.1})
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["lr_box_head"]["lr"] == pytest.approx(1e-4) and groups["lr"]["lr"] == 1e-3
    assert {id(p) for p in groups["lr_box_head"]["params"]} == {id(p) for p in model.heads[0].box_head.parameters()}
    with pytest.raises(UserError, match=r"no parameter that trains has 'sampling_ofsets' in its name"):
        adamw(model, lr_factors={"sampling_ofsets": 0.1})


def rates(model: nn.Module, **options: object) -> dict[str, float]:
    """The rate of each parameter that trains, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = adamw(model, **options).param_groups  # type: ignore[arg-type]
    assert len({group["name"] for group in groups}) == len(groups)
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


class OfTimm(Backbone):
    """A model of timm without its classifier, as deep as timm says."""

    def __init__(self, body: nn.Module, layers: dict[str, int]) -> None:
        super().__init__()
        self.body, self.layers_of = body, layers
        self.channels, self.strides, self.stages = [8], [16], ()

    def depths(self) -> dict[str, int]:
        return {f"body.{name}": depth for name, depth in self.layers_of.items()}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_layer_decay_equals_that_of_timm(name: str, tiny_detr: Callable[..., DETR]) -> None:
    timm = pytest.importorskip("timm")
    body = timm.create_model(name, num_classes=0)
    groups = pytest.importorskip("timm.optim").param_groups_layer_decay(body, layer_decay=0.7)
    wanted = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(set(wanted.values())) > 10
    model = tiny_detr()
    model.backbone = OfTimm(body, timm.models.group_parameters(body, body.group_matcher(coarse=False), reverse=True))
    found = rates(model, lr=1.0, backbone_lr=0.1, layer_decay=0.7)
    for parameter_name, parameter in model.named_parameters():
        # timm counts from the classifier, which is not there.
        rate = 0.1 * wanted[id(parameter)] / max(wanted.values()) if id(parameter) in wanted else 1.0
        assert found[parameter_name] == pytest.approx(rate), parameter_name


def test_layer_decay_of_a_resnet(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr()
    model.backbone = ResNet(name="resnet18", norm="batch", freeze=["stem"], features=["layer3"])
    model.backbone.plug({"se": Placement(block=SqueezeExcitation, stages=["backbone"], where="standard")})
    table = {"layer1": 0.025, "layer2": 0.05, "layer3": 0.1}
    found = rates(model, lr=1.0, backbone_lr=0.1, layer_decay=0.5)
    for name, rate in found.items():
        of_block = ".attention." in name or not name.startswith("backbone.")
        assert rate == pytest.approx(1.0 if of_block else table[name.split(".")[2]]), name
    assert {rate for name, rate in found.items() if name.startswith("backbone.")} == {0.025, 0.05, 0.1, 1.0}
    groups = [group["name"] for group in adamw(model, layer_decay=0.5).param_groups]
    assert groups == ["lr_backbone_1", "lr", "lr_backbone_2", "lr_backbone_3"]
    assert [group["name"] for group in adamw(model, layer_decay=1.0).param_groups] == ["lr_backbone", "lr"]


def test_rates_of_a_stage(tiny_detr: Callable[..., DETR]) -> None:
    """By the names of stages, which a backbone's parameters need not have in theirs; without attention blocks."""
    model = tiny_detr()
    model.backbone = ResNet(name="resnet18", norm="batch", freeze=["layer1"])
    model.backbone.plug({"se": Placement(block=SqueezeExcitation, stages=["layer2"], where="standard")})
    stages = {"backbone.stem": 0.5, "backbone.layer2": 0.0}
    found = rates(model, lr=1.0, backbone_lr=0.1, lr_factors=stages)
    for name, rate in found.items():
        wanted = 1.0 if ".attention." in name or not name.startswith("backbone.") else 0.1
        if wanted == 0.1:
            wanted *= 0.5 if "body.conv1" in name or "body.bn1" in name else 0.0 if ".layer2." in name else 1.0
        assert rate == pytest.approx(wanted), name
    assert {0.05, 0.0, 0.1, 1.0} == set(found.values())
    for missing in ("backbone.layer1", "backbone.layer5"):  # frozen; not there
        with pytest.raises(UserError, match=rf"lr_factors: no parameter that trains has '{missing}' in its name"):
            adamw(model, lr_factors={missing: 0.1})


def test_weight_decay_of_their_own_by_name(tiny_detr: Callable[..., DETR]) -> None:
    model = tiny_detr()
    optimizer = adamw(model, weight_decay=0.3, weight_decays={"norm": 0.0, "bias": 0.1}, lr_factors={"bias": 2.0})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1 if "bias" in name else 0.3)
            assert group["lr"] == (1e-5 if "backbone" in name else 1e-4) * (2 if "bias" in name else 1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
    with pytest.raises(UserError, match=r"optimizer.weight_decays: no parameter that trains has 'nrom' in its name"):
        adamw(model, weight_decays={"nrom": 0.0})


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        *((name, value, "a learning rate of at least 0") for name in ("lr", "backbone_lr") for value in (-1.0, *ODD)),
        *(("layer_decay", value, "above 0 and at most 1") for value in (0.0, -0.5, 1.5, *ODD)),
        *(("weight_decay", value, "at least 0") for value in (-1.0, *ODD)),
        *(("lr_factors", {"backbone": value}, "numbers of at least 0") for value in (-1.0, *ODD)),
        *(("weight_decays", {"backbone": value}, "numbers of at least 0") for value in (-1.0, *ODD)),
        *(
            ("betas", value, "two numbers of at least 0 and below 1")
            for value in ([0.9], [2.0, 3.0], [], [0.9, 1.0], ODD)
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    option: str, value: object, wanted: str, tiny_detr: Callable[..., DETR]
) -> None:
    with pytest.raises(UserError, match=rf"^{option}: wanted {wanted}, got "):
        adamw(tiny_detr(), **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.1, *ODD])
def test_schedules_refuse_them_too(value: float) -> None:
    for make, name in ((StepDecay, "gamma"), (Cosine, "final")):
        options = {"drops": [0.5], name: value} if make is StepDecay else {name: value}
        with pytest.raises(UserError, match=rf"^{name}: wanted at least 0, got "):
            make(**options)
        with pytest.raises(UserError, match="warmup"):
            make(**{**options, name: 0.1, "warmup": value})


def test_a_model_of_which_nothing_trains_is_refused(tiny_detr: Callable[..., DETR]) -> None:
    with pytest.raises(UserError, match="Nothing in the model trains"):
        adamw(tiny_detr().requires_grad_(False))  # type: ignore[arg-type]
