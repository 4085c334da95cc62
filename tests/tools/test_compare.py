"""The comparison of a sweep's runs: grouping, statistics against other implementations, costs by hand, the page."""

import csv
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from omegaconf import OmegaConf

from detr.config import build_model, compose
from detr.errors import UserError
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.multihead import MultiHeadAttention
from detr.models.layers.positions import SinePosition
from detr.reporting import pages
from tests.helpers.commands import REPOSITORY, TINY_MODEL
from tools import compare
from tools.comparison import charts, cost, judge
from tools.comparison.runs import Group, Run, find_runs, group_runs
from tools.counts import count_flops

MakeRun = Callable[..., Path]
HOSTILE = '<img src=x onerror="alert(1)">$&'


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_SECONDS", 0.0)


@functools.cache
def configuration(*overrides: str) -> str:
    return OmegaConf.to_yaml(compose([*TINY_MODEL, "data.root=x", "data.size=64", *overrides]))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run's folder as train.py does, without training."""

    def make(
        ap: float = 0.5,
        seed: int = 1,
        *overrides: str,
        name: str | None = None,
        evaluations: int = 3,
        change: Callable[[Any], None] = lambda config: None,
        **metrics: float,
    ) -> Path:
        folder = tmp_path / "runs" / (name or str(len(list((tmp_path / "runs").glob("*")))))
        (folder / "evaluation").mkdir(parents=True)
        config = OmegaConf.create(configuration(*overrides))
        config.update(seed=seed, run_dir=str(tmp_path))
        change(config)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        records: list[dict[str, Any]] = []
        for step in (10, 20, 30):
            speed = {"images_per_second": 7.0 + step, "memory_gb": step / 10, "eta_minutes": (30 - step) / 5}
            records.append({"step": step, "group": "train", "loss": 40.0 - step + seed, **speed})
            if step > 30 - 10 * evaluations:
                records.append({"step": step, "group": "val", "AP": ap * step / 30})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        summary = {"AP": ap, "AP50": ap + 0.1, "APs": 0.1, "APm": 0.2, "APl": 0.3, **metrics}
        per_class = {label: {"AP": ap} for label in ("circle", "square", HOSTILE)}
        (folder / "evaluation" / "metrics.json").write_text(json.dumps({"bbox": summary, "per_class": per_class}))
        return folder

    return make


