"""The training loop: what it computes, writes and says."""

import gc
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from datasets import TrainLoader
from detr.engine import Trainer, TrainerConfig, accelerated
from detr.errors import Interrupted, NonFiniteError, UserError
from detr.evaluation import Threshold, Thresholds
from detr.files import read_tensors
from detr.models.attention import HardAttention, Placement
from detr.weights import read_checkpoint
from tests.helpers.trainings import Make, StopsAt, assert_same_state, last


def test_a_block_that_decides_by_chance_learns_from_the_loss_of_each_image(make: Make) -> None:
    trainer = make("chance", attention={"hard": Placement(block=HardAttention, stages=["neck"])}, max_steps=3)
    block = trainer.model.attention[0]["hard"]
    asked: list[torch.Tensor] = []
    policy_loss = block.policy_loss
    block.policy_loss = lambda cost: asked.append(cost) or policy_loss(cost)
    trainer.fit()
    assert len(asked) == 3 and all(cost.shape == (6,) and not cost.requires_grad for cost in asked)
    records = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all("loss_policy" in record for record in records if record["group"] == "train")
    assert block.score.weight.abs().sum() > 0  # 0 at the start: only the policy term has moved it


def records(trainer: Trainer, group: str) -> list[dict[str, Any]]:
    lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["group"] == group]


def test_diagnostics_are_logged_and_a_resumed_run_compares_from_its_second_evaluation_on(make: Make) -> None:
    make("run", epochs=1).fit()
    trainer = make("run", epochs=3)
    trainer.fit()
    found = [{name for name in record if name.startswith("matching/")} for record in records(trainer, "val")]
    always = {"matching/layer_stability", "matching/iou", "matching/recall"}
    assert [always <= names for names in found] == [True] * 3
    assert ["matching/stability" in names for names in found] == [False, False, True]


def part_of(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
def test_the_norm_of_the_gradient_is_told_by_part(make: Make, clip_norm: float) -> None:
    trainer = make(max_steps=1, clip_norm=clip_norm)
    whole, parts = [], {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            whole.append(gradient.flatten().clone())  # it is clipped in place
            parts.setdefault(f"grad_norm/{part_of(name)}", []).append(whole[-1])

        return hook

    for name, parameter in trainer.model.named_parameters():
        parameter.register_hook(keep(name))
    trainer.fit()
    (record,) = records(trainer, "train")
    assert {name for name in record if name.startswith("grad_norm/")} == parts.keys()
    assert parts.keys() >= {"grad_norm/backbone", "grad_norm/encoder", "grad_norm/decoder"} and len(parts) > 3
    for name, gradients in parts.items():
        assert record[name] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-5), name
    assert record["grad_norm"] == pytest.approx(torch.cat(whole).norm().item(), rel=1e-5)
    applied = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).norm().item()
    assert applied == pytest.approx(clip_norm or record["grad_norm"], rel=1e-3)


def test_parts_without_gradients_have_a_norm_of_zero(make: Make) -> None:
    trainer = make(max_steps=1)
    trainer.model.backbone.requires_grad_(False)
    trainer.fit()
    (record,) = records(trainer, "train")
    assert record["grad_norm/backbone"] == 0 < record["grad_norm/decoder"] < record["grad_norm"]


def test_the_model_sees_the_targets_in_training_only(make: Make) -> None:
    trainer, seen = make(max_steps=3), []
    trainer.model.register_forward_pre_hook(lambda model, given: seen.append((model.training, len(given))))
    trainer.fit()
    assert seen == [(True, 2)] * 3 + [(False, 1)] * 2


def test_the_seed_changes_the_run(make: Make) -> None:
    first, second = make("a", max_steps=2), make("b", max_steps=2, seed=4)
    first.fit()
    second.fit()
    assert not torch.equal(first.model.heads[0].class_head.weight, second.model.heads[0].class_head.weight)


def test_best_and_last_are_kept_and_metrics_written(make: Make) -> None:
    trainer = make(max_steps=6, save_every_steps=5)
    trainer.fit()
    metrics = json.loads((trainer.run_dir / "evaluation" / "metrics.json").read_text())
    assert metrics["bbox"].keys() >= {"AP", "AP50", "ARl"} and metrics["per_class"].keys() == {
        "circle",
        "square",
        "triangle",
    }
    best = read_checkpoint(trainer.run_dir / "checkpoints" / "best.pt")
    assert best.training["callbacks"]["validation"]["best"] == trainer.callbacks["validation"].best > -1
    assert len(list((trainer.run_dir / "predictions").glob("*.jpg"))) == 7


