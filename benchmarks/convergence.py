"""What each recipe reaches in the same processor time on one core from random weights, at a reduced size.

python benchmarks/convergence.py --minutes 20 --data shapes            (generated, or --data bccd --root DIR)

Processor time, unlike time on the clock, hardly depends on what else the machine does meanwhile.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import Row, save, this_command

REPOSITORY = Path(__file__).resolve().parents[1]
RANDOM_WEIGHTS = (
    "model.backbone.weights=null",
    "model.backbone.norm=batch",
    "model.backbone.freeze=[]",
    "model.num_queries=60",
)
REDUCED = (
    *RANDOM_WEIGHTS,
    "model/backbone=resnet18",
    "model.encoder.d_model=128",
    "model.encoder.num_layers=2",
    "model.decoder.num_layers=3",
    "model.encoder.dim_feedforward=512",
    "model.encoder.dropout=0.0",
)
ONE_MAP = (*REDUCED, "model.backbone.features=[8]")
SEVERAL_MAPS = (*REDUCED, "model.backbone.features=[8,16]", "model.neck.num_levels=3")
RECIPES = {
    "detr": ONE_MAP,
    "conditional_detr": ONE_MAP,
    "dab_detr": ONE_MAP,
    "dn_detr": ONE_MAP,
    "deformable_detr": (*SEVERAL_MAPS, "model.refine=true", "model.shared_heads=false"),
    "dino": SEVERAL_MAPS,
    "rt_detr_r18": RANDOM_WEIGHTS,
    "d_fine_n": (*RANDOM_WEIGHTS, "model.backbone.features=[8,16]"),  # at stride 32, 96 pixels leave 9 cells
    "small": REDUCED,
}
TRAINING = ("scheduler=cosine", "scheduler.warmup=0.1", "optimizer.lr=5e-4", "optimizer.backbone_lr=5e-4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["shapes", "bccd"], default="shapes")
    parser.add_argument("--root", default="generated/shapes", help="folder of the data")
    parser.add_argument("--minutes", type=float, default=20.0, help="of processor time in training, for each recipe")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of them, with commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--save", action="store_true", help="keep the results, in results.json")
    options = parser.parse_args()
    experiment, batch_size = {"shapes": ("quickstart", 8), "bccd": ("bccd", 4)}[options.data]
    print(
        "| data | recipe | steps | images/s | peak memory, GiB | AP | AP50 |\n|---|---|---|---|---|---|---|", flush=True
    )
    for recipe in options.recipes.split(","):
        folder = options.runs / f"{options.data}-{recipe}"
        overrides = [
            f"experiment={experiment}",
            f"model={recipe}",
            *RECIPES[recipe],
            *TRAINING,
            f"data.root={options.root}",
            f"data.batch_size={batch_size}",
            f"run_dir={folder}",
            "data.workers=0",
            "trainer.evaluate_every=100000",
            "logger.progress=null",
        ]
        # The difference of two short runs leaves out what every run spends before and after its steps. It must be large
        # against what that varies by.
        tried = 60
        short = train([*overrides, "trainer.max_steps=20"], folder)[0]
        while (spent := train([*overrides, f"trainer.max_steps={tried}"], folder)[0] - short) < 40:
            tried *= 3
        steps = round(options.minutes * 60 * (tried - 20) / spent)
        seconds, records = train([*overrides, f"trainer.max_steps={steps}", f"log_every={max(steps // 20, 1)}"], folder)
        last, found = ([r for r in records if r["group"] == group][-1] for group in ("train", "val"))
        speed = (steps - 20) * batch_size / (seconds - short)
        cells = [options.data, recipe, steps, f"{speed:.1f}", f"{last['memory_gb']:.2f}"]
        rows = [
            *(Row(recipe, name, "", found[name]) for name in ("AP", "AP50")),
            Row(recipe, "speed", "images/s", speed),
            Row(recipe, "peak memory", "GiB", last["memory_gb"]),
            Row(recipe, "steps", "", steps),
        ]
        if options.save:
            save(f"recipes on {options.data}", rows, command=this_command(), threads=1, whole=False)
        print("| " + " | ".join(map(str, [*cells, f"{found['AP']:.3f}", f"{found['AP50']:.3f}"])) + " |", flush=True)


def train(overrides: list[str], folder: Path) -> tuple[float, list[dict]]:
    """Run train.py on one core into an empty folder; returns its processor seconds and its metrics.jsonl's records."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(REPOSITORY / "train.py"), *overrides]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, [json.loads(line) for line in (REPOSITORY / folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
