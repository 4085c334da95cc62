"""A function with `command` is a command: options, run folder, exit codes."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from detr import distributed
from detr.cli import command, run_directory
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
        monkeypatch.setattr(sys, "argv", [f"{name}.py", f"run_dir={tmp_path}", *overrides])
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
    monkeypatch.setattr("detr.cli.run_folder.job", lambda: type("Job", (), {"overrides": ["seed=1"]}))
    assert run("train", look) == 2