class Damaged:
    """A loader whose third batch makes the loss explode."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader, self.batch_size = loader, loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        for index, (batch, targets) in enumerate(self.loader.epoch(epoch, start)):
            if index == 2:
                damaged = [target.__class__(**{**vars(target), "boxes": target.boxes * math.inf}) for target in targets]
                yield batch, damaged
            else:
                yield batch, targets


def test_non_finite_values_stop_the_run_before_the_weights_are_damaged(make: Make) -> None:
    trainer = make(save_every_steps=1)
    trainer.loader = Damaged(trainer.loader)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at step 2, for image ids \[.*lower optimizer\.lr"):
        trainer.fit()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert last(trainer.run_dir)["training"]["step"] == 2
    captured = read_tensors(trainer.run_dir / "failures" / "step-2.pt")
    [batch] = captured["batches"]
    boxes = [target["boxes"] for target in batch["targets"]]
    assert len(batch["images"]["images"]) == len(boxes) == 6 and all(part.isinf().all() for part in boxes)
    assert captured["model"].keys() == trainer.model.state_dict().keys()


def test_steps_that_are_not_finite_can_be_skipped_up_to_a_limit(make: Make) -> None:
    trainer = make(non_finite="skip", max_skips=1, max_steps=7)
    trainer.loader = Damaged(trainer.loader)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match=r"at step 6.*tools/replay\.py \S*step-6\.pt"):
        trainer.fit()
    resumed = last(trainer.run_dir)["training"]
    assert (resumed["step"], resumed["skipped"]) == (4, 1)
    assert len(records(trainer, "train")) == 5
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_a_step_that_cannot_be_kept_is_named_all_the_same(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(non_finite="skip", max_skips=1, max_steps=7)
    trainer.loader = Damaged(trainer.loader)  # type: ignore[arg-type]
    (trainer.run_dir / "failures").write_text("in the way")
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at step 6, for image ids [^/]*$"):
        trainer.fit()
    assert "The failed step is not kept: Cannot write " in caplog.text
    assert "Step 2 skipped, 1 of at most 1: " in caplog.text


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_a_gradient_that_no_scale_of_fp16_helps_stops_the_run(make: Make, non_finite: str) -> None:
    trainer = make(precision="fp16", non_finite=non_finite, max_skips=2, max_steps=40, evaluate_every=100)
    start = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.heads[0].class_head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError, match=r"^The gradient, however little the loss was scaled for fp16, became NaN"):
        trainer.fit()
    # From 65536 the scale is halved 17 times.
    assert trainer.state.step == 17 + (2 if non_finite == "skip" else 0)
    assert all(torch.equal(start[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_a_skipped_step_is_freed_at_once(make: Make) -> None:
    """Left to the end of the interpreter, its graph makes torch abort."""
    trainer = make(non_finite="skip", max_steps=4)
    trainer.loader = Damaged(trainer.loader)  # type: ignore[arg-type]
    graphs: list[weakref.ref[torch.Tensor]] = []
    runner = trainer.update.runner

    def watched(*arguments: Any) -> Any:
        predictions = runner(*arguments)
        graphs.extend(weakref.ref(tensor) for tensor in predictions.everything())
        return predictions

    trainer.update.runner = watched  # type: ignore[assignment]
    gc.disable()
    try:
        trainer.fit()
        assert trainer.state.skipped == 1 and len(graphs) == 8
        assert all(graph() is None for graph in graphs)
    finally:
        gc.enable()


def test_accumulated_batches_equal_a_large_one(make: Make) -> None:
    """Also where they have different numbers of objects; batch norm and dropout, which see the batch, are off."""
    weights = []
    for run, batch_size, accumulate in (("large", 6, 1), ("small", 3, 2)):
        trainer = make(
            run, accumulate=accumulate, batch_size=batch_size, max_steps=4, dropout=0.0, freeze={"backbone": None}
        )
        trainer.fit()
        weights.append(trainer.model.state_dict())
        assert [record["step"] for record in records(trainer, "train")] == [1, 2, 3, 4]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=1e-6, rtol=1e-5)


def test_moving_average_is_evaluated_saved_and_resumed(make: Make) -> None:
    straight = make("straight", ema=0.9, epochs=2)
    straight.fit()
    parts = make("parts", ema=0.9, epochs=2)
    parts.reporter.sinks.append(StopsAt(parts, 3))
    with pytest.raises(Interrupted):
        parts.fit()
    make("parts", ema=0.9, epochs=2).fit()
    saved, resumed = last(straight.run_dir), last(parts.run_dir)
    assert_same_state(saved, resumed)
    name = "heads.0.class_head.weight"
    assert torch.equal(saved["model"][name], straight.state.evaluated.state_dict()[name])
    assert not torch.equal(saved["model"][name], saved["training"]["model"][name])


@pytest.mark.parametrize("warmup", [None, 7])
def test_the_average_is_that_of_the_weights(make: Make, warmup: int | None) -> None:
    trainer, seen = make(ema=0.5, ema_warmup=warmup, max_steps=3), []
    average = trainer.callbacks["moving_average"].average
    update = average.update_parameters
    average.update_parameters = lambda model: (
        seen.append(model.heads[0].class_head.weight.clone()),
        update(model),
    )
    trainer.fit()
    wanted = seen[0]
    for steps, weight in enumerate(seen[1:], start=1):
        decay = min(0.5, (1 + steps) / (10 + steps))
        if warmup:
            decay = 0.5 * (1 - math.exp(-(steps + 1) / warmup))
        wanted = decay * wanted + (1 - decay) * weight
    torch.testing.assert_close(trainer.state.evaluated.heads[0].class_head.weight, wanted)


def test_frozen_parts_train_from_their_epoch_on(make: Make) -> None:
    trainer = make(freeze={"backbone": 1, "encoder": None}, epochs=2)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.total_steps = trainer.epoch_steps
    trainer.fit()
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.total_steps = 2 * trainer.epoch_steps
    trainer.fit()
    second = trainer.model.state_dict()
    for name, tensor in start.items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, second[name]), name
        elif name.startswith("backbone."):
            assert torch.equal(tensor, first[name]) and not torch.equal(tensor, second[name]), name
    assert not torch.equal(start["heads.0.class_head.weight"], first["heads.0.class_head.weight"])
    with pytest.raises(UserError, match=r"trainer\.freeze: the model has no part 'backbones'; its parts are backbone,"):
        make(freeze={"backbones": None})


@pytest.mark.parametrize("until", [None, 3])
def test_a_training_of_nothing_is_refused(make: Make, until: int | None) -> None:
    trainer = make(max_steps=1)
    parts = {name: until for name, _ in trainer.model.named_children()}
    with pytest.raises(UserError, match=r"Nothing in the model trains: trainer\.freeze.*Let a part train"):
        make(max_steps=1, freeze=parts).fit()


def test_training_ends_when_patience_is_over(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(patience=2, epochs=9, monitor="AP50")
    values = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    evaluation = trainer.callbacks["validation"]
    evaluate = evaluation.evaluator

    def with_values(model: Any, stop: Callable[[], bool]) -> Any:
        found = evaluate(model, stop=stop)
        found.metrics.summary["AP50"] = next(values)
        return found

    evaluation.evaluator = with_values
    trainer.fit()
    assert (trainer.state.step, evaluation.best_step, evaluation.best) == (16, 8, 0.3)
    with pytest.raises(UserError, match=r"trainer\.monitor: 'mAP' is not among the metrics, which are AP, AP50"):
        make("other", monitor="mAP", max_steps=1).fit()


def test_checkpoints_hold_the_best_thresholds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the metrics beside them, also where a training goes on between two evaluations."""
    trainer = make(epochs=2)
    evaluate = trainer.callbacks["validation"].evaluator
    best = Threshold(score=0.25, f1=0.5, precision=0.5, recall=0.5, objects=30)
    thresholds = Thresholds(overall=best, per_class={"circle": best})

    def with_thresholds(model: Any, stop: Callable[[], bool]) -> Any:
        found = evaluate(model, stop=stop)
        return replace(found, metrics=replace(found.metrics, thresholds=thresholds))

    trainer.callbacks["validation"].evaluator = with_thresholds
    trainer.fit()
    metrics = json.loads((trainer.run_dir / "evaluation" / "metrics.json").read_text())
    for name in ("best.pt", "last.pt"):
        checkpoint = read_checkpoint(trainer.state.path(name))
        assert checkpoint.thresholds == metrics["thresholds"] == thresholds.content()
    further = make("further", epochs=2, resume=str(trainer.state.path()))
    further.state.resume(str(trainer.state.path()))
    assert further.state.thresholds == thresholds


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 9])
def test_evaluations_are_spread_over_the_training(evaluations: int) -> None:
    """At most so many, at equal distances of whole epochs; as many as there can be at such distances."""
    for batches in (1, 2, 7, 40):
        for max_steps in (1, 6, 7, 41, 99):
            config = TrainerConfig(max_steps=max_steps, evaluations=evaluations)
            ends = [*range(batches, max_steps, batches), max_steps]  # of epochs, in steps
            spreads = [ends[every - 1 : -1 : every] + ends[-1:] for every in range(1, len(ends) + 1)]
            wanted = max((spread for spread in spreads if len(spread) <= evaluations), key=len)
            every = config.evaluation_epochs(batches)
            assert len(spreads[every - 1]) == len(wanted), (batches, max_steps, every)


