"""Measurements as a table, as Markdown and as JSON."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.benchmarking.processes import Job

Rows = Sequence[Mapping[str, Any]]
Strings = Mapping[str, str]
_WHAT = (
    "Latency is from a batch of images in memory to scores, labels and boxes: it includes normalizing the images, the "
    "model and ranking its boxes, but not reading, resizing and padding images. Speedup is against eager fp32 of the "
    "same model, the median over turns. Spread is that of the middle half of the measurements, as a part of the "
    "median. Memory is the peak beyond that of a process with torch alone; on a GPU, that of the GPU."
)
_PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf")  # of the extra `export`
_TIMES = ("min ms", "median ms", "p90 ms", "p99 ms", "spread", "images/s", "speedup")
_HEAD = ("runtime", "precision", *_TIMES, "memory MiB", "file MiB")
_IDLE = 0.5  # load average


def figures(
    job: Job,
    *,
    seconds: Sequence[float],
    baseline: Sequence[float] | None,
    parameters: int | None,
    flops: int | None,
    memory: float,
    file_size: int | None,
) -> dict[str, Any]:
    """What a job took, as in the JSON file.

    seconds: of each batch, turn by turn. baseline: the same of eager fp32, where that is there.
    parameters: of the model. flops: of one image, two for a multiplication and an addition. memory, file_size: bytes.
    """
    milliseconds = 1000 * np.array(seconds)
    low, median, high, p90, p99 = np.percentile(milliseconds, [25, 50, 75, 90, 99]).tolist()
    return {
        "model": job.model,
        "runtime": job.runtime,
        "precision": job.precision,
        "height": job.height,
        "width": job.width,
        "batch_size": job.batch,
        "parameters": parameters,
        "flops": flops,
        "min_ms": float(milliseconds.min()),
        "median_ms": median,
        "p90_ms": p90,
        "p99_ms": p99,
        "spread": (high - low) / median,
        "images_per_second": 1000 * job.batch / median,
        "speedup": None if baseline is None else float(np.median(np.divide(baseline, seconds))),
        "memory_mib": memory / 2**20,
        "file_mib": None if file_size is None else file_size / 2**20,
        "milliseconds": milliseconds.tolist(),
    }


def machine(device: str, threads: int, load: float) -> dict[str, Any]:
    """What it was measured on. load: the load average before."""
    return {
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name(device) if device != "cpu" else None,
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "system": platform.platform(),
        "packages": {"python": platform.python_version(), **_versions()},
    }


def content(rows: Rows, left_out: Strings, machine: Mapping[str, Any], about: Strings) -> dict[str, Any]:
    """For a JSON file. about: command and date."""
    return {**about, "what": _WHAT, "machine": machine, "measurements": rows, "left_out": left_out}


def text(rows: Rows, left_out: Strings, machine: Mapping[str, Any]) -> str:
    """For a terminal."""
    parts = [f"{heading}\n{_aligned(lines)}" for heading, lines in _sections(rows).items()]
    return "\n\n".join([*parts, "\n".join(_notes(left_out, machine))])


def markdown(rows: Rows, left_out: Strings, machine: Mapping[str, Any], about: Strings) -> str:
    parts = ["# Benchmark", about["date"], f"```bash\n{about['command']}\n```"]
    for heading, cells in _sections(rows).items():
        lines = [_HEAD, ["---"] * 2 + ["---:"] * (len(_HEAD) - 2), *cells]
        parts += [f"## {heading}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, *_notes(left_out, machine)]) + "\n"


def _sections(rows: Rows) -> dict[str, list[list[str]]]:
    """Rows of tables, each a model at one size and batch, by heading."""
    sections: dict[str, list[list[str]]] = {}
    for row in rows:
        images = "1 image" if row["batch_size"] == 1 else f"{row['batch_size']} images"
        heading = f"{row['model']}, {images} of {row['height']}x{row['width']} (height x width)"
        if row["parameters"] is not None:
            heading += f": {row['parameters'] / 1e6:.2f} M parameters, {row['flops'] / 1e9:.2f} GFLOPs an image"
        sections.setdefault(heading, []).append(_cells(row))
    return sections


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row[name]:.2f}" for name in ("min_ms", "median_ms", "p90_ms", "p99_ms")]
    return [
        row["runtime"],
        row["precision"],
        *times,
        f"{100 * row['spread']:.1f} %",
        f"{row['images_per_second']:.2f}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        f"{row['memory_mib']:.0f}",
        "-" if row["file_mib"] is None else f"{row['file_mib']:.1f}",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """In columns, numbers at the right."""
    lines = [_HEAD, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in lines)
    )


def _notes(left_out: Strings, machine: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    device = machine["gpu"] or machine["cpu"]
    before, after, threads = machine["load_before"], machine["load_after"], machine["threads"]
    notes = [f"Left out: {name}: {reason}" for name, reason in left_out.items()]
    notes += [_WHAT, f"Measured on {device}, {threads} threads of {machine['cores']} cores; {versions}."]
    if before > _IDLE or after > threads + _IDLE:
        notes.append(
            f"Others use this machine: its load average was {before:.1f} before and {after:.1f} after, with {threads} "
            "of this benchmark. Variants suffer alike, since they take turns; the fastest times suffer least."
        )
    return notes


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__}  # with what it was built for
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
