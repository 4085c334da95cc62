"""A training that goes on is the training that was never stopped."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.engine import Trainer
from detr.engine.optim import adamw
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


def test_averages_of_the_log_go_on_where_they_were(make: Make) -> None:
    def records(trainer: Trainer) -> list[tuple[int, float, float]]:
        lines = map(json.loads, (trainer.run_dir / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["group"] == "train"]

    straight, interrupted, resumed = (make(name, epochs=2) for name in ("straight", "parts", "parts"))
    for trainer in (straight, interrupted, resumed):
        trainer.reporter.log_every = 3
    straight.fit()
    interrupted.reporter.sinks.append(StopsAt(interrupted, 2))
    with pytest.raises(Interrupted):
        interrupted.fit()
    resumed.fit()
    assert records(straight) == records(resumed) and [step for step, *_ in records(resumed)] == [3, 6, 8]


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

    def killed_after_the_evaluation(*names: str) -> Any:
        if (trainer.run_dir / "metrics.jsonl").read_text().count('"val"'):
            raise KeyboardInterrupt
        return save(*names)

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


# The optimizer's state goes to the parameter of its name.


def moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's average of the gradient, by the parameter's name."""
    state = trainer.optimizer.state
    return {name: state[p]["exp_avg"] for name, p in trainer.model.named_parameters() if state.get(p)}


def regrouped(trainer: Trainer, **options: Any) -> Trainer:
    trainer.optimizer = trainer.state.optimizer = adamw(trainer.model, **options)
    return trainer


