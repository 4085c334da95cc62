"""The recipes for COCO, option by option and parameter by parameter, against the tables of the published configurations.

The numbers are those of D-FINE (Peterande/D-FINE), DEIM (ShihuaHuang95/DEIM) and RT-DETR (lyuwenyu/RT-DETR).
"""

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from detr.config import build, build_model, compose, plain
from detr.engine import TrainerConfig
from detr.weights import families, read_checkpoint, to_published
from tests.helpers.commands import run
from train import build_augmentation

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"
STEPS = 1000  # of an epoch

# Expressions of published names, each with its own rate and decay, where it has one; the first that fits counts.
Groups = tuple[tuple[str, float | None, float | None], ...]
BACKBONE, BACKBONE_NORM = r"^(?=.*backbone)(?!.*norm).*$", r"^(?=.*backbone)(?=.*norm).*$"
BACKBONE_NOT_BN, ALL_NORMS = r"^(?=.*backbone)(?!.*bn).*$", r"^(?=.*(?:norm|bn)).*$"
# `|` binds loosest: of HGNetV2, whose norms are called bn, the first has all parameters and the second has none.
FINE_BACKBONE, FINE_BACKBONE_NORM = r"^(?=.*backbone)(?!.*norm|bn).*$", r"^(?=.*backbone)(?=.*norm|bn).*$"
REST_NORM = r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$"
REST_NORM_BIAS = r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn|bias)).*$"


def small(backbone_lr: float) -> Groups:
    """Of D-FINE-N, S and M."""
    rest = (REST_NORM_BIAS, None, 0.0)
    return (FINE_BACKBONE, backbone_lr, None), (FINE_BACKBONE_NORM, backbone_lr, 0.0), rest


def large(backbone_lr: float) -> Groups:
    """Of D-FINE-L and X."""
    return (FINE_BACKBONE, backbone_lr, None), (REST_NORM, None, 0.0)


@dataclass(frozen=True)
class Recipe:
    """A row of the tables.

    epochs: how many. stop: the one from which on there is no augmentation, and no size of batches; None: never.
    batch: images in a step, of all GPUs. lr, decay: of parameters in no group.
    scales: how often 640 is among the sizes of batches; None: no such sizes.
    restart: decay of the average after the return to the best checkpoint at `stop`.
    mixed: epochs in which mosaic and mixup begin and end. flat: epoch from which the rate falls to a half until `stop`.
    """

    epochs: int
    stop: int | None
    batch: int
    lr: float
    decay: float
    groups: Groups
    scales: int | None
    warmup: int | None
    ema_warmup: int
    power: int = 1
    restart: float | None = None
    mixed: tuple[int, int] | None = None
    flat: int | None = None
    precision: str = "fp16"


FINE = Recipe(80, 72, 32, 2.5e-4, 1.25e-4, large(1.25e-5), 4, 500, 1000, restart=0.9999)
DEIM = replace(FINE, epochs=58, stop=50, lr=5e-4, warmup=2000, power=2, mixed=(4, 29), flat=29)
RT = Recipe(72, None, 16, 1e-4, 1e-4, (), 3, None, 2000, precision="fp32")
RT_2 = replace(RT, stop=71, warmup=2000, precision="fp16")
RT_50: Groups = (
    ("backbone", 1e-5, None),
    (r"^(?=.*encoder(?=.*bias|.*norm.*weight)).*$", None, 0.0),
    (r"^(?=.*decoder(?=.*bias|.*norm.*weight)).*$", None, 0.0),
)
RT_18: Groups = ((BACKBONE_NORM, 1e-5, 0.0), (BACKBONE, 1e-5, None), (REST_NORM_BIAS, None, 0.0))
RT_2_18: Groups = ((ALL_NORMS, None, 0.0),)
RT_2_34: Groups = ((FINE_BACKBONE, 5e-5, None), (FINE_BACKBONE_NORM, 5e-5, 0.0), (REST_NORM_BIAS, None, 0.0))
RT_2_50: Groups = ((BACKBONE, 1e-5, None), (REST_NORM, None, 0.0))
S_2, M_2 = replace(RT_2, epochs=120, stop=117, groups=RT_2_18, scales=None), replace(RT_2, groups=RT_2_50)
R34_2 = replace(RT_2, epochs=120, stop=117, groups=RT_2_34)
DEIM_RT = replace(DEIM, batch=16, lr=2e-4, decay=1e-4, ema_warmup=2000, scales=3)