def make_group(label: str, values: Sequence[float], attention: str = "none") -> Group:
    runs = [
        Run(
            folder=Path(label),
            config={},
            options={"model.attention": attention},
            metrics={"AP": value},
            num_classes=3,
            size=64,
            records=[],
        )
        for value in values
    ]
    return Group(label=label, options={}, runs=runs)


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "compare.csv").open(newline="", encoding="utf-8") as file:
        return {row["group"]: row for row in csv.DictReader(file)}


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_runs_of_several_folders_are_compared(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in range(3):
        make_run(0.3 + seed / 100, seed)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in sorted((tmp_path / "runs").iterdir())[1:]:
        folder.rename(moved / folder.name)
    compare.main([str(moved), str(tmp_path / "runs"), "--output", str(tmp_path / "out")])
    assert rows_of(tmp_path / "out")["none"]["seeds"] == "3"


def test_means_and_spreads_of_what_was_found(make_run: MakeRun, tmp_path: Path) -> None:
    values, small = [0.31, 0.35, 0.42], [0.11, -1.0, 0.17]
    for seed, (ap, aps) in enumerate(zip(values, small, strict=True)):
        make_run(ap, seed, APs=aps, APl=-1.0)
    compare.main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")])
    row = rows_of(tmp_path / "out")["none"]
    assert float(row["AP_mean"]) == pytest.approx(np.mean(values))
    assert float(row["AP_std"]) == pytest.approx(np.std(values, ddof=1))
    assert float(row["APs_mean"]) == pytest.approx(0.14) and float(row["APs_std"]) == pytest.approx(0.06 / 2**0.5)
    assert row["APl_mean"] == row["APl_std"] == "", "-1 is no value"
    assert row["seeds"] == "3" and float(row["memory_gb"]) == 3.0 and float(row["images_per_second"]) == 27.0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert not re.search(r">\s*\W?1\.000", page) and "<td>\N{EN DASH}</td>" in page
    assert "Nothing can be concluded: there is one configuration only, “none”." in page


def test_groups_are_configurations_without_what_belongs_to_one_start(make_run: MakeRun, tmp_path: Path) -> None:
    kinds = {
        "none, optimizer.lr=0.0001": ["model/attention=none"],
        "none, optimizer.lr=0.0005": ["model/attention=none", "optimizer.lr=5e-4"],
        "se, optimizer.lr=0.0001, se.block.reduction=16": ["model/attention=se"],
        "se, optimizer.lr=0.0001, se.block.reduction=8": ["model/attention=se", "model.attention.se.block.reduction=8"],
        "se + criss_cross, optimizer.lr=0.0001": ["model/attention=[se,criss_cross]"],
        "criss_cross + se, optimizer.lr=0.0001": ["model/attention=[criss_cross,se]"],
    }
    for seed in (1, 2):
        for overrides in kinds.values():
            make_run(0.5, seed, *overrides, *(["trainer.resume=auto"] if seed == 2 else []))
    runs, left_out = find_runs(tmp_path / "runs")
    groups = group_runs(runs)
    assert not left_out and [group.label for group in groups] == list(kinds)
    assert [run.folder.name for run in groups[4].runs] == ["4", "10"], "in the order of their numbers"
    assert groups[3].options == {
        "model.attention": "se",
        "optimizer.lr": "0.0001",
        "model.attention.se.block.reduction": "8",
    }
    assert groups[4].options["model.attention.se.block.reduction"] == ""
    assert judge.pick_baseline(groups[1:], None) is groups[1]
    assert judge.pick_baseline(groups, "criss_cross + se, optimizer.lr=0.0001") is groups[5]
    with pytest.raises(UserError, match=r"--baseline: no group is called 'SE'. Choose of: none, .*criss_cross \+ se"):
        judge.pick_baseline(groups, "SE")


def test_where_nothing_but_one_option_differs_it_is_the_label(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(0.5, 1, "model/attention=se")
    make_run(0.5, 1, "model/attention=se", "model.num_queries=9")
    assert [group.label for group in group_runs(find_runs(tmp_path / "runs")[0])] == [
        "model.num_queries=7",
        "model.num_queries=9",
    ]


def test_a_big_difference_is_told_from_none_at_all() -> None:
    baseline = make_group("none", [0.400, 0.408, 0.392])
    groups = [
        baseline,
        make_group("better", [0.450, 0.457, 0.441]),
        make_group("same", [0.402, 0.409, 0.394]),
        make_group("worse", [0.348, 0.352, 0.341]),
        make_group("once", [0.9]),
        make_group("twice", [0.1, 0.11]),
        make_group("untrained", [0.0005, 0.0004, 0.0006]),
    ]
    found = judge.judge(groups, baseline)
    verdicts = [judgement.verdict for judgement in found]
    assert verdicts == ["baseline", "higher", "within the spread", "lower", *["no conclusion"] * 3]
    for judgement in found[1:4]:
        assert judgement.low < judgement.difference < judgement.high
        assert (judgement.low > 0 or judgement.high < 0) == (judgement.verdict != "within the spread")
    assert judge.summary(groups, found, baseline) == (
        "“better” (+0.049) has a higher AP than “none”; “worse” (\N{MINUS SIGN}0.053) has a lower AP; "
        "1 of 3 is within the spread of the seeds; 2 of fewer than 3 seeds cannot be judged; 1 below AP 0.01, which has hardly learned, cannot be judged."
    )
    assert judge.summary(groups[:3:2], found[:3:2], baseline) == (
        "No configuration differs in AP from “none” by more than the spread of the seeds."
    )


def test_one_group_against_another_is_students_test() -> None:
    """With a single treatment Dunnett's test is the t-test with a pooled variance."""
    first, second = [0.41, 0.44, 0.43, 0.40], [0.44, 0.45, 0.43]
    groups = [make_group("none", first), make_group("se", second)]
    _, found = judge.judge(groups, groups[0])
    reference = scipy.stats.ttest_ind(second, first)
    interval = reference.confidence_interval(judge.LEVEL)
    assert found.p_value == pytest.approx(reference.pvalue, abs=5e-4)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert judge.smallest_visible([found]) == pytest.approx((interval.high - interval.low) / 2, abs=1e-4)


@pytest.mark.parametrize(("groups", "seeds", "limit"), [(3, 3, 2.88), (4, 5, 2.65), (2, 7, 2.40)])
def test_intervals_are_as_wide_as_dunnetts_table_says(groups: int, seeds: int, limit: float) -> None:
    """Two-sided limits at 5 %, for as many groups beside the control and (groups + 1) * (seeds - 1) degrees of freedom."""
    values = np.random.default_rng(0).normal(0.4, 0.01, (groups + 1, seeds))
    made = [make_group(str(index), row.tolist()) for index, row in enumerate(values)]
    for found in judge.judge(made, made[0])[1:]:
        error = np.sqrt(values.var(axis=1, ddof=1).mean() * 2 / seeds)
        assert (found.high - found.low) / 2 / error == pytest.approx(limit, abs=0.005)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([[0.4], [0.5]], "single seed"),
        ([[0.4, 0.41], [0.5]], "single seed"),
        ([[0.4, 0.41], [0.5, 0.51]], "the baseline “0” is of fewer than 3 seeds"),
        ([[0.4, 0.41, 0.42], [0.5, 0.51]], "all others are of fewer than 3 seeds"),
        ([[0.0005, 0.0006], [0.0001, 0.0001]], "of fewer than 3 seeds"),
        (
            [[0.0005, 0.0006, 0.0005], [0.0001, 0.0, 0.0001]],
            "the baseline “0” is below AP 0.01, which has hardly learned",
        ),
        ([[0.4, 0.41, 0.42], [0.0001, 0.0, 0.0001]], "all others are below AP 0.01"),
        ([[0.4] * 3, [0.4] * 3], "no spread"),
    ],
)
def test_too_little_says_that_nothing_can_be_concluded(values: list[list[float]], reason: str) -> None:
    groups = [make_group(str(index), found) for index, found in enumerate(values)]
    found = judge.judge(groups, groups[0])
    assert found[1].verdict == "no conclusion" and found[1].p_value is None
    text = judge.summary(groups, found, groups[0])
    assert text.startswith("Nothing can be concluded: ") and reason in text


