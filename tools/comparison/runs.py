"""The runs of a sweep, read from their folders and grouped by configuration."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from detr.contents import Check, flat, items, number, record, text, whole
from detr.errors import UserError
from detr.files import read_regular
from detr.folders import command
from tools.stored import read_config

METRICS = ("AP", "AP50", "APs", "APm", "APl")
_MANY = number(-1e30, 1e30)
# What each record has, and the metrics.
_ROW = record(step=whole(), group=text)
_OF_GROUP: dict[str, Check] = {
    "train": record(loss=_MANY, images_per_second=number(1e-9, 1e9), memory_gb=number(0, 1e9), eta_minutes=_MANY),
    "val": record(AP=number(-1, 1)),
}
_METRICS = record(bbox=record(**dict.fromkeys(METRICS, number(-1, 1))), per_class=record())
_CONFIG = record(trainer=record(), data=record(size=whole(1, 2**14)), model=record())
_ATTENTION = "model.attention"
_MOST = 2**28  # bytes of a run's records: about a million lines
_OF_A_START = ("seed", "run_dir", "debug", "trainer.resume")  # options that make no configuration another one
_HOW_TO = f"Train some with: {command('train')} -m model/attention=none,se seed=1,2,3 run_dir=DIR"


@dataclass(frozen=True)
class Run:
    """One finished training.

    config: as its file has it.
    options: the configuration but for what belongs to a single start, as text by dotted name; `model.attention` is
        the names of the blocks in their order.
    metrics: COCO's, from its last evaluation; -1 where there was nothing to find.
    size: short side of its images, in pixels. records: what is in its metrics.jsonl.
    """

    folder: Path
    config: dict[str, Any]
    options: dict[str, str]
    metrics: dict[str, float]
    num_classes: int
    size: int
    records: list[dict[str, Any]]

    def by_step(self, name: str, group: str) -> dict[int, float]:
        """A record's value at each step that has it, in the group 'train' or 'val'."""
        return {row["step"]: row[name] for row in self.records if row["group"] == group and name in row}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    options: where groups differ, by dotted name; empty text where this one has no such option.
    """

    label: str
    options: dict[str, str]
    runs: list[Run]

    @property
    def has_attention(self) -> bool:
        return self.runs[0].options[_ATTENTION] != "none"

    def values(self, metric: str) -> list[float]:
        """A COCO metric of each run, without those that had nothing to find."""
        return [run.metrics[metric] for run in self.runs if run.metrics[metric] != -1]

    def memory(self) -> float:
        """Most memory held in training by any run, in GiB: of the device, or main memory where there is none."""
        return max(max(run.by_step("memory_gb", "train").values()) for run in self.runs)

    def speed(self) -> float:
        """Training images a second: the median over a run's records, the mean over runs."""
        speeds = [run.by_step("images_per_second", "train").values() for run in self.runs]
        return statistics.fmean(map(statistics.median, speeds))


