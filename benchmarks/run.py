"""Measure speed and memory, and print them as one table: python benchmarks/run.py [--published CHECKOUT]"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `datasets` is used from the checkout

from benchmarks import (
    attention,
    criterion,
    elastic,
    evaluation,
    export,
    latency,
    loading,
    masks,
    padding,
    recipes,
    records,
    results,
    saving,
    serving,
    step,
    transforms,
)
from benchmarks.results import Row, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", type=Path, metavar="PATH", help="checkout of facebookresearch/detr to compare")
    parser.add_argument(
        "--only",
        metavar="NAME[,NAME]",
        help="some of criterion, transforms, loading, evaluation, step, recipes, latency, attention, padding, records, "
        "masks, serving, export, saving, elastic",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for criterion, step, recipes and latency")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of which the median is taken")
    parser.add_argument("--judge", action="store_true", help="also run pycocotools, for a minute")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="photographs for transforms, loading and padding, with --annotations"
    )
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="their COCO annotations")
    about_modes = "precisions, each with options after plus signs: fp32,bf16+compile,bf16+checkpoint; for step"
    parser.add_argument("--modes", default="fp32", metavar="MODE[,MODE]", help=about_modes)
    parser.add_argument("--size", type=int, nargs=2, default=step.SIZE, metavar=("HEIGHT", "WIDTH"), help="for step")
    parser.add_argument("--batch", type=int, default=step.BATCH, help="images in a batch, for step")
    parser.add_argument("--save", action="store_true", help=f"keep the results, in {results.FILE.name}")
    options = parser.parse_args()
    if (options.images is None) != (options.annotations is None):
        parser.error("--images and --annotations go together")
    modes = options.modes.split(",")
    try:
        for mode in modes:
            step.trainer_config(mode)
    except ValueError as error:
        parser.error(f"--modes: {error}")

    common = {"checkout": options.published, "repeats": options.repeats}
    benchmarks: dict[str, Callable[[], Iterable[Row]]] = {
        "criterion": partial(criterion.run, device=options.device, **common),
        "transforms": partial(transforms.run, folder=options.images, annotations=options.annotations, **common),
        "loading": partial(loading.run, folder=options.images, annotations=options.annotations),
        "evaluation": partial(evaluation.run, judge=options.judge),
        "step": partial(
            step.run,
            device=options.device,
            threads=options.threads,
            modes=modes,
            size=tuple(options.size),
            batch=options.batch,
            **common,
        ),
        "recipes": partial(recipes.run, device=options.device, threads=options.threads, repeats=options.repeats),
        "latency": partial(latency.run, device=options.device, threads=options.threads, repeats=options.repeats),
        "attention": partial(attention.run, repeats=options.repeats),
        "padding": partial(padding.run, folder=options.images, annotations=options.annotations),
        "records": records.run,
        "masks": masks.run,
        "export": export.run,
        "saving": partial(saving.run, repeats=options.repeats),
        "elastic": partial(elastic.run, repeats=options.repeats),
        "serving": partial(serving.run, threads=options.threads),
    }
    names = options.only.split(",") if options.only else list(benchmarks)
    if unknown := set(names) - set(benchmarks):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(benchmarks)}")

    torch.set_num_threads(options.threads)
    before = os.getloadavg()[0]
    rows = []
    for name in names:
        of_one = list(benchmarks[name]())
        rows += of_one
        if options.save:
            results.save(name, of_one, command=results.this_command(), threads=options.threads, device=options.device)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads of {os.cpu_count()} cores.")
    # One more job on a core that torch uses keeps all its threads waiting: the times grow several fold.
    print(
        f"Load average: {before:.1f} before, {os.getloadavg()[0]:.1f} after. Only an idle machine gives sound times.\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
