"""A failed step is repeated, and files of others build models and losses only."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import build_model, compose, plain
from detr.engine import failures
from detr.errors import UserError
from detr.images import pad_to_batch
from tests.helpers import random_targets
from tests.helpers.commands import REPOSITORY, TINY_MODEL
from tools import replay

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a failed step as the trainer does, of a tiny model and a batch of two images."""

    def make(change: Callable[[dict[str, Any]], Any] = lambda config: None, damage: float = 0.5) -> Path:
        torch.manual_seed(0)
        config = compose(TINY_MODEL)
        model = build_model(config.model, num_classes=3)
        images = pad_to_batch([torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((37, 41), (32, 53))])
        targets = random_targets([2, 0], num_classes=3)
        targets[0].boxes[0, 0] = damage
        content = plain(config)
        change(content)
        metadata = {"config": content, "categories": [{"id": id, "name": str(id)} for id in range(3)]}
        return failures.save(tmp_path, model, [(images, targets)], step=7, seed=3, metadata=metadata)

    return make


def test_what_went_wrong_first_is_named(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    replay.main([str(save(damage=float("inf")))])
    printed = capsys.readouterr().out
    assert "Batch of images [100, 101], (2, 3, 37, 53)" in printed and "Step 7 failed again: " in printed
    assert printed.endswith("The first to be NaN or infinite: target of image 100\n")


def test_a_sound_step_goes_through(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    replay.main([str(save())])
    printed = capsys.readouterr().out
    assert "Step 7 went through: loss " in printed and printed.endswith("The first to be NaN or infinite: none\n")


@pytest.mark.parametrize("part", ["model", "model.encoder.position", "criterion", "criterion.matcher"])
@pytest.mark.parametrize("target", ["os.system", "torch.hub.load", "detr.files.write_tensors"])
def test_what_a_file_allows_itself_is_no_permission(save: Save, part: str, target: str) -> None:
    def hostile(config: dict[str, Any]) -> None:
        config["allow_targets"] = ["os", "posix", "torch", "torch.hub", "detr"]
        *parents, last = part.split(".")
        for name in parents:
            config = config[name]
        config[last] = {"_target_": target}

    path = save(hostile)
    with pytest.raises(UserError) as caught:
        replay.main([str(path)])
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: {part}._target_: '{target}' is refused") and "--allow-targets PACKAGE" in message
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("model"),
        lambda config: config.update(model="x"),
        lambda config: config.update(criterion=None),
        lambda config: config["trainer"].update(unknown=1),
        lambda config: config.update(trainer=[]),
    ],
)
def test_damaged_files_are_named(save: Save, change: Callable[[dict[str, Any]], Any]) -> None:
    path = save(change)
    with pytest.raises(UserError, match=path.name):
        replay.main([str(path)])


def test_another_file_is_exit_code_2(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "a.pt")
    command = [sys.executable, "tools/replay.py", str(tmp_path / "a.pt")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2
        and done.stderr
        == f"Error: {tmp_path / 'a.pt'} holds no failed step that this version saved. Give a file of a run's failures folder.\n"
    )