def test_unfinished_and_repeated_runs_are_left_out(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(name="whole")
    make_run(name="whole_2")
    (make_run(seed=2, name="crashed") / "evaluation" / "metrics.json").unlink()
    stopped = make_run(seed=3, name="stopped") / "metrics.jsonl"
    stopped.write_text("".join(stopped.read_text().splitlines(keepends=True)[:4]) + '{"step": 30, "gro')
    patient = make_run(0.5, 4, "trainer.patience=2", name="patient") / "metrics.jsonl"
    patient.write_text("".join(patient.read_text().splitlines(keepends=True)[:4]))
    compare.main([str(tmp_path / "runs")])
    console, page = capsys.readouterr().out, (tmp_path / "runs" / "compare.html").read_text()
    for name, reason in {
        "whole_2": f"repeats {tmp_path / 'runs' / 'whole'}: the same configuration and seed",
        "crashed": "it has not been evaluated",
        "stopped": "it stopped at step 20, before its end",
    }.items():
        assert f"{tmp_path / 'runs' / name}: {reason}" in console
        assert f"<code>{tmp_path / 'runs' / name}</code>: {reason}" in page
    assert set(rows_of(tmp_path / "runs")) == {"trainer.patience=null", "trainer.patience=2"}


def test_runs_of_version_1_are_compared_with_those_of_today(make_run: MakeRun, tmp_path: Path) -> None:
    recorded = json.loads((REPOSITORY / "tests" / "weights" / "version1" / "small.json").read_text())

    def then(config: Any) -> None:
        OmegaConf.update(config, "model", recorded["config"], merge=False, force_add=True)

    make_run(change=then, name="then")
    make_run(name="today")
    compare.main([str(tmp_path / "runs")])
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    shapes = [shape for name, shape in recorded["tensors"].items() if not name.endswith(buffers)]
    parameters = {int(row["parameters"]) for row in rows_of(tmp_path / "runs").values()}
    assert len(parameters) == 2 and sum(map(math.prod, shapes)) in parameters


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "evaluation/metrics.json"])
@pytest.mark.parametrize("content", ["[1]\n", "}{\n", "{}\n", '{"group": "train"}\n'])
def test_a_damaged_file_is_named(make_run: MakeRun, tmp_path: Path, file: str, content: str) -> None:
    path = make_run() / file
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path} is not what train.py writes (")):
        find_runs(tmp_path / "runs")


SPOILT = [
    ("metrics.jsonl", '"loss": 11.0', '"loss": "x"'),
    ("metrics.jsonl", '"loss": 11.0', '"loss": NaN'),
    ("metrics.jsonl", '"loss": 11.0', '"loss": [1]'),
    ("metrics.jsonl", '"images_per_second": 37.0', '"images_per_second": 0'),
    ("metrics.jsonl", '"memory_gb": 3.0', '"memory_gb": null'),
    ("metrics.jsonl", '"memory_gb": 3.0', '"memory_gb": true'),
    ("metrics.jsonl", '"eta_minutes": 0.0', '"eta_minutes": "soon"'),
    ("metrics.jsonl", '"step": 30, "group": "train"', '"step": "x", "group": "train"'),
    ("metrics.jsonl", '"step": 30, "group": "train"', '"step": -1, "group": "train"'),
    ("metrics.jsonl", '"step": 30, "group": "train"', '"step": 30, "group": ["train"]'),
    ("metrics.jsonl", '"AP": 0.5', '"AP": {}'),
    ("metrics.jsonl", '"AP": 0.5', '"AP": 1e999'),
    ("evaluation/metrics.json", '"AP50": 0.6', '"AP50": "0.6"'),
    ("evaluation/metrics.json", '"AP50": 0.6', '"AP50": NaN'),
    ("evaluation/metrics.json", '"per_class": {', '"per_class": 3, "x": {'),
    ("config.yaml", "  size: 64", "  size: 1000000000"),
    ("config.yaml", "  size: 64", "  size: .inf"),
    ("config.yaml", "  size: 64", "  size: 0"),
]


@pytest.mark.parametrize("file, old, new", SPOILT, ids=str)
def test_values_that_are_none_are_named(make_run: MakeRun, tmp_path: Path, file: str, old: str, new: str) -> None:
    path = make_run() / file
    replace_once(path, old, new)
    with pytest.raises(UserError, match=re.escape(f"{path} is not what train.py writes (")):
        compare.main([str(tmp_path / "runs")])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("option", ["num_layers", "dim_feedforward"])
@pytest.mark.parametrize("value", [10**7, 10**13])
def test_models_of_absurd_size_are_never_made(make_run: MakeRun, tmp_path: Path, option: str, value: int) -> None:
    def change(config: Any) -> None:
        config.model.encoder[option] = value

    path = make_run(change=change) / "config.yaml"
    with pytest.raises(UserError, match=re.escape(f"{path}: model")):
        compare.main([str(tmp_path / "runs")])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "evaluation/metrics.json"])
