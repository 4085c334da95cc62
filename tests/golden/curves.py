"""Golden curves: losses and gradient norms of a few steps of every recipe, which a refactoring must leave as they are.

`python tests/golden/curves.py` prints how far each case is from the recorded curve; `--renew` records them anew, which
a change that means to change training does in the same commit as its line under "Changes training" in CHANGELOG.md.

Weights that a model draws at random are replaced by values that follow from their names alone, so that a curve does not
depend on the order in which parts are built. Constants, such as zeros and priors, stay as the model sets them.
"""

import argparse
import json
import math
import re
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from datasets.shapes import generate  # noqa: E402
from detr.config import build_model, compose  # noqa: E402
from tests.helpers.commands import TINY_MODEL, run  # noqa: E402

CURVES = Path(__file__).with_name("curves.json")
STEPS = 5
SMALL = (
    "model.num_queries=7",
    "model.encoder.d_model=32",
    "model.encoder.nhead=4",
    "model.encoder.num_layers=1",
    "model.decoder.num_layers=2",
    "model.encoder.dim_feedforward=32",
)
# `small` without denoising, which it got after these curves were recorded.
MATCHED = ("model=small", *SMALL, "~model/denoising")
# Names of today and those under which the values of weights are drawn.
RENAMED = (
    (r"^encoder\.position\.", "position."),
    (r"^encoder\.", "transformer.encoder."),
    (r"^transformer\.encoder\.level_embed", "transformer.level_embed"),
    (r"^decoder\.", "transformer.decoder."),
)
ATTENTION = ("se", "non_local", "criss_cross", "dual", "residual", "spatial_transformer", "hard", "self_attention")
SIGMOID_LOSSES = ("focal", "focal_dab", "iou_aware", "matchability_aware", "position_supervised", "varifocal")
CASES: dict[str, tuple[str, ...]] = {
    **{name: (f"model={name}", *TINY_MODEL) for name in
       ("detr", "conditional_detr", "dab_detr", "dn_detr", "deformable_detr", "dino", "rt_detr_r18", "rt_detrv2_r18", "d_fine_n", "d_fine_s", "deim_s")},
    "small": ("model=small", *SMALL),
    "refined two-stage deformable_detr": ("model=deformable_detr", *TINY_MODEL, "model.refine=true",
        "model.shared_heads=false", "model/queries=two_stage", "model.queries.selection=pure"),
    "frozen norms and stages": ("model=detr", *TINY_MODEL, "model.backbone.norm=frozen",
        "model.backbone.freeze=[stem,layer1]"),
    "group norms, normalizing first": ("model=detr", *TINY_MODEL, "model.backbone.norm=group",
        "model.encoder.norm_first=true", "model.encoder.activation=glu"),
    "learned positions": ("model=detr", *TINY_MODEL, "model/encoder/position=learned"),
    "groups of queries": ("model=dab_detr", *TINY_MODEL, "model.queries.num_groups=3", "criterion.group_repeats=2"),
    "last layer only": ("model=detr", *TINY_MODEL, "model.aux_loss=false"),
    **{f"criterion {name}": ("model=conditional_detr", *TINY_MODEL, f"criterion={name}") for name in SIGMOID_LOSSES},
    **{f"attention {name}": (*MATCHED, f"model/attention={name}") for name in ATTENTION},
    **{f"masks {name}": (*MATCHED, f"model/masks={name}") for name in ("detr", "dot_product")},
    "accumulation": (*MATCHED, "data.batch_size=2", "trainer.accumulate=2"),
    "moving average": (*MATCHED, "trainer.ema=0.9"),
    "freezing by epoch": (*MATCHED, "data.batch_size=8", "trainer.freeze={backbone:1}"),
    "backbone rate 0": ("model=detr", *TINY_MODEL, "optimizer.backbone_lr=0.0"),
    "rates and decays by name": (*MATCHED, "optimizer.lr_factors={sampling_offsets:0.1}",
        "optimizer.weight_decays={norm:0.0}"),
    "bf16": (*MATCHED, "trainer.precision=bf16"),
    "end of augmentation, grouped by aspect": (*MATCHED, "data.batch_size=8", "data.plain_after=0.5",
        "data.group_by_aspect=true"),
    "DETR's augmentation": (*MATCHED, "data.transforms.crop=true", "data.transforms.crop_from=[40,60]",
        "data.transforms.crop_min=20", "data.transforms.crop_max=50", "data.transforms.sizes=[40,48,64]"),
    "step schedule": (*MATCHED, "scheduler=step", "scheduler.drops=[0.5]", "scheduler.warmup=0.4"),
}  # fmt: skip

