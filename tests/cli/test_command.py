"""A function with `command` is a command: options, run folder, exit codes."""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from detr import distributed
from detr.cli.command import command
from detr.cli.run_folder import run_directory
from detr.config.command_line import Job
from detr.config.moved import MOVED
from detr.errors import UserError

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs a function as the command of a configuration; gives its exit code. Leaves nothing behind."""
    root, hydra = logging.getLogger(), HydraConfig.instance()
    handlers, level, composed = root.handlers[:], root.level, hydra.cfg

    def start(name: str, function: Callable[[Any], None], *overrides: str) -> int:
        root.handlers.clear()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *overrides, f"run_dir={tmp_path}"])
        monkeypatch.setenv("HYDRA_MAIN_MODULE", name)  # from which Hydra takes the name of the job
        try:
            command(name)(function)()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    yield start
    for handler in root.handlers:
        with contextlib.suppress(ValueError):
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    GlobalHydra.instance().clear()
    hydra.cfg = composed


def test_gets_the_checked_configuration(run: Run) -> None:
    seen: list[Any] = []
    assert run("train", seen.append, "trainer.epochs=3", "model.num_queries=7") == 0
    [config] = seen
    assert (config.trainer.epochs, config.model.num_queries) == (3, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epochs=0", "trainer.epochs: wanted at least 1, got 0."),
        ("model.boxes=3", "model.boxes has moved: set model.num_queries."),
        ("+model.boxes=3", "model.boxes has moved: set model.num_queries."),
        ("epochs=3", "There is no option epochs. Did you mean trainer.epochs?"),
        ("data=coco", "The option data.root has no value. Set data.root=... on the command line."),
        ("debug=maybe", "Value 'maybe' is not a valid bool"),
    ],
)
def test_a_wrong_option_ends_it_with_one_message(
    run: Run, override: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MOVED, "model.boxes", "model.num_queries")

    def never(config: Any) -> None:
        raise AssertionError

    assert run("train", never, override) == 2
    shown = "".join(capfd.readouterr())
    assert message in shown and "Traceback" not in shown


def test_an_error_inside_ends_it_too(run: Run) -> None:
    def fail(config: Any) -> None:
        raise UserError("a: wanted b.")

    assert run("predict", fail, "checkpoint=x", "source=x") == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a: wanted b."), 2),
        pytest.param(RuntimeError("ours"), 1, marks=pytest.mark.slow),
    ],
)
def test_a_failed_job_of_a_sweep_leaves_the_others_to_run(
    run: Run, error: Exception, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[int, float]] = []

    def fail_for_one_seed(config: Any) -> None:
        ran.append((config.seed, config.optimizer.lr))
        if config.seed == 2:
            raise error

    sweep = ("-m", "optimizer.lr=1e-3,1e-4", "seed=1,2,3", "log_every=7")
    assert run("train", fail_for_one_seed, *sweep) == code
    assert ran == [(seed, lr) for lr in (1e-3, 1e-4) for seed in (1, 2, 3)]
    shown = "".join(capfd.readouterr())
    assert "2 of the sweep's jobs failed; the others ran:" in shown
    for job, lr in ((1, "0.001"), (4, "0.0001")):
        assert f"  job {job}, optimizer.lr={lr} seed=2: {error}" in shown
    assert ("Traceback" in shown) == (code == 1)
    assert run("train", lambda config: None, *sweep) == 0, "those of an earlier sweep are forgotten"
    assert not (tmp_path / ".failed.jsonl").exists()


def test_a_signal_ends_a_whole_sweep(run: Run) -> None:
    ran: list[int] = []

    def stop(config: Any) -> None:
        ran.append(config.seed)
        signal.raise_signal(signal.SIGTERM)

    assert run("train", stop, "-m", "seed=1,2") == 75
    assert ran == [1]


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_the_run_folder_of_a_training_holds_the_configuration(run: Run, name: str, tmp_path: Path) -> None:
    """evaluate.py and predict.py write theirs with their results."""

    def look(config: Any) -> None:
        with run_directory(config) as folder:
            assert folder == tmp_path
            assert (folder / ".lock").exists() == (folder / "config.yaml").exists() == (name == "train")
            if name == "train":
                content = yaml.safe_load((folder / "config.yaml").read_text())
                assert content["device"] == "cpu" and content["run_dir"] == str(tmp_path)

    needed = ["checkpoint=x", "data.val.images=x", "data.val.annotations=x"] if name == "evaluate" else []
    assert run(name, look, "device=cpu", *needed) == 0


def test_several_processes_need_a_folder_and_the_first_one_writes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(config: Any) -> None:
        with run_directory(config) as folder:
            assert folder == tmp_path and not (folder / "config.yaml").exists()

    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert run("train", look) == 0
    without = Job(name="train", folder=tmp_path, overrides=["seed=1"])
    monkeypatch.setattr("detr.cli.run_folder.job", lambda: without)
    assert run("train", look) == 2


def hold(content: dict[str, str], folder: Path) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("content", "resume", "message"),
    [
        (
            {"checkpoints/last.pt": "x", "metrics.jsonl": "x"},
            "null",
            "holds a training already (checkpoints and metrics",
        ),
        (
            {"checkpoints/best.pt": "x"},
            "null",
            "Go on with it: trainer.resume=auto. Or choose another folder: run_dir=PATH",
        ),
        ({"metrics.jsonl": "x"}, "null", "holds a training already"),
        ({"config.yaml": "mine: 1"}, "null", "holds config.yaml of something else than a training"),
        ({"config.yaml": "mine: 1"}, "auto", "holds config.yaml of something else than a training"),
        ({"predictions/0.jpg": "x"}, "null", "holds predictions of something else"),
    ],
)
def test_a_training_replaces_nothing(
    run: Run, tmp_path: Path, content: dict[str, str], resume: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(content, tmp_path)

    def train(config: Any) -> None:
        with run_directory(config):
            raise AssertionError("begun")

    assert run("train", train, f"trainer.resume={resume}") == 2
    assert message in capsys.readouterr().out
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == content, "nothing is changed, added or left behind"


@pytest.mark.parametrize("content", [{}, {"checkpoints/last.pt": "x", "config.yaml": "of an earlier version"}])
def test_a_training_goes_on_in_its_folder(run: Run, tmp_path: Path, content: dict[str, str]) -> None:
    def train(config: Any) -> None:
        with run_directory(config):
            pass

    hold(content, tmp_path)
    assert run("train", train, "trainer.resume=auto") == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 42
    assert run("train", train, "trainer.resume=auto", "seed=3") == 0  # a training that had not come to a checkpoint
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 3


def test_a_failed_command_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    def fail(config: Any) -> None:
        with run_directory(config):
            raise UserError("no data")

    assert run("train", fail) == 2 and list(tmp_path.iterdir()) == []

    def fail_later(config: Any) -> None:
        with run_directory(config) as folder:
            (folder / "metrics.jsonl").write_text("a result")
            raise UserError("no data")

    assert run("train", fail_later) == 2
    assert {path.name for path in tmp_path.iterdir()} >= {"config.yaml", "metrics.jsonl", "train.log"}