def test_a_pipe_in_the_place_of_a_file_is_named(make_run: MakeRun, tmp_path: Path, file: str) -> None:
    path = make_run() / file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=re.escape(f"{path} is a device or a pipe, wanted a file.")):
        find_runs(tmp_path / "runs")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "evaluation/metrics.json"])
def test_a_file_that_is_nested_without_end_is_named(make_run: MakeRun, tmp_path: Path, file: str) -> None:
    path = make_run() / file
    path.write_text("[" * 10**5 + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path} is not what train.py writes (")):
        find_runs(tmp_path / "runs")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.hub.load", "repo_or_dir": "{tmp}/evil", "model": "any", "source": "local"},
        {"_target_": "detr.files.write_tensors", "path": "{tmp}/marker", "content": {}},
        {"_target_": "detr.config.build.build", "config": {"_target_": "os.system"}, "path": "x"},
        {"_target_": "os.system", "command": "touch {tmp}/marker"},
        {"_target_": "datasets.shapes.generate", "root": "{tmp}/marker"},
    ],
)
@pytest.mark.parametrize("place", ["model", "model.encoder.position"])
def test_what_a_file_allows_itself_is_no_permission(
    make_run: MakeRun, tmp_path: Path, node: dict[str, Any], place: str
) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "hubconf.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    filled = {
        key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value for key, value in node.items()
    }

    def hostile(config: Any) -> None:
        OmegaConf.update(config, place, filled, merge=False, force_add=True)
        config.allow_targets = ["torch", "torch.hub", "os", "posix", "detr", "datasets"]

    folder = make_run(change=hostile)
    with pytest.raises(UserError) as caught:
        compare.main([str(tmp_path / "runs")])
    assert str(caught.value).startswith(f"{folder / 'config.yaml'}: {place}._target_: '{node['_target_']}' is refused")
    assert "--allow-targets PACKAGE" in str(caught.value) and not (tmp_path / "marker").exists()


