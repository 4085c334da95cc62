"""Measurements, and the file that keeps those of the documentation: benchmarks/results.json.

`benchmarks/run.py --save` and `benchmarks/trainings.py` write it. The tables of README.md and docs/ are made of it, by
`make tables`.
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

FILE = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Row:
    """One measurement.

    case: what was measured. quantity: what of it.
    target: the largest value wanted of ours, or the smallest where `more_is_better`.
    published: the published code's value in the same run. elsewhere: the same, measured on another machine.
    """

    case: str
    quantity: str
    unit: str
    ours: float
    target: float | None = None
    published: float | None = None
    elsewhere: float | None = None
    more_is_better: bool = False

    @property
    def gain(self) -> float | None:
        """How many times better ours is than the published code's."""
        if self.published is None:
            return None
        return self.ours / self.published if self.more_is_better else self.published / self.ours

    def cells(self) -> list[str]:
        target = "" if self.target is None else f"{'≥' if self.more_is_better else '≤'} {_number(self.target)}"
        better, worse = (self.ours, self.target) if self.more_is_better else (self.target, self.ours)
        met = "" if better is None or worse is None else "yes" if better >= worse else "no"
        ratio = "" if self.gain is None else f"{_number(self.gain)}x"
        published, elsewhere = _number(self.published), _number(self.elsewhere)
        return [self.case, self.quantity, self.unit, _number(self.ours), target, met, published, ratio, elsewhere]


def table(rows: Sequence[Row]) -> str:
    """All rows in markdown."""
    head = ["case", "quantity", "unit", "ours", "target", "met", "published, this run", "gain"]
    head.append("published, as measured on another 2-core machine")
    return markdown([head, *(row.cells() for row in rows)])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of which the first line is the head."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


@dataclass(frozen=True)
class Record:
    """The rows of one case, with the command that gave them, the day and the machine."""

    command: str
    date: str
    machine: str
    rows: list[Row]

    def find(self, quantity: str) -> Row | None:
        return next((row for row in self.rows if row.quantity == quantity), None)

    def row(self, quantity: str) -> Row:
        if (found := self.find(quantity)) is None:
            raise KeyError(f"{FILE.name} has no {quantity!r} of {self.command}")
        return found

    def value(self, quantity: str) -> float:
        return self.row(quantity).ours


def load(benchmark: str) -> dict[str, Record]:
    """The records of a benchmark in the file of results, by case."""
    return {
        case: Record(**{**record, "rows": [Row(case=case, **row) for row in record["rows"]]})
        for case, record in _read()[benchmark].items()
    }


def save(
    benchmark: str, rows: Sequence[Row], *, command: str, threads: int, device: str = "cpu", whole: bool = True
) -> None:
    """Put rows into the file of results, those of a GPU under a name of their own.

    whole: they take the place of all results of the benchmark, else of those of the same cases.
    """
    about = {"command": command, "date": date.today().isoformat(), "machine": machine(threads, device)}
    benchmark = benchmark if device == "cpu" else f"{benchmark} on {device}"
    cases: dict[str, Any] = {row.case: {**about, "rows": []} for row in rows}
    for row in rows:
        given = [part for part in fields(row) if part.name != "case" and getattr(row, part.name) != part.default]
        cases[row.case]["rows"].append({part.name: getattr(row, part.name) for part in given})
    with FileLock(FILE.with_suffix(".lock")):  # trainings may run beside each other
        records = _read()
        records[benchmark] = cases if whole else {**records.get(benchmark, {}), **cases}
        written = FILE.with_suffix(".part")
        written.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.replace(FILE)


def this_command() -> str:
    """The command line of this process as a user types it, but for --save and for where their files are."""
    script = Path(sys.argv[0]).resolve().relative_to(FILE.parents[1])
    words = [word for word in sys.argv[1:] if word != "--save"]
    return shlex.join(["python", str(script), *("PATH" if Path(word).exists() else word for word in words)])


def machine(threads: int, device: str) -> str:
    """The processor or GPU, the threads and torch's version."""
    torch_version = torch.__version__.partition("+")[0]
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch_version}"
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", about.read_text(), re.M) if about.exists() else None
    processor = named[1] if named else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    counted = f"{threads} thread{'s' * (threads != 1)}"
    return f"{processor} ({capability}, {os.cpu_count()} cores), {counted}, torch {torch_version}"


def _read() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