RECIPES = {
    "d_fine_n": replace(
        FINE, epochs=160, stop=148, batch=128, lr=8e-4, decay=1e-4, groups=small(4e-4), scales=None
    ),
    "d_fine_s": replace(FINE, epochs=132, stop=120, lr=2e-4, decay=1e-4, groups=small(1e-4), scales=20),
    "d_fine_m": replace(FINE, epochs=132, stop=120, lr=2e-4, decay=1e-4, groups=small(2e-5), scales=6),
    "d_fine_l": FINE,
    "d_fine_x": replace(FINE, groups=large(2.5e-6), scales=3, restart=0.9998),
    "deim_n": replace(
        DEIM, epochs=160, stop=148, batch=128, lr=8e-4, decay=1e-4, groups=small(4e-4), scales=None, mixed=(4, 78),
        flat=None,
    ),
    "deim_s": replace(
        DEIM, epochs=132, stop=120, lr=4e-4, decay=1e-4, scales=20, mixed=(4, 64), flat=64,
        groups=((BACKBONE_NOT_BN, 2e-4, None), (ALL_NORMS, None, 0.0)),
    ),
    "deim_m": replace(
        DEIM, epochs=102, stop=90, lr=4e-4, decay=1e-4, scales=6, mixed=(4, 49), flat=49,
        groups=((BACKBONE_NOT_BN, 4e-5, None), (ALL_NORMS, None, 0.0)),
    ),
    "deim_l": replace(DEIM, groups=large(2.5e-5)),
    "deim_x": replace(DEIM, groups=large(5e-6), scales=3, restart=0.9998),
    "deim_rt_detrv2_r18": replace(
        DEIM_RT, epochs=120, stop=117, scales=None, mixed=(4, 64), flat=64, groups=((ALL_NORMS, None, 0.0),)
    ),
    "deim_rt_detrv2_r50": replace(
        DEIM_RT, epochs=60, stop=58, mixed=(4, 34), flat=34, groups=((BACKBONE, 2e-5, None), (ALL_NORMS, None, 0.0))
    ),
    "rt_detr_r18": replace(RT, groups=RT_18),
    "rt_detr_r34": replace(RT, groups=RT_18),
    "rt_detr_r50_m": replace(RT, groups=RT_50),
    "rt_detr_r50": replace(RT, groups=RT_50),
    "rt_detrv2_r18": S_2,
    "rt_detrv2_r34": R34_2,
    "rt_detrv2_r50_m": replace(M_2, epochs=84, stop=81),
    "rt_detrv2_r50": M_2,
    "rt_detrv2_r101": replace(M_2, groups=((BACKBONE, 1e-6, None), (REST_NORM, None, 0.0))),
    "rt_detrv2_r18_dsp": replace(S_2, epochs=36, stop=33),
    "rt_detrv2_r34_dsp": replace(R34_2, epochs=12, stop=10),
    "rt_detrv2_r50_m_dsp": replace(M_2, epochs=36, stop=33),
    "rt_detrv2_r50_dsp": replace(M_2, epochs=12, stop=10),
}  # fmt: skip
# Those whose expressions and names are like those of others.
LONG = {"d_fine_s", "d_fine_m", "d_fine_x", "deim_m", "deim_l", "deim_x", "rt_detr_r34", "rt_detr_r50_m",
        "rt_detrv2_r50_m", "rt_detrv2_r101", "rt_detrv2_r34_dsp", "rt_detrv2_r50_m_dsp", "rt_detrv2_r50_dsp"}  # fmt: skip


@functools.cache
def composed(name: str) -> DictConfig:
    return compose([f"experiment={name}_coco", "data.root=COCO"])