def find_runs(*folders: Path) -> tuple[list[Run], dict[Path, str]]:
    """All finished runs somewhere below some folders, and why the others were left out.

    Raises UserError where there is none, or a file cannot be understood.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. Give the run_dir of a sweep. {_HOW_TO}")
    paths = {path for folder in folders for path in folder.rglob("config.yaml")}
    runs: dict[tuple[Any, ...], Run] = {}
    left_out: dict[Path, str] = {}
    # Shorter names first: 10 comes after 9.
    for path in sorted(paths, key=lambda path: (len(path.parts), len(str(path)), path)):
        found = _read(path.parent)
        if isinstance(found, str):
            left_out[path.parent] = found
            continue
        key = (str(found.config.get("seed")), *sorted(found.options.items()))
        if key in runs:
            left_out[path.parent] = f"repeats {runs[key].folder}: the same configuration and seed"
        runs.setdefault(key, found)
    if not runs:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in left_out.items())
        raise UserError(f"{' and '.join(map(str, folders))} holds no finished run. {_HOW_TO}{reasons}")
    return list(runs.values()), left_out


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by their options, in the order of the first run of each group."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.options.items())), []).append(run)
    options = _without_common([members[0].options for members in groups.values()])
    names = [name for name in _names(options) if len({of_group.get(name) for of_group in options}) > 1]
    return [
        Group(label=label, options={name: of_group.get(name, "") for name in names}, runs=members)
        for label, of_group, members in zip(_labels(options, names), options, groups.values(), strict=True)
    ]


def _read(folder: Path) -> Run | str:
    """The run of a folder, or why it does not count as one."""
    metrics, records = folder / "evaluation" / "metrics.json", folder / "metrics.jsonl"
    if not (metrics.exists() and records.exists()):
        return "it has not been evaluated"
    with _damage_named(folder / "config.yaml"):
        config = read_config(folder / "config.yaml")
        _CONFIG(config, "")
        options = _options(config)
        patience, size = config["trainer"].get("patience"), config["data"]["size"]
    with _damage_named(records):
        # A run that was killed leaves half a line.
        lines = read_regular(records, _MOST).decode().rpartition("\n")[0].splitlines()
        rows = [json.loads(line) for line in lines]
        items(_row)(rows, "")
        left = [row["eta_minutes"] for row in rows if row["group"] == "train"]
    # Only at the last step no time is left; where patience ended the training it is an evaluation that came last.
    if not left or rows[-1]["group"] != "val" or (left[-1] > 0 and patience is None):
        return f"it stopped at step {rows[-1]['step'] if rows else 0}, before its end"
    with _damage_named(metrics):
        found = json.loads(read_regular(metrics, _MOST))
        _METRICS(found, "")
        summary = {name: float(found["bbox"][name]) for name in METRICS}
        num_classes = len(found["per_class"])
    if summary["AP"] == -1:
        return "its validation data hold no objects"
    return Run(
        folder=folder,
        config=config,
        options=options,
        metrics=summary,
        num_classes=num_classes,
        size=size,
        records=rows,
    )


def _row(value: Any, place: str) -> None:
    _ROW(value, place)
    _OF_GROUP.get(value["group"], _ROW)(value, place)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Report whatever goes wrong with a file's content with the file's path."""
    try:
        yield
    except UserError:
        raise
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path} is not what train.py writes ({reason}). Repair it, or remove the run's folder."
        ) from None


def _options(config: dict[str, Any]) -> dict[str, str]:
    model = dict(config["model"])
    blocks = model.pop("attention", None) or {}
    rest = {name: value for name, value in flat({**config, "model": model}) if name not in _OF_A_START}
    return {
        _ATTENTION: " + ".join(blocks) or "none",
        **{f"{_ATTENTION}.{name}": value for name, value in flat(blocks)},
        **rest,
    }


def _names(groups: Iterable[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for options in groups for name in options))


def _without_common(groups: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Without the options of attention blocks that are the same in all groups with the same blocks."""

    def common(name: str, blocks: str) -> bool:
        return len({options.get(name) for options in groups if options[_ATTENTION] == blocks}) == 1

    return [
        {
            name: value
            for name, value in options.items()
            if not (name.startswith(f"{_ATTENTION}.") and common(name, options[_ATTENTION]))
        }
        for options in groups
    ]


def _labels(groups: Sequence[dict[str, str]], differing: Sequence[str]) -> list[str]:
    """A name for each group, of as few options as distinguish them; the attention blocks first, if they differ."""
    chosen = [_ATTENTION] if _ATTENTION in differing or len(groups) == 1 else []

    def distinguished(names: Sequence[str]) -> int:
        return len({tuple(options.get(name) for name in names) for options in groups})

    while distinguished(chosen) < len(groups):
        chosen.append(max(differing, key=lambda name: distinguished([*chosen, name])))
    return [
        ", ".join(
            options[name] if name == _ATTENTION else f"{name.removeprefix(f'{_ATTENTION}.')}={options[name]}"
            for name in chosen
            if name in options
        )
        for options in groups
    ]