def test_a_resumed_training_is_evaluated_when_a_straight_one_is(make: Make) -> None:
    """Seven steps are four epochs: with two evaluations, one after two epochs and one at the end."""
    options = {"max_steps": 7, "limit_epoch_steps": 2, "evaluations": 2, "limit_evaluation_images": 2}
    straight = make("straight", **options)
    straight.fit()
    parts = make("parts", **options)
    parts.reporter.sinks.append(StopsAt(parts, 5))
    with pytest.raises(Interrupted):
        parts.fit()
    make("parts", **options).fit()
    for trainer in (straight, parts):
        assert [record["step"] for record in records(trainer, "val")] == [4, 7]
    assert_same_state(last(straight.run_dir), last(parts.run_dir))


def test_quick_looks(make: Make) -> None:
    trainer = make(limit_epoch_steps=2, limit_evaluation_images=4, epochs=2)
    trainer.fit()
    assert trainer.state.step == 4 and len(records(trainer, "val")) == 2


def test_memory_that_runs_out_is_explained(make: Make) -> None:
    trainer = make(max_steps=1)

    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.criterion.forward = fail
    with pytest.raises(
        UserError, match=r"batch of 6 images, padded to \d+ x \d+ pixels, with \d+ objects\. Lower data"
    ):
        trainer.fit()


