"""A training that goes on is the training that was never stopped."""

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from detr.engine import Trainer
from detr.errors import Interrupted, UserError
from tests.helpers.trainings import Make, StopsAt, assert_same_state, last


@pytest.mark.parametrize("stops", [[8], [5], [1, 2, 12, 15]])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make: Make, stops: list[int]) -> None:
    straight = make("straight")
    straight.fit()
    for step in stops:
        interrupted = make("parts")
        interrupted.reporter.sinks.append(StopsAt(interrupted, step))
        with pytest.raises(Interrupted, match=f"at step {step}"):
            interrupted.fit()
        assert last(interrupted.run_dir)["training"]["step"] == step
    resumed = make("parts")
    resumed.fit()
    assert resumed.state.step == straight.state.step == 16
    assert_same_state(last(straight.run_dir), last(resumed.run_dir))

    def losses(trainer: Trainer) -> list[tuple[int, float]]:
        lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [(record["step"], record["loss"]) for record in records if record["group"] == "train"]

    assert losses(straight) == losses(resumed) and len(losses(straight)) == 16


def test_a_stop_during_evaluation_repeats_the_evaluation(make: Make) -> None:
    straight, trainer = make("straight"), make("parts")
    straight.fit()
    evaluation = trainer.callbacks["validation"]
    evaluate = evaluation.evaluator

    def stop_while_evaluating(model: Any, stop: Callable[[], bool]) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(model, stop=stop)

    evaluation.evaluator = stop_while_evaluating
    with pytest.raises(Interrupted):
        trainer.fit()
    training = last(trainer.run_dir)["training"]
    assert (training["step"], training["callbacks"]["validation"]["evaluated_step"]) == (4, 0)
    resumed = make("parts")
    resumed.fit()
    assert_same_state(last(straight.run_dir), last(resumed.run_dir))
    records = [json.loads(line) for line in (resumed.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["group"] == "val"] == [4, 8, 12, 16]


def test_an_evaluation_whose_checkpoint_was_not_saved_is_recorded_once(make: Make) -> None:
    trainer = make("run", epochs=1)
    save = trainer.state.save

    def killed_after_the_evaluation(name: str = "last.pt") -> Any:
        if (trainer.run_dir / "metrics.jsonl").read_text().count('"val"'):
            raise KeyboardInterrupt
        return save(name)

    trainer.state.save = killed_after_the_evaluation
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    for _ in range(2):
        make("run", epochs=1).fit()
        rows = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [(row["step"], row["group"]) for row in rows[-2:]] == [(4, "train"), (4, "val")] and len(rows) == 5


def test_options_come_from_the_configuration_not_the_checkpoint(make: Make) -> None:
    make("run", max_steps=2).fit()
    changed = make("run", max_steps=20, lr=0.5)
    changed.state.resume("auto")
    assert changed.state.step == 2 and changed.rates == [0.5, 0.5]
    assert [group["lr"] for group in changed.optimizer.param_groups] == [0.5, 0.5]


def test_other_options_than_the_checkpoints_are_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make("run", max_steps=1).fit()
    make("run", max_steps=2, lr=0.5).fit()
    reported = [record.getMessage() for record in caplog.records if "other options" in record.getMessage()]
    assert reported == ["From here on other options hold than in the checkpoint: optimizer.lr 0.001 -> 0.5."]
    caplog.clear()
    make("run", max_steps=3, lr=0.5).fit()
    assert "other options" not in caplog.text


def test_other_data_than_the_checkpoints_are_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    def train(steps: int, **data: str) -> list[str]:
        trainer = make("run", max_steps=steps)
        trainer.state.data = data
        caplog.clear()
        trainer.fit()
        return [record.getMessage() for record in caplog.records if "other data" in record.getMessage()]

    assert train(1, images="5", boxes="a") == train(2, images="5", boxes="a") == []
    message = "From here on other data are used than before the checkpoint: boxes differ."
    assert train(3, images="5", boxes="b") == [message]
    assert train(4) == train(5, images="7") == []  # of an earlier version: nothing is known


def test_resuming_another_model_is_refused(make: Make) -> None:
    make("run", max_steps=1).fit()
    with pytest.raises(
        UserError,
        match=r"not of the model that is configured.*queries\.position\.weight is \[7, 32\], wanted \[9, 32\]",
    ):
        make("run", queries=9).fit()


def test_a_training_of_version_1_is_refused(make: Make) -> None:
    trainer = make("run", max_steps=1)
    trainer.fit()
    path = trainer.run_dir / "checkpoints" / "last.pt"
    torch.save({**last(trainer.run_dir), "format": "detr-checkpoint-1"}, path)
    with pytest.raises(
        UserError, match=r"last\.pt is of an earlier version.*the training cannot go on.*weights=.*last\.pt"
    ):
        make("run", max_steps=2).fit()


def test_other_numbers_of_images_in_a_step_are_refused_on_resume(make: Make) -> None:
    make("run", max_steps=1).fit()
    with pytest.raises(
        UserError, match=r"counts steps of 6 images, now a step has 12 .*so that the product is the same"
    ):
        make("run", accumulate=2).fit()
    make("run", accumulate=2, batch_size=3, max_steps=2).fit()


def test_a_damaged_checkpoint_is_passed_over(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    straight = make("straight", save_every_steps=1)
    straight.fit()
    trainer = make("parts", save_every_steps=1)
    trainer.reporter.sinks.append(StopsAt(trainer, 3))
    with pytest.raises(Interrupted):
        trainer.fit()
    newest = trainer.run_dir / "checkpoints" / "last.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    resumed = make("parts", save_every_steps=1)
    resumed.fit()
    assert "cut short or damaged" in caplog.text and "The one before it is taken" in caplog.text
    assert_same_state(last(straight.run_dir)["model"], last(resumed.run_dir)["model"])