@pytest.mark.parametrize(
    "options", [{"lr_factors": {"box_head": 0.1}}, {"weight_decays": {"norm": 0.0, "bias": 0.3}}, {"backbone_lr": 0.5}]
)
def test_other_groups_keep_the_state_of_each_parameter(
    make: Make, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    trained = make("run", max_steps=2)
    trained.fit()
    resumed = regrouped(make("run", max_steps=3), **options)
    before = [len(group["params"]) for group in trained.optimizer.param_groups]
    assert options.keys() == {"backbone_lr"} or before != [
        len(group["params"]) for group in resumed.optimizer.param_groups
    ]
    resumed.state.resume("auto")
    assert_same_state(moments(trained), moments(resumed))
    assert "optimizer" not in caplog.text


def test_what_did_not_train_starts_anew_and_is_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trained = make("run", max_steps=2)
    regrouped(trained).optimizer.param_groups.clear()
    trained.model.encoder.requires_grad_(False)
    trained.optimizer = trained.state.optimizer = trained.update.optimizer = adamw(trained.model)
    trained.rates = [0.1, 0.1]
    trained.fit()
    resumed = regrouped(make("run", max_steps=3))
    resumed.model.backbone.requires_grad_(False)
    regrouped(resumed).state.resume("auto")
    anew = [name for name, _ in resumed.model.named_parameters() if name.startswith("encoder.")]
    assert moments(resumed).keys() == {name for name in moments(trained) if not name.startswith("backbone.")}
    assert f"state of {len(anew)} of {len(anew) + len(moments(resumed))} parameters starts anew" in caplog.text
    assert "is left out, since they do not train now: backbone." in caplog.text


def test_another_optimizer_starts_anew(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make("run", max_steps=2).fit()
    resumed = make("run", max_steps=3)
    parameters = [*resumed.model.parameters()]
    resumed.optimizer = resumed.state.optimizer = torch.optim.SGD([{"params": parameters, "name": "lr"}], momentum=0.9)
    resumed.state.resume("auto")
    assert f"state of {len(parameters)} of {len(parameters)} parameters starts anew" in caplog.text


def as_version_2(run_dir: Path, optimizer: torch.optim.Optimizer) -> None:
    """The checkpoint with the optimizer's state by position, as it was written before."""
    content = last(run_dir)
    content["training"]["optimizer"] = optimizer.state_dict()
    torch.save({**content, "format": "detr-checkpoint-2"}, run_dir / "checkpoints" / "last.pt")


def test_a_checkpoint_of_version_2_goes_on_bit_for_bit(make: Make) -> None:
    make("straight").fit()
    trainer = make("parts")
    trainer.reporter.sinks.append(StopsAt(trainer, 5))
    with pytest.raises(Interrupted):
        trainer.fit()
    as_version_2(trainer.run_dir, trainer.optimizer)
    resumed = make("parts")
    resumed.fit()
    assert_same_state(last(resumed.run_dir.parent / "straight"), last(resumed.run_dir))


def test_a_checkpoint_of_version_2_is_refused_for_other_groups(make: Make) -> None:
    trainer = make("run", max_steps=2)
    trainer.fit()
    as_version_2(trainer.run_dir, trainer.optimizer)
    with pytest.raises(
        UserError, match=r"no training state of these parameter groups: it has .*lr of \d+.*weights=PATH"
    ):
        regrouped(make("run", max_steps=3), lr_factors={"box_head": 0.1}).state.resume("auto")
    content = last(trainer.run_dir)
    group = content["training"]["optimizer"]["param_groups"][1]
    group["params"] = group["params"][::-1]
    torch.save(content, trainer.run_dir / "checkpoints" / "last.pt")
    with pytest.raises(
        UserError, match=r"last\.pt: the optimizer's state of .* exp_avg, wanted an ordinary tensor of shape"
    ):
        make("run", max_steps=3).state.resume("auto")


# What resuming finds, or does not find.


def test_auto_in_an_empty_folder_says_so(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert make("run").state.resume("auto") is None
    assert "no checkpoint in" in caplog.text and "starts anew" in caplog.text


def test_an_empty_path_is_none(make: Make) -> None:
    """As a variable of the shell that is not set gives it: a training that starts anew would replace the one there."""
    with pytest.raises(UserError, match=r"^Checkpoint \. is a folder"):
        make("run").state.resume("")


def test_auto_beside_the_best_alone_is_refused(make: Make) -> None:
    trainer = make("run", max_steps=1)
    trainer.fit()
    best = trainer.run_dir / "checkpoints" / "best.pt"
    best.with_name("last.pt").rename(best)
    best.with_name("last-1.pt").unlink()
    before = best.read_bytes()
    with pytest.raises(UserError, match=rf"has best\.pt, but no last\.pt .*trainer\.resume={best}, or start anew"):
        make("run", max_steps=2).fit()
    assert best.read_bytes() == before
    resumed = make("run", max_steps=2, resume=str(best))
    resumed.fit()
    assert resumed.state.step == 2


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "restart.pt"])
def test_a_folder_in_the_place_of_a_checkpoint_is_refused_before_any_step(make: Make, name: str) -> None:
    trainer = make("run", resume=None)
    (trainer.run_dir / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name} is no file, but the training saves a checkpoint there. Move it away"):
        trainer.fit()
    assert trainer.state.step == 0


def test_a_training_that_is_over_says_that_nothing_is_left(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make("run", max_steps=3).fit()
    make("run", max_steps=2).fit()
    assert "Nothing is left to do: " in caplog.text and "has 3 steps, and the training 2" in caplog.text
    assert "step 3 of 2" not in caplog.text


def test_damaged_lines_of_the_record_are_left_out(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make("run", max_steps=3)
    trainer.fit()
    path = trainer.run_dir / "metrics.jsonl"
    first, second, *rest = path.read_text().splitlines(keepends=True)
    damaged = [b'{"step": 1, "gr\n', b"\xff\xfe\n", b"3\n", b'{"group": "train"}\n', b"[" * 10**5 + b"\n"]
    path.write_bytes(first.encode() + b"".join(damaged) + second.encode() + rest[0].encode()[:-9])
    make("run", max_steps=4).fit()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 4, 4] and "6 of 8 lines of" in caplog.text
