"""Callbacks of one's own: when they are called, what they may do, and that a resumed run goes on with their state."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr.engine import Callback, Trainer
from detr.engine.callbacks import checkpointing
from detr.errors import Interrupted, UserError
from detr.weights import save
from tests.helpers.commands import REPOSITORY
from tests.helpers.trainings import Make, StopsAt, assert_same_state, last


class Recorder(Callback):
    """Notes every call, with the number of steps done."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def _note(self, hook: str, trainer: Trainer) -> None:
        self.calls.append((hook, trainer.state.step))

    def setup(self, trainer: Trainer) -> None:
        self._note("setup", trainer)

    def on_start(self, trainer: Trainer) -> None:
        self._note("start", trainer)

    def on_epoch_start(self, trainer: Trainer) -> None:
        assert trainer.model.training
        self._note("epoch start", trainer)

    def on_step_end(self, trainer: Trainer, losses: Mapping[str, float]) -> None:
        assert losses["loss"] > 0
        self._note("step", trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        self._note("epoch end", trainer)

    def on_evaluation_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        assert 0 <= metrics["AP"] <= 1
        assert not (trainer.run_dir / "checkpoints" / "best.pt").exists() or trainer.state.step > 4
        self._note("evaluation", trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._note("end" if trainer.finished else "stopped", trainer)


class Sum(Callback):
    """Adds up the loss."""

    def __init__(self) -> None:
        self.sum = torch.zeros(())

    def on_step_end(self, trainer: Trainer, losses: Mapping[str, float]) -> None:
        self.sum = self.sum + losses["loss"]

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sum = state["sum"]


class Holds(Callback):
    """Has anything for a state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"held": [self.state]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise KeyError("more")


class FinishesAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, losses: Mapping[str, float]) -> None:
        if trainer.state.step == self.step:
            trainer.finish()


def test_hooks_are_called_in_their_order_also_where_a_run_goes_on(make: Make) -> None:
    stopped, rest = Recorder(), Recorder()
    trainer = make(max_steps=6, callbacks={"recorder": stopped})
    trainer.reporter.sinks.append(StopsAt(trainer, 2))
    with pytest.raises(Interrupted):
        trainer.fit()
    make(max_steps=6, callbacks={"recorder": rest, "off": None}).fit()
    beginning = [("setup", 0), ("start", 0), ("epoch start", 0), ("step", 1), ("step", 2), ("stopped", 2)]
    assert stopped.calls == beginning
    first = [("setup", 0), ("start", 2), ("epoch start", 2), ("step", 3), ("step", 4), ("epoch end", 4)]
    second = [("epoch start", 4), ("step", 5), ("step", 6), ("epoch end", 6), ("evaluation", 6), ("end", 6)]
    assert rest.calls == [*first, ("evaluation", 4), *second]


def test_the_state_of_a_callback_is_saved_and_restored(make: Make) -> None:
    make("straight", epochs=2, callbacks={"sum": Sum()}).fit()
    for step in (1, 4, 5):
        trainer = make("parts", epochs=2, callbacks={"sum": Sum()})
        trainer.reporter.sinks.append(StopsAt(trainer, step))
        with pytest.raises(Interrupted):
            trainer.fit()
    resumed = make("parts", epochs=2, callbacks={"sum": Sum()})
    resumed.fit()
    straight = last(resumed.run_dir.parent / "straight")
    assert straight["training"]["callbacks"]["sum"]["sum"] > 0
    assert_same_state(straight, last(resumed.run_dir))
    make("parts", max_steps=9).fit()  # without it, and anew
    make("parts", max_steps=10, callbacks={"another": Sum()}).fit()
    assert last(resumed.run_dir)["training"]["callbacks"].keys() == {"validation", "another", "averages"}


def test_a_callback_can_end_the_training_which_is_then_evaluated(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer = make(callbacks={"enough": FinishesAt(6)})
    trainer.fit()
    best = trainer.callbacks["validation"].state_dict()
    end = f"The best is step {best['best_step']}, with AP {best['best']:.3f}: {trainer.state.path('best.pt')}"
    assert caplog.messages[-1] == end
    training = last(trainer.run_dir)["training"]
    assert training["step"] == training["callbacks"]["validation"]["evaluated_step"] == 6


@pytest.mark.parametrize(
    "callbacks, message",
    [
        ({"mine": print}, r"callbacks\.mine: wanted a callback, got builtin_function.*Derive its class"),
        (Sum(), r"callbacks: wanted callbacks by name, got Sum\. Give it one"),
        ({"validation": Sum()}, r"callbacks\.validation: the trainer has a callback of this name"),
        ({"freezing": Sum()}, r"callbacks\.freezing: the trainer has a callback of this name"),
    ],
)
def test_what_is_no_callback_is_refused(make: Make, callbacks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(callbacks=callbacks)


@pytest.mark.parametrize(
    "state, kind", [(np.float64(1.0), "float64"), ({"a": Path("x")}, "PosixPath"), ([{2}], "set"), (Sum(), "Sum")]
)
def test_a_state_that_could_not_be_read_back_is_refused_before_any_step(make: Make, state: Any, kind: str) -> None:
    trainer = make(callbacks={"mine": Holds(state)})
    with pytest.raises(UserError, match=rf"callbacks\.mine: its state_dict\(\) holds a {kind}.*Return tensors"):
        trainer.fit()
    assert trainer.state.step == 0


def test_a_state_that_a_callback_does_not_take_is_reported(make: Make) -> None:
    make(max_steps=1, callbacks={"mine": Holds((None, torch.nn.Linear(2, 3).state_dict()))}).fit()
    with pytest.raises(UserError, match=r"callbacks\.mine cannot take its state from .*last\.pt: 'more'"):
        make(max_steps=2, callbacks={"mine": Holds(1)}).fit()


def test_processes_save_at_the_same_step_whatever_their_clocks_say(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save may need all of them, as where a callback gathers its state."""
    asked: list[bool] = []

    def time_is_up_in_another_process(flag: bool) -> bool:
        asked.append(flag)
        return len(asked) == 3

    trainer = make(save_every_minutes=1000.0, max_steps=4)
    saved: list[int] = []
    monkeypatch.setattr(trainer.state, "save", lambda name="last.pt": saved.append(trainer.state.step))
    monkeypatch.setattr(checkpointing.distributed, "any_of", time_is_up_in_another_process)
    for step in range(1, 5):
        trainer.state.step = step
        trainer.callbacks["checkpointing"].on_step_end(trainer, {})
    assert asked == [False] * 4 and saved == [3]


def test_training_states_of_earlier_versions_are_refused(make: Make) -> None:
    trainer = make(max_steps=1)
    trainer.fit()
    path = trainer.run_dir / "checkpoints" / "last.pt"
    content = last(trainer.run_dir)
    content["training"] |= content["training"].pop("callbacks")["validation"]
    save(path, content)
    with pytest.raises(
        UserError,
        match=r"last\.pt is of an earlier version.*Start anew .* with weights=\S*last\.pt and another run_dir",
    ):
        make(max_steps=2).fit()


OWN = '''
import os, signal
from detr.engine import Callback

class Largest(Callback):
    """The largest loss so far; dies at a step."""

    def __init__(self, *, die_at: int = 0, stop_at: int = 0) -> None:
        self.die_at, self.stop_at, self.largest, self.losses = die_at, stop_at, 0.0, []

    def on_step_end(self, trainer, losses):
        self.losses.append(losses["loss"])
        self.largest = max(self.largest, losses["loss"])
        if trainer.state.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.state.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self):
        return {"largest": self.largest, "losses": self.losses}

    def load_state_dict(self, state):
        self.largest, self.losses = state["largest"], state["losses"]
'''


@pytest.mark.slow
def test_a_callback_from_elsewhere_survives_kills_and_stops(tiny_options: list[str], tmp_path: Path) -> None:
    """Through the command line; steps after the last checkpoint of a killed run are repeated."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text(OWN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"}

    def train(run: str, *options: str) -> subprocess.CompletedProcess[str]:
        own = ["+callbacks.largest._target_=mine.Largest", "trainer.resume=auto", f"run_dir={tmp_path / run}"]
        command = [sys.executable, "train.py", *tiny_options, "trainer.max_steps=6", "trainer.save_every_steps=2", *own]
        return subprocess.run(
            [*command, *options], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )

    refused = train("refused")
    assert refused.returncode == 2 and "allow_targets=[PACKAGE]" in refused.stderr + refused.stdout
    misspelt = train("refused", "allow_targets=[mine]", "+callbacks.largest.dieat=1")
    assert misspelt.returncode == 2 and "callbacks.largest.dieat" in misspelt.stderr + misspelt.stdout
    runs = [
        ("straight", 0, ()),
        ("parts", -9, ("+callbacks.largest.die_at=3",)),
        ("parts", 75, ("+callbacks.largest.stop_at=5",)),
        ("parts", 0, ()),
    ]
    for run, code, options in runs:
        done = train(run, "allow_targets=[mine]", *options)
        assert done.returncode == code, done.stderr
    straight, parts = last(tmp_path / "straight"), last(tmp_path / "parts")
    assert len(straight["training"]["callbacks"]["largest"]["losses"]) == 6
    assert_same_state(straight["model"], parts["model"])
    assert_same_state(straight["training"], parts["training"])


@pytest.mark.slow
def test_a_backbone_rate_of_0_freezes_the_backbone(tiny_options: list[str], tmp_path: Path) -> None:
    for steps in ("1", "3"):
        command = [sys.executable, "train.py", *tiny_options, "optimizer.backbone_lr=0", f"trainer.max_steps={steps}"]
        subprocess.run([*command, f"run_dir={tmp_path / steps}"], cwd=REPOSITORY, check=True, capture_output=True)
    once, thrice = (last(tmp_path / steps)["model"] for steps in ("1", "3"))
    same = {name.split(".")[0] for name, tensor in once.items() if torch.equal(tensor, thrice[name])}
    changed = {name.split(".")[0] for name, tensor in once.items() if not torch.equal(tensor, thrice[name])}
    assert "backbone" in same - changed and "heads" in changed