@pytest.mark.parametrize("name", RECIPES)
def test_options_of_recipes(name: str) -> None:
    config, recipe = composed(name), RECIPES[name]
    trainer, data = config.trainer, config.data
    assert (trainer.epochs, data.batch_size, trainer.accumulate) == (recipe.epochs, recipe.batch, 1)
    assert (trainer.precision, trainer.clip_norm, trainer.sync_batch_norm) == (recipe.precision, 0.1, True)
    assert (trainer.ema, trainer.ema_warmup) == (0.9999, recipe.ema_warmup)
    assert config.optimizer.betas == [0.9, 0.999]
    assert (data.size, data.square, data.group_by_aspect) == (640, True, False)
    used = {"sizes": [640], "square": True, "crop": False, "horizontal_flip": 0.5, "vertical_flip": 0.0, "fill": 0}
    strong = {"zoom_out": 0.5, "iou_crop": 0.8, "photometric_distortion": 0.5}
    for transforms, options in (
        (data.transforms, used | strong),
        (data.plain_transforms, used | dict.fromkeys(strong, 0.0)),
    ):
        assert {option: transforms[option] for option in options} == options
    restart = TrainerConfig(**plain(trainer)).restart_epoch(STEPS)
    assert restart == (recipe.epochs if recipe.restart is None else recipe.stop)
    if recipe.restart is not None:
        assert (trainer.restart_decay, trainer.restart_fall) == (recipe.restart, 0.0001)


@pytest.mark.parametrize("name", RECIPES)
def test_augmentation_of_recipes(name: str) -> None:
    data, recipe = composed(name).data, RECIPES[name]
    sizes = list(range(480, 640, 32)) + [640] * (recipe.scales or 0) + list(range(672, 801, 32))
    assert data.batch_sizes == (None if recipe.scales is None else sizes)
    at_sizes = set() if recipe.scales is None else set(sizes)
    names = {0: "transforms"}
    if recipe.mixed is not None:
        begin, end = recipe.mixed
        names = {0: "plain transforms", begin: "mixing and transforms", end: "transforms"}
    expected = {epoch: (words, at_sizes) for epoch, words in names.items()}
    if recipe.stop is not None:
        expected[recipe.stop] = ("plain transforms of one size", set())
    phases = build_augmentation(data).phases(recipe.epochs)
    assert {phase.epoch: (phase.name, set(phase.recipe.at_size)) for phase in phases} == expected
    assert [phase.epoch for phase in phases if phase.mixing is not None] == ([4] if recipe.mixed else [])


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.mixed])
def test_dense_one_to_one(name: str) -> None:
    parts = plain(composed(name).data.mixing)["parts"]
    assert [*parts] == ["mosaic", "mixup"]
    assert parts["mosaic"] == {
        "_target_": "datasets.mixing.Mosaic",
        "probability": 0.5,
        "size": 320,
        "rotation": 10.0,
        "translation": 0.1,
        "scaling": [0.5, 1.5],
        "short_side": True,
        "fill": 0,
    }
    blend = {"probability": 0.5, "weight": [0.45, 0.55], "whole": True}
    assert parts["mixup"] == {"_target_": "datasets.mixing.Mixup", **blend}


@pytest.mark.parametrize("name", RECIPES)
def test_rates_over_the_epochs(name: str) -> None:
    recipe, schedule = RECIPES[name], build(composed(name).scheduler, path="scheduler")
    total = recipe.epochs * STEPS

    def at(epoch: float) -> float:
        return schedule(round(epoch * STEPS), total)

    if recipe.warmup is not None:
        half, full = schedule(recipe.warmup // 2 - 1, total), schedule(recipe.warmup - 1, total)
        assert (half, full) == pytest.approx((0.5**recipe.power, 1.0))
        assert schedule(recipe.warmup - 2, total) < 1
    else:
        assert schedule(0, total) == 1
    assert at(2) == at(recipe.flat or recipe.epochs - 1) == 1
    if recipe.flat is None:
        assert schedule(total - 1, total) == 1
    else:
        assert recipe.stop is not None and at(recipe.flat + 0.5) < 1
        assert at((recipe.flat + recipe.stop) / 2) == pytest.approx(0.75, abs=1e-3)
        assert at(recipe.stop - 0.5) > at(recipe.stop) == at(recipe.epochs - 1) == pytest.approx(0.5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in RECIPES])
def test_rates_and_decays_of_all_parameters(name: str) -> None:
    config, recipe = composed(name), RECIPES[name]
    with torch.device("meta"):
        model = build_model(config.model, num_classes=80, pretrained=False)
    optimizer = build(config.optimizer, path="optimizer", model=model)
    given = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    numbered = [*model.state_dict(keep_vars=True).items()]
    marked = {ours: torch.tensor(float(index)).expand(tensor.shape) for index, (ours, tensor) in enumerate(numbered)}
    family = families.D_FINE if "rt_detr" not in name else families.RT_DETRV2 if "v2" in name else families.RT_DETR
    seen = set()
    for theirs, mark in to_published(marked, family).items():
        if re.search(r"anchors|valid_mask|num_points_scale", theirs):
            continue
        _, parameter = numbered[int(mark.flatten()[0])]
        if parameter in given:
            lr, decay = next(
                ((lr, decay) for part, lr, decay in recipe.groups if re.search(part, theirs)), (None, None)
            )
            wanted = (recipe.lr if lr is None else lr, recipe.decay if decay is None else decay)
            assert given[parameter] == pytest.approx(wanted), theirs
            seen.add(parameter)
    assert len(seen) == len(given)
    trained = {ours for ours, tensor in numbered if tensor in given}
    assert any("sampling_offsets" in ours for ours in trained) != name.endswith("_dsp")


