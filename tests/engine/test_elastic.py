"""The same bits on any number of processes: sums in pairs, whole trainings that change their number, evaluations."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from datasets import evaluation_loader
from detr import distributed
from detr.engine import Callback, Trainer, TrainerConfig, elastic
from detr.errors import NonFiniteError, UserError
from detr.evaluation import CocoEvaluator, MatchingDiagnostics
from detr.losses import HungarianMatcher, SetCriterion
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.positions import SinePosition
from tests.helpers import TinyBackbone, make_batch, random_targets
from tests.helpers.commands import TINY_MODEL, Outcome, run
from tests.helpers.data import shapes_set
from tests.helpers.trainings import Make, assert_same_state, last

STEPS, BATCHES = 4, 4
# Everything that is random, and statistics of batches.
EVERYTHING = (
    "model=dn_detr",
    *TINY_MODEL,
    "model/attention=hard",
    "data/mixing=mosaic",
    "trainer.ema=0.9",
    "data.batch_size=2",
    f"trainer.accumulate={BATCHES}",
    "trainer.elastic=true",
    "trainer.resume=auto",
    f"trainer.max_steps={STEPS}",
    "trainer.evaluate_every=2",
    "scheduler.warmup=0.0",
    "log_every=1",
    "logger.tensorboard=null",
)


class Stop(Callback):
    """Stops the training after some steps, as a signal would."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps

    def on_step_end(self, trainer: Trainer, losses: Any) -> None:
        if trainer.state.step in self.steps:
            trainer.stop._received.append(15)


def train_one(process: int, processes: int, port: int, options: Sequence[str], outcomes: Path) -> None:
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(process)}
    outcome = run("train.py", *options)
    (outcomes / f"{process}.json").write_text(json.dumps(vars(outcome)))


def train(processes: int, port: int, folder: Path, *options: str) -> Outcome:
    """Of process 0; all of them end with the same code."""
    arguments = (processes, port, [*options, f"run_dir={folder}"], folder.parent)
    if processes == 1:
        train_one(0, *arguments)
    else:
        mp.spawn(train_one, arguments, nprocs=processes)
    outcomes = [Outcome(**json.loads((folder.parent / f"{n}.json").read_text())) for n in range(processes)]
    assert len({outcome.code for outcome in outcomes}) == 1, outcomes
    return outcomes[0]


def records(folder: Path) -> list[dict[str, Any]]:
    """What the log has of each step, but for times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "time" not in name and "per_s" not in name and name != "eta"}
            for line in lines]  # fmt: skip


@pytest.mark.parametrize("count", range(1, 10))
def test_sums_are_added_in_the_same_pairs_however_they_are_divided(count: int) -> None:
    rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))

    def by_hand(values: Sequence[torch.Tensor]) -> torch.Tensor:
        middle = len(values) // 2
        return values[0] if len(values) == 1 else by_hand(values[:middle]) + by_hand(values[middle:])

    def compute(number: int) -> torch.Tensor:
        return rows[number].clone()

    for processes in range(1, count + 1):
        parts = [range(p * count // processes, (p + 1) * count // processes) for p in range(processes)]
        nodes = [node for own in parts for node in elastic._nodes((0, count), own)]
        assert [number for start, stop in nodes for number in range(start, stop)] == [*range(count)]
        sums = {node: elastic._computed(node, compute) for node in nodes}
        assert torch.equal(elastic._combined((0, count), sums), by_hand(rows))
    torch.testing.assert_close(by_hand(rows), rows.sum(0))


def test_one_process_computes_what_accumulated_batches_do(make: Make) -> None:
    """But for the order of sums, where nothing is normalized by statistics of the step so far."""
    options = {"accumulate": 3, "batch_size": 2, "max_steps": 4, "freeze": {"backbone": None}}
    plain, dealt = make("plain", **options), make("dealt", elastic=True, **options)
    for trainer in (plain, dealt):
        trainer.fit()
    before = last(plain.run_dir)["model"]
    for name, tensor in last(dealt.run_dir)["model"].items():
        torch.testing.assert_close(tensor, before[name], atol=1e-5, rtol=1e-4, msg=name)
    losses = [[row["loss"] for row in records(trainer.run_dir) if "loss" in row] for trainer in (plain, dealt)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_statistics_of_batch_norms_move_by_the_mean_of_a_step(make: Make) -> None:
    trainer = make("run", elastic=True, accumulate=3, batch_size=2, max_steps=1)
    norm = trainer.model.backbone.body[1]
    means: list[torch.Tensor] = []
    norm.register_forward_hook(lambda module, given, output: means.append(given[0].detach().mean((0, 2, 3))))
    trainer._train_epoch()
    expected = norm.momentum * torch.stack(means[:3]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, atol=1e-6, rtol=1e-5)
    assert norm.num_batches_tracked == 1


def test_what_cannot_be_elastic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compile", "sync_batch_norm"):
        with pytest.raises(UserError, match=f"trainer.elastic: wanted trainer.{name}=false"):
            TrainerConfig(elastic=True, **{name: True})
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with (
        pytest.raises(UserError, match=r"a step has 2 batches .* for each of 3 processes"),
        elastic.alike(TrainerConfig(elastic=True, accumulate=2)),
    ):
        pass


@pytest.mark.parametrize("wanted", [True, False])
def test_the_threads_of_the_process_come_back(wanted: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with elastic.alike(TrainerConfig(elastic=wanted)):
            assert torch.get_num_threads() == (1 if wanted else 3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_operation_that_cannot_repeat_itself_names_the_option_that_forbids_it() -> None:
    step = elastic.ElasticStep(**parts(elastic=True))
    with (
        pytest.raises(UserError, match=r"trainer.elastic=true cannot be kept: .* set trainer.elastic=false"),
        step._explained(batches(0)[0]),
    ):
        raise RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation, but ...")


def fail(process: int, processes: int, port: int, folder: Path) -> None:
    """A step that fails in the second process leaves both as they were, and both go on."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), timeout=1.0):
        step = elastic.ElasticStep(**parts(accumulate=3, elastic=True, non_finite="skip"))
        before = [tensor.clone() for tensor in (*step.model.parameters(), *step.model.buffers())]
        own = [(images, targets) for images, targets in batches(0)[step.own.start : step.own.stop]]
        if process == 1:
            own[-1][1][0].boxes[:] = torch.nan
        with pytest.raises(NonFiniteError, match=r"The targets' boxes|in another process"):
            step(own, 0)
        assert all(map(torch.equal, before, (*step.model.parameters(), *step.model.buffers())))
        losses = step(batches(1)[step.own.start : step.own.stop], 1)
        torch.save({"losses": losses, "model": step.model.state_dict()}, folder / f"{process}.pt")