Curve = dict[str, list[float]]


def curve_of(case: str, folder: Path) -> Curve:
    """What a training logs and saves: by name, the values of all steps. folder: for the generated data and the run."""
    data = folder / "shapes"
    generate(data, train_images=24, val_images=3, image_size=48, max_objects=3)
    options = [
        f"data.root={data}",
        "data.prepare=null",
        "data.size=48",
        "data.max_size=64",
        "data.transforms.sizes=[48]",  # resizing rounds in another way on processors without AVX2
        "data.batch_size=4",
        "data.workers=0",
        "device=cpu",
        "log_every=1",
        "optimizer.lr=1e-4",
        "optimizer.backbone_lr=1e-4",
        f"trainer.max_steps={STEPS}",
        "scheduler.warmup=0.0",
        "logger.tensorboard=null",
    ]
    chosen = {option.partition("=")[0]: option for option in (*options, *CASES[case])}
    weights, run_dir = folder / "weights.pt", folder / re.sub(r"\W+", "_", case)
    torch.save({"model": weights_by_name(list(chosen.values()))}, weights)
    outcome = run("train.py", *chosen.values(), f"weights={weights}", f"run_dir={run_dir}")
    assert outcome.code == 0, outcome.output
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["group"] == "train"]
    names = [name for name in records[0] if re.fullmatch(r"loss\D*|grad_norm", name)]
    saved = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["model"]
    # Summed exactly, so that the order of the tensors does not matter.
    weights = math.fsum(tensor.double().square().sum().item() for tensor in saved.values())
    return {**{name: [record[name] for record in records] for name in names}, "saved_weights": [weights]}


def weights_by_name(options: list[str]) -> dict[str, Tensor]:
    """The model's weights, with those replaced that it draws at random."""
    config = compose(options).model
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(build_model(config, num_classes=3, pretrained=False).state_dict())
    return {
        name: tensor if torch.equal(tensor, states[1][name]) else drawn(name, tensor.shape)
        for name, tensor in states[0].items()
    }


def drawn(name: str, shape: torch.Size) -> Tensor:
    for today, recorded in RENAMED:
        name = re.sub(today, recorded, name)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) < 2:
        return torch.rand(shape, generator=generator) * 0.2 - 0.1
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


def differences(found: Curve, expected: Curve) -> tuple[float, float]:
    """The largest relative difference of any value in the first step, and in later ones or the saved weights."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    apart = {
        name: [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found[name], values, strict=True)]
        for name, values in expected.items()
    }
    saved = apart.pop("saved_weights")
    return max(values[0] for values in apart.values()), max(*saved, *(max(values[1:]) for values in apart.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="record the curves anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(CASES), metavar="CASE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recorded = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    print(f"{'case':<42} {'first step':>12} {'later':>12}")
    for case in options.only:
        with tempfile.TemporaryDirectory() as folder:
            curve = curve_of(case, Path(folder))
        if options.renew:
            recorded[case] = curve
        print(f"{case:<42} {'{:>12.2e} {:>12.2e}'.format(*differences(curve, recorded[case]))}", flush=True)
    if options.renew:
        rows = [
            f"  {json.dumps(case)}: {{\n"
            + ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in recorded[case].items())
            + "\n  }"
            for case in CASES
        ]
        CURVES.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
