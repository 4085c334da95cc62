"""Measure what detectors cost: parameters, operations, latency, throughput, memory and size of files.

python tools/benchmark.py CHECKPOINT --runtimes eager onnxruntime --precisions fp32 int8 --images DIR
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `export` and `tools` are used from the checkout

from detr.cli.devices import pick_device
from detr.cli.exit_codes import exit_codes
from detr.errors import UserError
from detr.reporting import OutputFolder
from tools.benchmarking import report
from tools.benchmarking.processes import Job, MeasuringProcess
from tools.benchmarking.sources import (
    PRECISIONS,
    RUNTIMES,
    Options,
    Source,
    check,
    file_size,
    missing,
    random_checkpoint,
)
from tools.stored import add_allow_targets
from tools.timing import in_turns

NAMES = ("benchmark.json", "benchmark.md")


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parsed(arguments)
    output = None
    if given.output is not None:
        output = OutputFolder(given.output, NAMES, overwrite=True, option="--output DIR")
    options = Options(
        runtimes=_once(given.runtimes),
        precisions=_once(given.precisions),
        images=given.images,
        device=str(pick_device(given.device)),
        threads=given.threads,
        allow_targets=given.allow_targets,
    )
    check(options)
    date, load = datetime.now().astimezone(), os.getloadavg()[0]  # before this process adds to it
    figures: list[dict[str, Any]] = []
    left_out = {", ".join(pair): reason for pair, reason in missing(options).items()}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = {path: path for path in given.checkpoints}
        paths |= {name: str(random_checkpoint(name, folder)) for name in _once(given.models)}
        sources = {
            name: Source(name, path, folder / str(number), options) for number, (name, path) in enumerate(paths.items())
        }
        for size in given.sizes or [None]:
            for batch in given.batch_sizes:
                figures += _measured(sources, size, batch, given.repeats, left_out)
    if not figures:
        reasons = " ".join(f"{name}: {reason}." for name, reason in left_out.items())
        raise UserError(f"Nothing of this can be measured. {reasons} Choose others of --runtimes and --precisions.")
    machine = report.machine(options.device, options.threads, load)
    print(report.text(figures, left_out, machine))
    if output is not None:
        command = shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
        about = {"command": command, "date": date.isoformat(timespec="seconds")}
        content = report.content(figures, left_out, machine, about)
        output.write("benchmark.json", json.dumps(content, indent=1).encode())
        output.write("benchmark.md", report.markdown(figures, left_out, machine, about).encode())
        print(f"Written: {output.folder / NAMES[0]} and {output.folder / NAMES[1]}")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="a checkpoint, the name of a published one, or a file of export.py, which is measured as it is",
    )
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="of configs/model, with random weights, such as dino"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        metavar="SIZE",
        help="of images in pixels, 640 or 800x1066 (height x width); needed for --models, else that of a photograph of "
        "480x640 as the checkpoint resizes it",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=_count, default=[1], metavar="N")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["eager"], metavar="RUNTIME")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], metavar="PRECISION")
    parser.add_argument("--images", metavar="DIR", help="of your own, which int8 takes its ranges from")
    parser.add_argument("--repeats", type=_count, default=30, metavar="N", help="measurements of each")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write benchmark.json and benchmark.md to")
    parser.add_argument("--threads", type=_count, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for eager and compiled")
    add_allow_targets(parser)
    given = parser.parse_args(arguments)
    if not given.checkpoints and not given.models:
        parser.error("give a CHECKPOINT or --models NAME")
    if given.models and not given.sizes:
        parser.error("--models needs --sizes: models without weights have no size of their own")
    return given


def _once(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"wanted a number of at least 1, got {text}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"wanted pixels such as 640 or 800x1066 (height x width), got {text}")
    return int(found[1]), int(found[2] or found[1])


def _measured(
    sources: dict[str, Source], size: tuple[int, int] | None, batch: int, repeats: int, left_out: dict[str, str]
) -> list[dict[str, Any]]:
    """The figures of all variants of all models, which take turns. left_out: why some are not there, which grows."""
    where = f"{batch} of {size[0]}x{size[1]}" if size else f"{batch} of its own size"
    jobs: dict[str, Job] = {}
    processes: dict[str, MeasuringProcess] = {}
    with ExitStack() as stack:
        for source in sources.values():
            for runtime, precision in source.variants:
                name = f"{source.name}, {runtime}, {precision}"
                print(f"Preparing {name}", file=sys.stderr, flush=True)
                try:
                    jobs[name] = source.job(runtime, precision, size, batch)
                    processes[name] = stack.enter_context(MeasuringProcess(jobs[name]))
                except UserError as error:
                    left_out[f"{name}, {where}"] = str(error)
        print(f"Measuring {len(processes)} of them in turns", file=sys.stderr, flush=True)
        seconds = in_turns(processes, repeats)
    return [
        report.figures(
            jobs[name],
            seconds=values,
            baseline=seconds.get(f"{jobs[name].model}, eager, fp32"),
            parameters=sources[jobs[name].model].parameters(),
            flops=sources[jobs[name].model].flops((jobs[name].height, jobs[name].width)),
            memory=processes[name].memory,
            file_size=file_size(jobs[name].path),
        )
        for name, values in seconds.items()
    ]


if __name__ == "__main__":
    with exit_codes():
        main()
