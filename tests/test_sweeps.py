"""Sweeps by submitit, with its local executor in place of SLURM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import torchrun
from tests.helpers.commands import REPOSITORY

pytest.importorskip("submitit", reason="needs the extra `sweep`")
pytestmark = pytest.mark.slow


def command(options: list[str], folder: Path, *more: str) -> list[str]:
    own = ["data.batch_size=2", "log_every=1", f"run_dir={folder}", "hydra/launcher=submitit_local"]
    return [sys.executable, "train.py", "-m", *options, *own, *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder) if record["group"] == "train"]


def test_a_sweep_of_two_jobs(tiny_options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    subprocess.run(
        command(tiny_options, folder, "seed=1,2", "trainer.max_steps=2"),
        cwd=REPOSITORY,
        env=environment(),
        check=True,
    )
    assert steps(folder / "0") == steps(folder / "1") == [1, 2]
    first, second = ([record.get("loss") for record in records(folder / job)] for job in ("0", "1"))
    assert first != second


def test_a_job_of_two_processes_trains_as_with_torchrun(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "trainer.max_steps=3"]
    subprocess.run(
        command(options, tmp_path / "sweep", "hydra.launcher.tasks_per_node=2"),
        cwd=REPOSITORY,
        env=environment(),
        check=True,
    )
    own = ["data.batch_size=2", "log_every=1", f"run_dir={tmp_path / 'straight'}"]
    subprocess.run(torchrun([*options, *own]), cwd=REPOSITORY, env=environment(), check=True)
    losses = [
        [record["loss"] for record in records(folder) if record["group"] == "train"]
        for folder in (tmp_path / "sweep" / "0", tmp_path / "straight")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_job_that_has_to_give_way_goes_on_from_its_step(
    tiny_options: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    folder, last = tmp_path / "sweep", 60
    options = [*tiny_options, f"trainer.max_steps={last}", "trainer.resume=auto", "trainer.evaluate_every=100"]
    sweep = subprocess.Popen(
        command(options, folder),
        cwd=REPOSITORY,
        env=environment(SUBMITIT_PREEMPT_SIGNAL=number.name.removeprefix("SIG")),
    )
    deadline = time.monotonic() + 300
    while not steps(folder / "0"):
        assert time.monotonic() < deadline and sweep.poll() is None
        time.sleep(0.05)
    os.kill(task_of(folder), number)
    assert sweep.wait(timeout=300) == 0
    assert steps(folder / "0") == list(range(1, last + 1))
    going_on = (folder / "0" / "train.log").read_text().partition("Going on from ")[2]
    assert 1 <= int(going_on.partition(" at step ")[2].partition(" of ")[0]) < last


def task_of(folder: Path) -> int:
    """Process of a sweep's only job."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "submitit.core._submit" in words and any(word.startswith(str(folder)) for word in words):
            return int(process.name)
    raise AssertionError("no process of the job was found")
