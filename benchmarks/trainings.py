"""Train what docs/results.md compares, and keep the results: python benchmarks/trainings.py GROUP [CASE ...]

Each training has one core, and its processor time counts: it hardly depends on what else the machine does meanwhile.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.convergence import train
from benchmarks.results import Row, save

BLOCKS = ("none", "se", "non_local", "criss_cross", "dual", "residual", "spatial_transformer", "hard", "self_attention")
BCCD = ("experiment=bccd", "trainer.precision=bf16", "data.root={bccd}")
COCO = ("data.train.images={coco}/images/train", "data.train.annotations={coco}/instances_train.json")
SHORT = (*BCCD, "trainer.epochs=4", "trainer.evaluate_every=4")
TWO_MAPS = ("model.backbone.features=[8,16]", "model.neck.num_levels=2")
IMAGENET = ("model=small_pretrained", "model/backbone=efficientnet_lite0", "trainer.precision=fp32")
SWEEP = ("~model/denoising", "trainer.epochs=5", "trainer.limit_epoch_steps=100", "trainer.evaluate_every=5")
CELLS = (*BCCD, "~model/denoising", "data.size=192", "trainer.epochs=6", "trainer.evaluate_every=6")


@dataclass(frozen=True)
class Training:
    """options: of train.py. seeds: so many trainings, of which the mean is taken."""

    options: tuple[str, ...]
    seeds: int = 1


GROUPS = {
    "random weights": {
        "quickstart": Training(("experiment=quickstart",)),
        "bccd": Training(BCCD),
        "overfit": Training(("experiment=overfit", *COCO, "trainer.max_steps=300")),
    },
    "masks": {
        "detr": Training(("experiment=quickstart", "model/masks=detr")),
        "dot_product": Training(("experiment=quickstart", "model/masks=dot_product", "trainer.epochs=3")),
        "overfit": Training(
            (
                "experiment=overfit",
                *COCO,
                "model=small",
                "model/masks=dot_product",
                "data.size=160",
                "trainer.max_steps=200",
            )
        ),
    },
    "little data": {
        "as it is": Training(SHORT, seeds=3),
        "no denoising": Training((*SHORT, "~model/denoising"), seeds=3),
        "two maps": Training((*SHORT, *TWO_MAPS), seeds=3),
        "moving average": Training((*SHORT, "trainer.ema=0.995"), seeds=3),
        "mosaic": Training((*SHORT, "data/mixing=[mosaic]", "model.num_queries=120", "data.plain_after=0.75"), seeds=3),
        "ImageNet": Training((*SHORT, *IMAGENET, *TWO_MAPS), seeds=3),
    },
    "attention on shapes": {
        block: Training(("experiment=quickstart", *SWEEP, f"model/attention={block}"), seeds=3) for block in BLOCKS
    },
    "attention on blood cells": {block: Training((*CELLS, f"model/attention={block}"), seeds=3) for block in BLOCKS},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=list(GROUPS))
    parser.add_argument("cases", nargs="*", metavar="CASE", help="some of its cases; all where none is named")
    parser.add_argument("--bccd", type=Path, default="DIR", metavar="DIR", help="the photographs of blood cells")
    parser.add_argument("--coco", type=Path, default="DIR", metavar="DIR", help="photographs of COCO, for overfitting")
    parser.add_argument("--runs", type=Path, default=Path("runs/trainings"))
    options = parser.parse_args(arguments)
    group = GROUPS[options.group]
    if unknown := set(options.cases) - set(group):
        parser.error(f"{', '.join(sorted(unknown))} is not one of {', '.join(group)}")
    command = f"python benchmarks/trainings.py {shlex.quote(options.group)}"
    for case in options.cases or group:
        training = group[case]
        seeds = []
        for seed in range(1, training.seeds + 1):
            given = [option.format(bccd=options.bccd, coco=options.coco) for option in training.options]
            folder = options.runs / options.group.replace(" ", "-") / f"{case.replace(' ', '-')}-{seed}"
            seconds, records = train([*given, f"seed={seed}", f"run_dir={folder}", "logger.progress=null"], folder)
            [*_, last] = (record for record in records if record["group"] == "val")
            found = {name: last[name] for name in ("AP", "AP50", "mask_AP", "mask_AP50") if name in last}
            seeds.append({**found, "time": seconds / 60})
            print(
                f"{case}, seed {seed}: {', '.join(f'{name} {value:.3f}' for name, value in seeds[-1].items())}",
                flush=True,
            )
        save(options.group, list(_rows(case, seeds)), command=command, threads=1, whole=False)


def _rows(case: str, seeds: Sequence[dict[str, float]]) -> Iterator[Row]:
    for name in seeds[0]:
        values = [found[name] for found in seeds]
        unit = "core-minutes" if name == "time" else ""
        yield Row(case, name, unit, statistics.fmean(values))
        if len(values) > 1 and name != "time":
            yield Row(case, f"{name}, deviation", unit, statistics.stdev(values))


if __name__ == "__main__":
    main()
