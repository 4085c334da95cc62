"""The return to the best checkpoint: the epochs, what is restored, the average's decay; a resumed run does the same."""

import copy
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detr.engine import Trainer, TrainerConfig
from detr.errors import Interrupted, UserError
from detr.weights import read_checkpoint
from tests.helpers.trainings import Make, StopsAt, assert_same_state, last

# AP after each epoch; the last ones begin with epoch 4. The best before is that of epoch 1, an equal one is no new best.
VALUES = (0.3, 0.5, 0.4, 0.5, 0.45, 0.2, 0.6, 0.55, 0.1)
# No new best after epoch 4. After 5 there is none to compare with since the return. 6 is better than 5, 7 is not.
RETURNS = {4: 0.8, 5: 0.7, 8: 0.6}  # epochs before which it returns, with the decay from there on
OPTIONS = {
    "epochs": 9,
    "limit_epoch_steps": 2,
    "batch_size": 2,
    "ema": 0.9,
    "ema_warmup": 3,
    "restart_after": 4 / 9,
    "restart_decay": 0.8,
    "restart_fall": 0.1,
}


def scripted(trainer: Trainer, values: Sequence[float] = VALUES) -> Trainer:
    """With these values of AP after its epochs, whatever it predicts."""

    def evaluate(model: Any, stop: Any) -> Any:
        metrics = SimpleNamespace(summary={"AP": values[trainer.epoch - 1]}, thresholds=None, save=lambda path: None)
        return SimpleNamespace(metrics=metrics, results=None, diagnostics={}, samples=[])

    trainer.callbacks["validation"].evaluator = evaluate
    return trainer


