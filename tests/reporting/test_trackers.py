"""Trackers have what TensorBoard has, also after a kill, and never end a training. Each is read back by its own reader."""

import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detr.config import build, compose
from detr.errors import UserError
from detr.evaluation import Sample
from detr.reporting import MLflow, Reporter, TensorBoard, Trackio, WandB
from detr.reporting.trackers import Tracker
from detr.types import Detections

Points = dict[str, list[tuple[int, float]]]
CONFIG = "seed: 3\nmodel:\n  sizes: [1, 2]\n  name: small\n"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account, no network, no settings of whoever runs the tests."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with mock.patch.dict(os.environ):
        yield


def train(folder: Path, tracker: Tracker, first: int, last: int, *, close: bool = True) -> Reporter:
    """A training from one step to another, with TensorBoard and a tracker, an evaluation at every fourth step.

    close: False kills it.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    reporter = Reporter(sinks={"tensorboard": TensorBoard(), "tracker": tracker}, run_dir=folder, log_every=2)
    nothing = Detections(
        boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64), names=[],
        queries=torch.zeros(0, dtype=torch.int64),
    )  # fmt: skip
    sample = Sample(torch.full((3, 20, 30), 200, dtype=torch.uint8), truth=nothing, found=nothing)
    reporter.start(first, total_steps=8)
    for step in range(first + 1, last + 1):
        reporter.step(
            step, {"loss": float(step), "grad_norm": 0.75, "grad_norm/encoder": 0.5}, {"lr": 0.25}, images=3, waited=0.0
        )
        if step % 4 == 0:
            reporter.evaluation(step, {"AP": step / 100, "AR": float("nan")}, [sample, sample])
    if close:
        reporter.__exit__(None, None, None)
    return reporter


def of_tensorboard(folder: Path) -> Points:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found | {tag: [(one.step, 0.0) for one in events.Images(tag)] for tag in events.Tags()["images"]}


def assert_same(found: Mapping[str, list[tuple[int, float]]], folder: Path) -> None:
    """Names and steps of everything, and values of what does not measure time."""
    wanted = of_tensorboard(folder)
    assert {name: [step for step, _ in points] for name, points in found.items()} == {
        name: [step for step, _ in points] for name, points in wanted.items()
    }
    for name in ("train/loss", "train/grad_norm/encoder", "train/lr", "val/AP"):
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in wanted[name]])
    assert [step for step, _ in found["train/loss"]] == [2, 4, 6, 8]
    assert [step for step, _ in found["val/AP"]] == [step for step, _ in found["val/1"]] == [4, 8]


def killed_and_resumed(folder: Path, make: Any) -> None:
    """Killed at step 6 after the checkpoint of step 4, whose evaluation is repeated, as is the record of step 6."""
    killed = train(folder, make(), 0, 7, close=False)
    [tracker] = [sink for sink in killed.sinks if isinstance(sink, Tracker)]
    tracker.close()  # which the tracker's own process or thread does soon after a training was killed
    time.sleep(1.1)  # W&B names the folders of offline runs by the second
    train(folder, make(), 4, 8)


def points_of_wandb(folder: Path) -> tuple[Points, list[str], dict[str, Any]]:
    """From all offline runs of a folder: LevelDB's log format around records of protobuf."""
    from wandb.proto import wandb_internal_pb2 as proto

    points: Points = defaultdict(list)
    runs, config = [], {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        content, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind not in (1, 4):  # the first or a middle part of a record
                continue
            one = proto.Record.FromString(whole)
            whole = b""
            if one.HasField("run"):
                runs.append(one.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in one.run.config.update}
            values = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in one.history.item}
            for name, value in values.items():
                if isinstance(name, tuple) and name[1:] == ("_type",):
                    points[name[0]].append((values["_step",], 0.0))
                elif len(name) == 1 and not name[0].startswith("_"):
                    points[name[0]].append((values["_step",], float(value)))
    return points, runs, config