@pytest.mark.parametrize(
    "name, option, rate, decay",
    [
        ("d_fine_n", "optimizer.weight_decays={.bn:0.0}", 4e-4, 0.0),
        ("deim_n", "optimizer.weight_decays={.bn:0.0}", 4e-4, 0.0),
        ("deim_s", "optimizer.lr_factors={.bn:null}", 2e-4, 0.0),
        ("deim_rt_detrv2_r50", "optimizer.lr_factors=null", 2e-5, 0.0),
    ],
)
def test_what_was_meant_is_an_option(name: str, option: str, rate: float, decay: float) -> None:
    """Of the batch norms of the backbone."""
    config = compose([f"experiment={name}_coco", "data.root=COCO", option])
    with torch.device("meta"):
        model = build_model(config.model, num_classes=80, pretrained=False)
    norms = {p for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    optimizer = build(config.optimizer, path="optimizer", model=model)
    groups = [group for group in optimizer.param_groups if norms & {*group["params"]}]
    assert groups and all(group["weight_decay"] == decay for group in groups)
    assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups))


# Models: backbone, strides of its maps, whether it is frozen; hidden features, of the encoder's maps and feed-forward,
# expansion and depth of fusions; decoder layers, points, reg_scale.
FINE_MODELS: dict[str, tuple[Any, ...]] = {
    "n": ("hgnetv2_b0", [16, 32], False, 128, 512, 0.34, 0.5, 3, [6, 6], 4.0),
    "s": ("hgnetv2_b0", [8, 16, 32], False, 256, 1024, 0.5, 0.34, 3, [3, 6, 3], 4.0),
    "m": ("hgnetv2_b2", [8, 16, 32], False, 256, 1024, 1.0, 0.67, 4, [3, 6, 3], 4.0),
    "l": ("hgnetv2_b4", [8, 16, 32], True, 256, 1024, 1.0, 1.0, 6, [3, 6, 3], 4.0),
    "x": ("hgnetv2_b5", [8, 16, 32], True, 384, 2048, 1.0, 1.0, 6, [3, 6, 3], 8.0),
}


@pytest.mark.parametrize("family", ["d_fine", "deim"])
@pytest.mark.parametrize("size", FINE_MODELS)
def test_models_of_recipes(family: str, size: str) -> None:
    config = composed(f"{family}_{size}")
    name, strides, frozen, width, feedforward, expansion, depth, layers, points, scale = FINE_MODELS[size]
    frozen = frozen and family == "d_fine"
    backbone, encoder, decoder = config.model.backbone, config.model.encoder, config.model.decoder
    assert (backbone.name, backbone.features, backbone.mean, backbone.std) == (name, strides, [0.0] * 3, [1.0] * 3)
    assert (backbone.norm, backbone.freeze) == (("frozen", ["stem"]) if frozen else ("batch", []))
    assert (encoder.channels, encoder.dim_feedforward, encoder.expansion) == (width, feedforward, expansion)
    assert (encoder.depth, encoder.num_layers, encoder.nhead, encoder.dropout) == (depth, 1, 8, 0.0)
    assert (decoder.num_layers, decoder.num_points, decoder.reg_scale, decoder.reg_max) == (layers, points, scale, 32)
    assert (decoder.d_model, decoder.nhead, decoder.up) == (128 if size == "n" else 256, 8, 0.5)
    assert decoder.dim_feedforward == (512 if size == "n" else 1024)
    assert decoder.activation == ("silu" if family == "deim" else "relu") and config.model.num_queries == 300
    denoising = config.model.denoising
    # Published code draws among all labels with half its label_noise_ratio.
    assert (denoising.num_queries, denoising.label_noise, denoising.box_noise) == (100, 0.25, 1.0)
    check_losses(config, "fgl", "ddf", deim=family == "deim")