def parts(num_classes: int = 5, **options: Any) -> dict[str, Any]:
    """Of a step whose model has batch norms and dropout."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.1}
    model = DETR(
        backbone=TinyBackbone(),
        encoder=TransformerEncoder(position=SinePosition(d_model=32), num_layers=1, **sizes),
        decoder=TransformerDecoder(num_layers=2, **sizes),
        num_classes=num_classes,
        num_queries=7,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    criterion = SetCriterion(matcher=HungarianMatcher(), num_classes=num_classes)
    return {"model": model.train(), "criterion": criterion, "optimizer": optimizer, "seed": 0,
            "config": TrainerConfig(**options)}  # fmt: skip


def batches(step: int) -> list[Any]:
    """Three batches of two images."""
    generator = torch.Generator().manual_seed(step)
    targets = random_targets([3, 1, 0, 0, 5, 2], num_classes=5, seed=step)
    found = []
    for index in range(0, 6, 2):
        batch = make_batch([torch.randint(256, (3, 48, 32 + 16 * n), generator=generator).float() for n in range(2)])
        found.append((type(batch)(images=batch.images.to(torch.uint8), mask=batch.mask), targets[index : index + 2]))
    return found


def test_a_step_that_fails_in_one_process_changes_nothing_in_any(tmp_path: Path, free_port: int) -> None:
    mp.spawn(fail, (2, free_port, tmp_path), nprocs=2)
    alone = elastic.ElasticStep(**parts(accumulate=3, elastic=True))
    losses = alone(batches(1), 1)
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        assert found["losses"] == losses
        assert all(torch.equal(found["model"][name], tensor) for name, tensor in alone.model.state_dict().items())


def evaluate(process: int, processes: int, port: int, root: Path, folder: Path) -> None:
    """On all images, and on some."""
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), timeout=1.0):
        for limit in (None, 5):
            val, step = shapes_set(root, "val"), parts(num_classes=3)
            evaluator = CocoEvaluator(
                loader=evaluation_loader(val, batch_size=2, workers=0),
                annotations=val.ground_truth(),
                categories=val.categories,
                diagnostics=MatchingDiagnostics(HungarianMatcher()),
                limit=limit,
            )
            if (found := evaluator(step["model"])) is not None:
                content = {"metrics": found.metrics.summary, "diagnostics": found.diagnostics, **vars(found.results)}
                torch.save(content, folder / f"{processes}-{limit}.pt")


def test_an_evaluation_finds_the_same_in_two_processes(shapes_root: Path, tmp_path: Path, free_port: int) -> None:
    evaluate(0, 1, 0, shapes_root, tmp_path)
    mp.spawn(evaluate, (2, free_port, shapes_root, tmp_path), nprocs=2)
    for limit in (None, 5):
        one, two = (torch.load(tmp_path / f"{n}-{limit}.pt", weights_only=False) for n in (1, 2))
        count = len(shapes_set(shapes_root, "val")) if limit is None else 6
        assert one.keys() == two.keys() and len(set(one["image_ids"].tolist())) == count
        for name, value in one.items():
            np.testing.assert_equal(two[name], value)


@pytest.mark.parametrize("processes", [(1, 2, 1), pytest.param((3, 1, 4), marks=pytest.mark.slow)])
def test_a_training_that_changes_its_number_of_processes_has_the_same_bits(
    tiny_options: list[str], tmp_path: Path, free_port: int, processes: Sequence[int]
) -> None:
    chosen = {option.partition("=")[0]: option for option in (*tiny_options, *EVERYTHING)}.values()
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    assert train(1, 0, straight, *chosen).code == 0
    stop = ("+callbacks.stop={_target_: tests.engine.test_elastic.Stop, steps: [1,2]}", "allow_targets=[tests]")
    for number, code in zip(processes, (75, 75, 0), strict=True):
        outcome = train(number, free_port, changed, *chosen, *stop)
        assert outcome.code == code, outcome.output
        assert "other options" not in outcome.output
    for folder in (straight, changed):
        assert last(folder)["training"]["step"] == STEPS
    one, other = last(straight), last(changed)
    del one["config"], other["config"]
    assert_same_state(one, other)
    found = [[row["loss"] for row in records(folder) if "loss" in row] for folder in (straight, changed)]
    assert found[0] == found[1] and len(found[0]) == STEPS