def test_wandb_offline_has_what_tensorboard_has(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    killed_and_resumed(tmp_path / "run", WandB)
    wandb.teardown()  # its own process writes the rest of its files, as at the end of a command
    points, runs, config = points_of_wandb(tmp_path / "run")
    assert_same(points, tmp_path / "run")
    assert len(set(runs)) == 1 and json.loads((tmp_path / "run" / "wandb.json").read_text())["run"] == runs[0]
    assert config["seed"] == 3 and config["model"]["name"] == "small"
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/val/*.jpg"))) == 4


def test_mlflow_has_what_tensorboard_has(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    killed_and_resumed(tmp_path / "run", MLflow)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    [experiment] = [one for one in client.search_experiments() if one.name == "detr"]
    [run] = client.search_runs([experiment.experiment_id])
    found = {
        name.replace(".", "/"): [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    for index in range(2):
        files = client.list_artifacts(run.info.run_id, f"val/{index}")
        found[f"val/{index}"] = sorted((int(Path(one.path).stem.partition("_")[2]), 0.0) for one in files)
    assert_same(found, tmp_path / "run")
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params == {"seed": "3", "model.sizes": "[1, 2]", "model.name": "small"}
    [path] = (tmp_path / "run" / "mlruns").rglob("config.yaml")
    assert path.read_text() == CONFIG
    picture = next((tmp_path / "run" / "mlruns").rglob("step_8.jpg"))
    assert Image.open(picture).format == "JPEG"


def test_trackio_has_what_tensorboard_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio")
    from trackio import api, utils
    from trackio.sqlite_storage import SQLiteStorage

    project = f"test-{tmp_path.name.replace('_', '-')}"
    killed_and_resumed(tmp_path / "run", lambda: Trackio(project=project))
    [run] = api.Api().runs(project)
    name = json.loads((tmp_path / "run" / "trackio.json").read_text())["run"]
    assert run.name == name and name.startswith("run-")
    assert run.config is not None and run.config["seed"] == 3 and run.config["model"]["name"] == "small"
    points: Points = defaultdict(list)
    for row in SQLiteStorage.get_logs(project, name):
        for key, value in row.items():
            if "/" in key:
                points[key].append((row["step"], value if isinstance(value, int | float) else 0.0))
    assert_same(points, tmp_path / "run")
    assert utils.TRACKIO_DIR.exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_configuration_switches_them_on(name: str, tmp_path: Path) -> None:
    assert set(compose([]).logger) == {"progress", "jsonl", "tensorboard"}
    config = compose([f"logger=[default,{name}]", f"logger.{name}.name=mine"])
    sinks = build(config.logger, path="logger")
    assert list(sinks) == ["progress", "jsonl", "tensorboard", name] and isinstance(sinks[name], Tracker)
    with (
        mock.patch.dict(sys.modules, {name: None}),
        pytest.raises(UserError, match=rf"logger\.{name} needs the package {name}\. .*'detr-framework\[{name}\]'"),
    ):
        (tmp_path / "config.yaml").write_text(CONFIG)
        sinks[name].start(tmp_path, 0, 1)
    with pytest.raises(UserError, match=r"logger\.wandb\.mode: wanted"):
        compose(["logger=[default,wandb]", "logger.wandb.mode=sometimes"])


def test_without_an_account_the_remedies_are_named(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match=r"no run can be begun: .*wandb login`, or set logger\.wandb\.mode=offline"):
        WandB(mode="online").start(tmp_path, 0, 1)
    assert not (tmp_path / "wandb.json").exists()


def test_a_server_that_is_gone_is_named(tmp_path: Path, free_port: int) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match=r"logger\.mlflow: no run can be begun: .*Check logger\.mlflow\.tracking_uri"):
        MLflow(tracking_uri=f"http://127.0.0.1:{free_port}").start(tmp_path, 0, 1)


class Failing(Tracker):
    """Begins, and then raises what libraries raise."""

    package = "failing"
    remedy = "Do something."

    def __init__(self) -> None:
        self.calls = 0

    def _begin(self, run_dir: Path, run: str | None, config: Mapping[str, Any]) -> str:
        return "a"

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        raise RuntimeError("the network is gone.\nmore")

    def _pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        raise AssertionError

    def _end(self, *, failed: bool) -> None:
        raise AssertionError


def test_one_that_fails_later_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Failing()
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", tracker, 0, 8)
    assert tracker.calls == 1
    assert "Nothing more goes to Failing: failing: the network is gone." in caplog.text
    assert [step for step, _ in of_tensorboard(tmp_path / "run")["train/loss"]] == [2, 4, 6, 8]


@pytest.mark.parametrize("content", ["", "[1]", '{"run": 5, "steps": {}}', '{"run": "a", "steps": {"train": "x"}}'])
def test_a_damaged_note_of_the_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "failing.json").write_text(content)
    with pytest.raises(UserError, match=r"failing\.json"):
        Failing().start(tmp_path, 0, 1)