def test_packages_that_the_user_names_are_built(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = "from torch import nn\n\n\nclass Block(nn.Identity):\n    def forward(self, x, mask):\n        return x\n"
    (tmp_path / "own_blocks.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    custom = ["allow_targets=[own_blocks]", "model/attention=custom", "model.attention.custom.stages=[layer2]"]
    make_run(0.5, 1, *custom, "model.attention.custom.block._target_=own_blocks.Block")
    with pytest.raises(
        UserError, match=r"'own_blocks\.Block' is refused.*name its package in .*--allow-targets PACKAGE"
    ):
        compare.main([str(tmp_path / "runs")])
    compare.main([str(tmp_path / "runs"), "--allow-targets", "other,own_blocks"])
    assert set(rows_of(tmp_path / "runs")) == {"custom"}


def test_variables_of_the_environment_stay_there(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "xyzzy")
    make_run(0.5, 1)
    path = make_run(0.5, 2) / "config.yaml"
    replace_once(path, "backend: hotcoco", "backend: ${oc.env:SECRET}")
    compare.main([str(tmp_path / "runs")])
    written = (tmp_path / "runs" / "compare.html").read_text() + (tmp_path / "runs" / "compare.csv").read_text()
    assert "xyzzy" not in written and "${oc.env:SECRET}" in written

    replace_once(path, "num_queries: 7", "num_queries: ${oc.env:SECRET}")
    with pytest.raises(UserError, match=r"model\.num_queries: wanted int, got '\$\{oc\.env:SECRET\}'"):
        compare.main([str(tmp_path / "runs")])


@pytest.mark.parametrize("name", ["compare.html", "compare.csv"])
@pytest.mark.parametrize("link", [False, True])
def test_files_of_others_stay(make_run: MakeRun, tmp_path: Path, name: str, link: bool) -> None:
    make_run()
    compare.main([str(tmp_path / "runs")])
    compare.main([str(tmp_path / "runs")])  # it replaces its own
    path, precious = tmp_path / "runs" / name, tmp_path / "precious"
    path.unlink()
    precious.write_text("mine")
    path.symlink_to(precious) if link else precious.rename(path)
    with pytest.raises(UserError, match=re.escape(f"{path} exists already") + ".*--output DIR"):
        compare.main([str(tmp_path / "runs")])
    assert path.read_text() == "mine"


class Page(HTMLParser):
    """Tags with their attributes, and the text of headings."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_stands_alone_and_lets_nothing_in(make_run: MakeRun, tmp_path: Path) -> None:
    def hostile(config: Any) -> None:
        config.model.attention = {HOSTILE: config.model.attention.se}

    for seed in (1, 2, 3):
        make_run(0.40 + seed / 500, seed, "model/attention=none")
        make_run(0.45 + seed / 500, seed, "model/attention=se", change=hostile, name=f"<script>alert({seed})<{seed}>")
    (tmp_path / "runs" / "<b>").mkdir()
    (tmp_path / "runs" / "<b>" / "config.yaml").touch()
    compare.main([str(tmp_path / "runs")])
    content = (tmp_path / "runs" / "compare.html").read_text()
    page = Page(content)
    names = [tag for tag, _ in page.tags]
    assert not {"img", "script", "b", "link", "iframe", "image"} & set(names)
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key == "src"]
    assert not re.search(r"https?:|@import", content) and set(re.findall(r"url\((.)", content)) == {"#"}
    assert "&lt;img" in content and rows_of(tmp_path / "runs").keys() == {"none", HOSTILE}

    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "charts must not share names"
    used = {attributes["href"] for _, attributes in page.tags if attributes.get("href")}
    used |= set(re.findall(r"url\((#[^)]+)\)", content))
    assert {name.removeprefix("#") for name in used} <= set(ids)
    assert ("html", {"lang": "en"}) in page.tags and "viewport" in content and "prefers-color-scheme: dark" in content
    assert names.count("h1") == 1 and all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    charted = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(charted) == names.count("svg") == 6 and all(attributes["aria-label"] for attributes in charted)
    assert not set(pages.STANDINS) & set(re.findall(r"#\w{6}", content)), "a stand-in for a color was left"


def test_what_differs_is_on_the_page_and_in_the_table(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        make_run(0.40 + seed / 500, seed, "model/attention=none")
        make_run(0.45 + seed / 500, seed, "model/attention=criss_cross")
        make_run(0.401 + seed / 500, seed, "model/attention=se")
    compare.main([str(tmp_path / "runs"), "--output", str(tmp_path / "new" / "out")])
    rows, page = rows_of(tmp_path / "new" / "out"), (tmp_path / "new" / "out" / "compare.html").read_text()
    assert list(rows) == ["none", "criss_cross", "se"], "the baseline, then the best first"
    spreads = [f"{name}_{kind}" for name in ("AP", "AP50", "APs", "APm", "APl") for kind in ("mean", "std")]
    difference = ["difference", "ci_low", "ci_high", "p_value", "verdict"]
    costs = ["parameters", "added_parameters", "flops", "latency_ms", "memory_gb", "images_per_second"]
    assert list(rows["se"]) == ["group", "seeds", *spreads, *difference, *costs, "model.attention"]
    assert "“criss_cross” (+0.050) has a higher AP than “none”; 1 of 2 is within the spread of the seeds." in page
    assert [row["verdict"] for row in rows.values()] == ["baseline", "higher", "within the spread"]
    assert "▲ higher" in page and "≈ within the spread" in page and "AP against the training step" in page
    for label, row in rows.items():
        model = build_model(compose([*TINY_MODEL, f"model/attention={label}"]).model, num_classes=3)
        assert int(row["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
        assert int(row["added_parameters"]) == int(row["parameters"]) - int(rows["none"]["parameters"])
        assert float(row["latency_ms"]) > 0
    assert int(rows["criss_cross"]["flops"]) > int(rows["none"]["flops"])


def test_curves_are_of_ap_where_all_runs_have_several(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(0.4, 1)
    make_run(0.5, 2)
    for evaluations, name in ((3, "AP"), (1, "training loss")):
        if evaluations == 1:
            make_run(0.6, 3, evaluations=1)
        groups = group_runs(find_runs(tmp_path / "runs")[0])
        shown, _ = charts.curves(groups, judge.judge(groups, groups[0]), groups[0])
        assert shown == name


def test_operations_of_an_encoder_are_those_by_hand() -> None:
    height, width, d, feed, layers = 5, 7, 24, 44, 3
    n = height * width
    encoder = TransformerEncoder(
        position=SinePosition(d_model=d), d_model=d, nhead=3, num_layers=layers, dim_feedforward=feed, dropout=0.0
    ).requires_grad_(False)
    x, mask = torch.randn(1, d, height, width), torch.zeros(1, height, width, dtype=torch.bool)
    attention = 2 * (3 * n * d * d + n * n * d + n * n * d + n * d * d)  # projections, products, sums, projection
    for padded in (False, True):
        counted = count_flops(lambda padded=padded: encoder([x], [mask], padded=padded))
        assert counted == layers * (attention + 2 * 2 * n * d * feed)


def test_attention_counts_whatever_computes_it() -> None:
    block = MultiHeadAttention(d_model=16, nhead=2).requires_grad_(False)
    x = torch.randn(1, 11, 16)
    assert count_flops(lambda: block.attend(x, x, x)) == 2 * (4 * 11 * 16 * 16 + 2 * 11 * 11 * 16)


def test_a_real_run_is_understood(tiny_options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "0"
    train = [*tiny_options, "model/attention=se", "trainer.max_steps=2", "log_every=1", f"run_dir={folder}"]
    subprocess.run([sys.executable, "train.py", *train], cwd=REPOSITORY, check=True, capture_output=True)
    compare.main([str(tmp_path / "sweep")])
    row = rows_of(tmp_path / "sweep")["se"]
    expected = json.loads((folder / "evaluation" / "metrics.json").read_text())["bbox"]
    assert float(row["AP50_mean"]) == expected["AP50"] and row["seeds"] == "1"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [record["images_per_second"] for record in records if record["group"] == "train"]
    assert float(row["images_per_second"]) == pytest.approx(statistics.median(speeds))


def test_nothing_to_compare_is_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "tools/compare.py", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"Error: {tmp_path} holds no finished run. Train some with: python train.py -m ")
    with pytest.raises(UserError, match=r"missing is not a folder. Give the run_dir of a sweep. Train some with: "):
        compare.main([str(tmp_path / "missing")])