@pytest.mark.parametrize("depth", [18, 50])
def test_models_of_deim_on_rt_detr(depth: int) -> None:
    config = composed(f"deim_rt_detrv2_r{depth}")
    assert (config.model.backbone.norm, config.model.backbone.freeze) == ("batch", [])
    assert (config.model.decoder.activation, config.model.head.activation) == ("silu", "silu")
    with torch.device("meta"):
        model = build_model(config.model, num_classes=80, pretrained=False)
    mlp = model.queries.position.mlp
    assert [layer.out_features for layer in mlp.layers] == [
        256,
        256,
        256,
    ] and mlp.activation is torch.nn.functional.silu
    assert all(head.box_head.activation is torch.nn.functional.silu for head in (*model.heads, model.proposal_head))
    check_losses(config, deim=True)


def check_losses(config: DictConfig, *further: str, deim: bool) -> None:
    criterion = config.criterion
    kind, alpha, gamma = ("MatchabilityAware", 1.0, 1.5) if deim else ("Varifocal", 0.75, 2.0)
    found = criterion.classification
    assert found._target_ == f"detr.losses.classification.{kind}"
    assert (found.weight, found.alpha, found.gamma) == (1.0, alpha, gamma)
    weights = {"bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}
    terms = {name: term.weight for name, term in criterion.terms.items()}
    assert terms == {name: weights[name] for name in ("bbox", "giou", *further)}
    assert criterion.union == bool(further)
    matcher = criterion.matcher
    assert (matcher.class_cost, matcher.box_cost, matcher.giou_cost) == (2.0, 5.0, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d_fine_n", "deim_n", "deim_rt_detrv2_r18"])
def test_a_recipe_trains_changes_its_augmentation_and_returns(name: str, shapes_root: Path, tmp_path: Path) -> None:
    """Two steps an epoch of small images in COCO's folders; the return where the plain epochs begin."""
    pytest.importorskip("timm")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").symlink_to(shapes_root / split)
        annotations = shapes_root / f"instances_{split}.json"
        (tmp_path / "annotations" / f"instances_{split}2017.json").symlink_to(annotations)
    small = ("data.size=64", "data.batch_sizes=[64,96]", "data.batch_size=4", "data.workers=0", "model.num_queries=20")
    on_cpu = ("device=cpu", "trainer.precision=fp32", "trainer.sync_batch_norm=false", "model.backbone.weights=null")
    short = ("trainer.epochs=5", "trainer.limit_epoch_steps=2", "data.plain_after=0.6", "scheduler.warmup_steps=2")
    if RECIPES[name].mixed:
        short += ("data.plain_before=0.2", "data.mixing_until=0.4")
    run_dir = tmp_path / "run"
    done = run(
        "train.py", f"experiment={name}_coco", f"data.root={tmp_path}", f"run_dir={run_dir}", *small, *on_cpu, *short
    )
    assert done.code == 0, done.output
    assert "from epoch 3 plain transforms of one size" in done.output
    assert ("from epoch 1 mixing and transforms; from epoch 2 transforms" in done.output) == bool(RECIPES[name].mixed)
    assert re.search(
        r"Restart 1, at step 6, from \S+best\.pt; the moving average has a decay of 0\.9999\.", done.output
    )
    training = read_checkpoint(run_dir / "checkpoints" / "last.pt").training
    assert training["step"] == 10 and training["callbacks"]["restart"]["restarts"] >= 1
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["group"] == "val"] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_recipe_train_the_same_batches(name: str) -> None:
    """For one GPU, which `composed` composes, and for 8 of them."""
    head = (EXPERIMENTS / f"{name}_coco.yaml").read_text().split("defaults:")[0]
    alone, together = re.findall(r"^# +(?:Command: +|On 8 GPUs: )(.*)$", head, re.M)
    options = f"train.py experiment={name}_coco data.root=COCO"
    each = RECIPES[name].batch // 8
    assert alone == f"python {options}"
    assert together == f"torchrun --nproc_per_node=8 {options} data.batch_size={each}"


def test_no_recipe_is_left_out() -> None:
    there = {path.stem.removesuffix("_coco") for path in EXPERIMENTS.glob("*_coco.yaml")}
    assert {name for name in there if name.startswith(("d_fine", "deim", "rt_detr"))} == {*RECIPES, "rt_detr_r101"}