def by_hand(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights at the end of the training, raw and averaged, from a loop without any callback."""
    model, optimizer, decay, step, updates = trainer.model, trainer.optimizer, 0.9, 0, 0
    average: dict[str, torch.Tensor] = {}
    kept: Any = None
    for epoch in range(9):
        if epoch in RETURNS:
            decay, (weights, average, updates, state) = RETURNS[epoch], copy.deepcopy(kept)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        model.train()
        for batch in itertools.islice(trainer.loader.epoch(epoch), 2):
            for group, rate in zip(optimizer.param_groups, trainer.rates, strict=True):
                group["lr"] = rate * trainer.schedule(step, 18)
            trainer.update([batch], step)
            weight = decay * (1 - torch.tensor(-(updates + 1) / 3).exp().item()) if updates else 0.0
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    average[name] = torch.lerp(tensor, average[name], weight) if updates else tensor.clone()
            step, updates = step + 1, updates + 1
        if epoch == 1:
            kept = copy.deepcopy((model.state_dict(), average, updates, optimizer.state_dict()))
    return model.state_dict(), average


def test_a_training_returns_as_one_by_hand_does(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    weights, average = by_hand(make("hand", **OPTIONS))
    trainer = scripted(make(**OPTIONS))
    trainer.fit()
    content = last(trainer.run_dir)
    assert_same_state(dict(content["training"]["model"]), dict(weights))
    for name, tensor in content["model"].items():
        if not tensor.is_floating_point():
            continue  # a count of batches, on which nothing depends
        torch.testing.assert_close(tensor, average[name], atol=1e-6, rtol=1e-5)
    restarts = [message for message in caplog.messages if message.startswith("Restart ")]
    assert [message.partition(" from ")[0] for message in restarts] == [
        "Restart 1, at step 8,",
        "Restart 2, at step 10,",
        "Restart 3, at step 16,",
    ]
    assert [message.rpartition(" ")[2] for message in restarts] == ["0.8.", "0.7.", "0.6."]
    steps = {name: read_checkpoint(trainer.state.path(f"{name}.pt")).training["step"] for name in ("best", "restart")}
    assert steps == {"best": 14, "restart": 8}, "the best of all is kept, and so is what it returns to"


@pytest.mark.parametrize("stops", [[7, 8, 10, 17], pytest.param([9, 15, 16], marks=pytest.mark.slow)])
def test_a_resumed_run_returns_as_an_uninterrupted_one(make: Make, stops: list[int]) -> None:
    straight = scripted(make("straight", **OPTIONS))
    straight.fit()
    for step in stops:
        parts = scripted(make("parts", **OPTIONS))
        parts.reporter.sinks.append(StopsAt(parts, step))
        with pytest.raises(Interrupted, match=f"at step {step}"):
            parts.fit()
    resumed = scripted(make("parts", **OPTIONS))
    resumed.fit()
    for name in ("last.pt", "best.pt", "restart.pt"):
        contents = [read_checkpoint(trainer.state.path(name)) for trainer in (straight, resumed)]
        assert_same_state(*[content.training | {"state": dict(content.state)} for content in contents])
    assert_same_state(last(straight.run_dir), last(resumed.run_dir))


def test_after_the_return_the_weights_are_those_of_the_best(make: Make) -> None:
    trainer = scripted(make(**OPTIONS))
    trainer.fit()
    for path in (trainer.state.path("best.pt"), trainer.state.path("last.pt")):
        path.unlink()
    # A checkpoint of the return is one to go on from; there is nothing better in its folder than what follows.
    again = scripted(make(**OPTIONS | {"resume": str(trainer.state.path("restart.pt"))}))
    again.fit()
    training = last(again.run_dir)["training"]
    assert training["callbacks"]["restart"]["restarts"] == 3 and training["step"] == 18


@pytest.mark.slow
def test_weights_without_an_average_return_too(make: Make) -> None:
    trainer = scripted(make(**OPTIONS | {"ema": 0.0}))
    trainer.fit()
    assert last(trainer.run_dir)["training"]["callbacks"]["restart"]["restarts"] == 3


def test_nothing_to_return_to_is_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = scripted(make(**OPTIONS, evaluate_every=9))
    trainer.fit()
    assert "There is no " in caplog.text and "best.pt to return to, so the training goes on as it is." in caplog.text
    assert trainer.callbacks["moving_average"].decay == pytest.approx(0.8)


def test_another_best_checkpoint_than_that_of_the_training_is_refused(make: Make) -> None:
    trainer = scripted(make(**OPTIONS))
    trainer.reporter.sinks.append(StopsAt(trainer, 7))
    with pytest.raises(Interrupted):
        trainer.fit()
    trainer.state.path("best.pt").write_bytes(trainer.state.path("last.pt").read_bytes())
    with pytest.raises(UserError, match=r"best\.pt is of step 7, wanted that of step 4, .*trainer\.restart_after=null"):
        scripted(make(**OPTIONS)).fit()


def test_a_checkpoint_that_another_training_left_is_not_returned_to(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = scripted(make(**OPTIONS))
    trainer.fit()
    assert trainer.state.path("restart.pt").exists()
    # In the same folder there is nothing to return to before epoch 4. The result after epoch 10 is worse than that after
    # epoch 5, so that another return is due.
    options = OPTIONS | {"epochs": 11, "restart_after": 4 / 11, "evaluate_every": 5, "resume": None}
    again = scripted(make(**options), [1 - epoch / 20 for epoch in range(11)])
    again.fit()
    assert again.callbacks["restart"].restarts == 2
    assert "restart.pt to return to, so the training goes on as it is." in caplog.text


@pytest.mark.parametrize(
    "after, epochs, expected",
    [(120 / 132, 132, 120), (0.925, 160, 148), (0.9, 80, 72), (0.86206896552, 58, 50), (1.0, 9, 9), (0.99, 9, 8),
     (0.9, 1, 1), (None, 3, 3)],
)  # fmt: skip
def test_the_epoch_of_the_return_is_that_of_plain_transforms(after: float | None, epochs: int, expected: int) -> None:
    assert TrainerConfig(epochs=epochs, restart_after=after).restart_epoch(7) == expected