def test_a_model_that_cannot_be_compiled_is_explained(make: Make) -> None:
    trainer = make(max_steps=1)

    def compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    trainer.model.forward = torch.compile(lambda *batch: torch.ones(1) + 1, backend=compiler)
    with pytest.raises(
        UserError, match=r"trainer\.compile=true cannot be done here: .*No working C\+\+ compiler found\."
    ):
        trainer.fit()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(make: Make, precision: str) -> None:
    straight = make("straight", precision=precision, epochs=1)
    straight.fit()
    parts = make("parts", precision=precision, epochs=1)
    parts.reporter.sinks.append(StopsAt(parts, 2))
    with pytest.raises(Interrupted):
        parts.fit()
    make("parts", precision=precision, epochs=1).fit()
    assert_same_state(last(straight.run_dir), last(parts.run_dir))
    full = make("full", epochs=1)
    full.fit()
    losses = [[record["loss"] for record in records(trainer, "train")] for trainer in (straight, full)]
    assert losses[0] != losses[1] and losses[0][0] == pytest.approx(losses[1][0], rel=0.01)


def test_activations_computed_twice_change_nothing(make: Make) -> None:
    plain, twice = make("plain", max_steps=3), make("twice", max_steps=3)
    accelerated(twice.model, TrainerConfig(activation_checkpointing=True))
    plain.fit()
    twice.fit()
    assert_same_state(last(plain.run_dir)["model"], last(twice.run_dir)["model"])


def test_training_learns(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trainer = make(max_steps=150, evaluate_every=100, resume=None)
    trainer.fit()
    losses = [json.loads(line)["loss"] for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()[:-1]]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    assert mean(losses[-10:]) < 0.75 * mean(losses[:10])
    assert not caplog.records


def test_a_profile_says_where_the_time_of_a_step_goes(make: Make) -> None:
    trainer = make("run", max_steps=13, profile=True)
    trainer.fit()
    folder = trainer.run_dir / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    phases = ("data", "forward", "losses", "backward", "update")
    for phase in phases:
        recorded = [
            event for event in events if event["name"] == f"step/{phase}" and event.get("cat") == "user_annotation"
        ]
        assert len(recorded) >= 5
    rows = [line.split() for line in (folder / "summary.txt").read_text().splitlines()[1:6]]
    assert {row[0] for row in rows} == set(phases)
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)
