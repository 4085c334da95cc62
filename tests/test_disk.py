"""Disks that are full and folders that are gone while a training saves: nothing that was saved is lost."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from detr.weights import read_checkpoint
from tests.helpers import with_small_disk
from tests.helpers.commands import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_full_disk(tiny_options: list[str], tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    namespace, mount = with_small_disk(disk, "150m")  # three checkpoints of 45 MB, and one in the making
    train = [sys.executable, "train.py", *tiny_options, f"run_dir={disk}/run", "trainer.save_every_steps=1"]
    train += ["trainer.max_steps=6", "trainer.keep=5"]
    copy = f"cp {disk}/run/checkpoints/* {kept}"
    done = subprocess.run(
        [*namespace, f'{mount} && "$0" "$@"; code=$?; {copy}; exit $code', *train],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in output, output
    assert "Cannot write" in output and "No space left on device" in output and "trainer.resume=auto" in output
    print(output.splitlines()[-1])
    saved = [read_checkpoint(path).training["step"] for path in sorted(kept.glob("last*.pt"))]
    assert saved and max(saved) >= 1 and not list(kept.glob("*.tmp"))


@pytest.mark.parametrize("gone", ["run/checkpoints", "run"])
def test_a_folder_that_is_gone_is_made_again(tiny_options: list[str], tmp_path: Path, gone: str) -> None:
    """But for TensorBoard's own file, without which the training goes on."""
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    process = start(tiny_options, tmp_path / "run")
    wait(last.exists, process)
    shutil.rmtree(tmp_path / gone, ignore_errors=True)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert ("Nothing more goes to TensorBoard" in output) == (gone == "run")
    assert read_checkpoint(last).training["step"] == 12


def test_a_folder_that_cannot_be_made_again(tiny_options: list[str], tmp_path: Path) -> None:
    process = start(tiny_options, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    wait((folder / "last.pt").exists, process)
    folder.rename(tmp_path / "saved")
    folder.write_text("in the way")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "Cannot write" in output and "What was saved before is whole" in output
    assert read_checkpoint(tmp_path / "saved" / "last.pt").training["step"] >= 1


def start(options: list[str], folder: Path) -> subprocess.Popen[str]:
    own = [f"run_dir={folder}", "trainer.save_every_steps=1", "trainer.max_steps=12", "trainer.evaluate_every=100"]
    return subprocess.Popen(
        [sys.executable, "train.py", *options, *own],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)
