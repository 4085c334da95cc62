"""A failed step is repeated, and files of others build models and losses only."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import build_model, compose, plain
from detr.engine import TrainingStep, failures
from detr.errors import UserError
from detr.images import pad_to_batch
from tests.helpers import random_targets
from tests.helpers.commands import REPOSITORY, TINY_MODEL
from tools import replay

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a failed step as the trainer does, of a tiny model and a batch of two images."""

    def make(
        change: Callable[[dict[str, Any]], Any] = lambda config: None,
        *options: str,
        damage: float = 0.5,
        frozen: Sequence[str] = (),
        scale: float = 1.0,
    ) -> Path:
        torch.manual_seed(0)
        config = compose([*TINY_MODEL, *options])
        model = build_model(config.model, num_classes=3)
        for part in frozen:
            model.get_submodule(part).requires_grad_(False).eval()
        images = pad_to_batch([torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((37, 41), (32, 53))])
        targets = random_targets([2, 0], num_classes=3)
        targets[0].boxes[0, 0] = damage
        content = plain(config)
        change(content)
        metadata = {"config": content, "categories": [{"id": id, "name": str(id)} for id in range(3)]}
        options = {"step": 7, "seed": 3, "place": (1, 2), "scale": scale}
        return failures.save(tmp_path, model, [(images, targets)], metadata=metadata, **options)

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


def test_the_loss_is_scaled_as_it_was(
    save: Save, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gradient that is NaN at any scale failed; at the scale that a training starts with, another might be tried."""
    no_gradient = {"grad_norm": math.nan, **{f"grad_norm/{part}": math.nan for part in ("backbone", "heads")}}
    norms = {name: torch.tensor(value) for name, value in no_gradient.items()}
    monkeypatch.setattr(TrainingStep, "_clip_gradients", lambda self: norms)
    replay.main([str(save(lambda config: None, "trainer.precision=fp16", scale=0.5))])
    assert "Step 7 failed again: The gradient, however little the loss was scaled" in capsys.readouterr().out


def test_what_did_not_train_does_not_in_the_repetition(
    save: Save, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model's own options, and by an epoch of trainer.freeze."""
    steps = []

    class Kept(TrainingStep):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            steps.append(self)

    monkeypatch.setattr(replay, "TrainingStep", Kept)
    path = save(lambda config: None, "model.backbone.freeze=[stem]", "trainer.freeze={encoder:5}", frozen=["encoder"])
    replay.main([str(path)])
    assert capsys.readouterr().out.endswith("The first to be NaN or infinite: none\n")
    model = steps[0].model
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    starts = ("encoder.", "backbone.body.conv1.", "backbone.body.bn1.")
    assert still == {name for name, _ in model.named_parameters() if name.startswith(starts)} and len(still) > 3
    for name, module in model.named_modules():
        assert module.training != f"{name}.".startswith(starts), name


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


@pytest.mark.parametrize("missing", ["images", "targets", "batches", "step", "process", "first", "frozen", "evaluated"])
def test_files_that_lack_a_part_are_named(save: Save, missing: str) -> None:
    path = save()
    content = torch.load(path)
    for place in (content, *content["batches"]):
        place.pop(missing, None)
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"{path.name} lacks .*{missing}, so it is incomplete or damaged"):
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
