"""Checkpoints are written beside the training: what is in them, and what holds it up."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.engine import Callback, Trainer, saving
from detr.engine.saving import Saving
from detr.errors import UserError
from detr.weights import read_checkpoint, save
from tests.helpers.trainings import Make, last

PARTS = {"config": {"data": {}, "model": {}}, "categories": []}


def content(value: float) -> dict[str, Any]:
    return {**PARTS, "model": {"a": torch.full((3,), value)}, "training": {"list": [torch.ones(2)], "step": 1}}


def test_training_goes_on_while_a_checkpoint_is_written(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps pass until the next checkpoint waits for it."""
    trainer = make("run", epochs=2, evaluate_every=9)
    steps, may_write = [], threading.Event()

    def write(path: Path, content: Any, *, keep: int = 1) -> None:
        may_write.wait(60)
        steps.append(trainer.state.step)
        save(path, content, keep=keep)

    monkeypatch.setattr(saving, "save", write)
    trainer.state.save("first.pt")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer._train_epoch()
    assert trainer.state.step == 4 and not trainer.state.path("first.pt").exists()
    may_write.set()
    trainer.state.wait()
    state = read_checkpoint(trainer.state.path("first.pt"))
    assert state.training is not None and state.training["step"] == 0
    assert all(torch.equal(state.state[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_one_is_written_at_a_time_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    ended: list[str] = []

    def write(path: Path, content: Any, *, keep: int = 1) -> None:
        assert len(begun) == len(ended)
        begun.append(path.name)
        threading.Event().wait(0.02)
        ended.append(path.name)

    monkeypatch.setattr(saving, "save", write)
    saves = Saving()
    for value in range(3):
        saves(content(value), [(tmp_path / f"best{value}", 1), (tmp_path / f"last{value}", 2)])
    saves.wait()
    assert ended == ["best0", "last0", "best1", "last1", "best2", "last2"]


def test_an_error_of_writing_ends_the_training_at_the_next_checkpoint(make: Make) -> None:
    trainer = make("run", epochs=1, save_every_steps=1)
    last_path = trainer.state.path()
    last_path.parent.mkdir()
    last_path.with_suffix(".tmp").mkdir()  # where the checkpoint is to be written first
    with pytest.raises(UserError, match=r"Cannot write .*last\.pt"):
        trainer.fit()
    assert trainer.state.step == 2
    last_path.with_suffix(".tmp").rmdir()
    make("run", epochs=1).fit()
    assert last(trainer.run_dir)["training"]["step"] == 4


def test_an_error_of_writing_does_not_hide_the_one_that_ended_the_training(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Callback):
        def on_step_end(self, trainer: Trainer, losses: Any) -> None:
            trainer.state.save()
            raise ZeroDivisionError

    trainer = make("run", epochs=1, callbacks={"own": Fails()})
    trainer.state.path().with_suffix(".tmp").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert "Saving failed at the end of the training: Cannot write" in caplog.text


def test_tensors_that_share_memory_are_saved_once(tmp_path: Path) -> None:
    shared = torch.randn(50_000)
    for name, model in (("one", {"a": shared}), ("two", {"a": shared, "b": shared, "c": shared.view(500, 100)})):
        saves = Saving()
        saves({**content(0.0), "model": model}, [(tmp_path / name, 1)])
        saves.wait()
    assert (tmp_path / "two").stat().st_size < 2.2 * (tmp_path / "one").stat().st_size
    state = read_checkpoint(tmp_path / "two").state
    assert torch.equal(state["a"], shared) and state["a"].data_ptr() == state["b"].data_ptr()


def test_what_a_second_interrupt_leaves_under_way_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the folder would be free for another training while this one still writes to it."""
    waits, interrupted = threading.Event(), threading.Event()

    def write(path: Path, content: Any, *, keep: int = 1) -> None:
        waits.wait(60)
        signal.pthread_kill(main, signal.SIGINT)
        interrupted.wait(60)
        save(path, content, keep=keep)

    monkeypatch.setattr(saving, "save", write)
    saves, main = Saving(), threading.get_ident()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of a parallel test run ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            saves(content(0.0), [(tmp_path / "last.pt", 1)])
            waits.set()
            saves.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    threading.Timer(0.2, interrupted.set).start()
    saves.wait()
    assert (tmp_path / "last.pt").exists()
