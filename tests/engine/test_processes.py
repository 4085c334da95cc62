"""Several processes, by gloo on the CPU: the same as one, and what happens when something goes wrong in one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detr import distributed
from detr.engine import TrainerConfig, TrainingStep
from detr.errors import NonFiniteError, UserError
from detr.losses import HungarianMatcher, SetCriterion
from detr.losses.classification import ClassificationLoss, CrossEntropy, SigmoidFocal
from detr.models.decoders.transformer import TransformerDecoder
from detr.models.detr import DETR
from detr.models.encoders.transformer import TransformerEncoder
from detr.models.layers.positions import SinePosition
from detr.weights import newest, read_checkpoint
from tests.helpers import TinyBackbone, make_batch, random_targets, torchrun
from tests.helpers.commands import REPOSITORY, checksum

STEPS = 20
COUNTS = [3, 0, 0, 0, 1, 11, 2, 5]  # objects in the images of a step; the second process has none in the first batch


def build(loss: ClassificationLoss, **options: Any) -> TrainingStep:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.0}
    model = DETR(
        backbone=TinyBackbone(),
        encoder=TransformerEncoder(position=SinePosition(d_model=32), num_layers=1, **sizes),
        decoder=TransformerDecoder(num_layers=2, **sizes),
        num_classes=5,
        num_queries=7,
        background=loss.background,
    )
    model.train()
    model.backbone.eval()  # statistics of a batch are another thing for half of it
    # Plain gradient descent: Adam would make steps of full size of what is nothing but rounding.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    criterion = SetCriterion(matcher=HungarianMatcher(), num_classes=5, classification=loss)
    return TrainingStep(model=model, criterion=criterion, optimizer=optimizer, config=TrainerConfig(**options), seed=0)


def batches(step: int, process: int, processes: int, accumulate: int) -> list[Any]:
    """The part of one process of the eight images of a step: the first process has the first half of each batch."""
    generator = torch.Generator().manual_seed(step)
    images = [torch.randn(3, 32 + 16 * (index % 2), 48, generator=generator) for index in range(8)]
    targets = random_targets(COUNTS, num_classes=5, seed=step)
    chosen = torch.arange(8).view(accumulate, processes, -1)[:, process].tolist()
    # Whole images as uint8, padded to the same size everywhere.
    everything = make_batch(images)
    pixels = (everything.images * 40 + 128).clamp(0, 255).to(torch.uint8)
    return [
        (type(everything)(images=pixels[rows], mask=everything.mask[rows]), [targets[row] for row in rows])
        for rows in chosen
    ]


def train(
    process: int, processes: int, accumulate: int, kind: type[ClassificationLoss], port: int, folder: Path
) -> None:
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(process)}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), timeout=1.0):
        step = build(kind(), accumulate=accumulate)
        losses = [step(batches(n, process, processes, accumulate), n)["loss"] for n in range(STEPS)]
        torch.save(
            {"losses": losses, "model": step.model.state_dict()}, folder / f"{process}-of-{processes}-{accumulate}.pt"
        )


@pytest.mark.parametrize("kind", [pytest.param(CrossEntropy, marks=pytest.mark.slow), SigmoidFocal])
def test_two_processes_and_accumulated_batches_equal_one_large_batch(
    kind: type[ClassificationLoss], tmp_path: Path, free_port: int
) -> None:
    train(0, 1, 1, kind, 0, tmp_path)
    train(0, 1, 2, kind, 0, tmp_path)
    mp.spawn(train, (2, 1, kind, free_port, tmp_path), nprocs=2)
    one, accumulated, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("0-of-1-1", "0-of-1-2", "0-of-2-1", "1-of-2-1")
    )
    assert one["losses"][-1] < 0.95 * one["losses"][0]
    for other, tolerance in ((accumulated, 1e-6), (first, 1e-5), (second, 1e-5)):
        assert other["losses"] == pytest.approx(one["losses"], rel=tolerance)
        for name, expected in one["model"].items():
            torch.testing.assert_close(other["model"][name], expected, atol=tolerance, rtol=tolerance, msg=name)
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def fail_in_one(process: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), timeout=1.0):
        step = build(CrossEntropy())
        ((images, targets),) = batches(0, process, 2, 1)
        before = [parameter.clone() for parameter in step.model.parameters()]
        if process == 1:
            targets[1] = type(targets[1])(**{**vars(targets[1]), "boxes": torch.full((len(targets[1]), 4), torch.nan)})
        with pytest.raises(NonFiniteError, match=r"The targets' boxes|in another process"):
            step([(images, targets)], 0)
        assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
        step(batches(1, process, 2, 1), 1)  # and both go on


def test_what_is_not_finite_in_one_process_stops_the_step_in_all(free_port: int) -> None:
    mp.spawn(fail_in_one, (free_port,), nprocs=2)


def test_torchrun_trains_evaluates_and_writes_once(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "data.batch_size=2", "trainer.max_steps=3", "log_every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(
        torchrun(options), cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert "Several processes need run_dir=PATH" in refused.stdout + refused.stderr
    folder = tmp_path / "run"
    done = subprocess.run(
        torchrun([*options, f"run_dir={folder}"]),
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["group"]) for record in records] == [
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (3, "val"),
    ]
    assert (folder / "train.log").read_text().count("Everything goes to") == 1
    assert json.loads((folder / "evaluation" / "metrics.json").read_text())["bbox"].keys() >= {"AP"}


@pytest.mark.slow
def test_processes_return_to_the_best_checkpoint_alike(tiny_options: list[str], tmp_path: Path) -> None:
    """As one process with as large batches does."""
    options = [*tiny_options, "model.backbone.norm=group", "model.encoder.dropout=0.0", "trainer.limit_epoch_steps=2"]
    options += ["trainer.epochs=3", "trainer.ema=0.9", "trainer.restart_after=0.5", "trainer.restart_decay=0.8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    weights = []
    for processes in (1, 2):
        own = [*options, f"data.batch_size={4 // processes}", f"run_dir={tmp_path / str(processes)}"]
        command = [sys.executable, "train.py", *own] if processes == 1 else torchrun(own)
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        log = (tmp_path / str(processes) / "train.log").read_text()
        assert log.count("Restart 1, at step 4") == 1, log
        weights.append(read_checkpoint(tmp_path / str(processes) / "checkpoints" / "last.pt").training["model"])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_instant_a_run_ends_as_if_it_had_not_been(
    tiny_options: list[str], tmp_path: Path, processes: int
) -> None:
    """kill -9 at ten random instants each: while it trains, evaluates and, after every step, saves."""
    options = [
        *tiny_options,
        "data.batch_size=2",
        "trainer.max_steps=200",
        "trainer.save_every_steps=1",
        "trainer.resume=auto",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(folder: Path) -> list[str]:
        own = [*options, f"run_dir={folder}"]
        return torchrun(own) if processes == 2 else [sys.executable, "train.py", *own]

    straight, killed = (
        tmp_path / "straight" / "checkpoints" / "last.pt",
        tmp_path / "killed" / "checkpoints" / "last.pt",
    )
    subprocess.run(command(straight.parents[1]), cwd=REPOSITORY, env=environment, check=True)
    random, steps, while_saving = torch.Generator().manual_seed(processes), [], 0
    for _ in range(10):
        before = killed.stat().st_mtime_ns if killed.exists() else 0
        process = subprocess.Popen(command(killed.parents[1]), cwd=REPOSITORY, env=environment)
        while not killed.exists() or killed.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(2 * float(torch.rand((), generator=random)))
        assert process.poll() is None, "the training is to last longer than all that is killed"
        for pid in [process.pid, *descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        while_saving += killed.with_suffix(".tmp").exists()
        steps.append(newest(killed).training["step"])
    subprocess.run(command(killed.parents[1]), cwd=REPOSITORY, env=environment, check=True)
    print(f"{processes} processes, killed at steps {steps}, {while_saving} times while saving")
    assert checksum(killed) == checksum(straight)


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those started by them: torchrun's are of sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


@pytest.mark.slow
def test_a_process_that_dies_starts_all_again_from_the_last_checkpoint(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "data.batch_size=2", "trainer.max_steps=30", "trainer.save_every_steps=1", "log_every=1"]
    options += ["trainer.evaluate_every=100", "trainer.resume=auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    subprocess.run(torchrun([*options, f"run_dir={straight}"]), cwd=REPOSITORY, env=environment, check=True)
    command = torchrun([*options, f"run_dir={parts}"], "--max_restarts=2")
    launcher = subprocess.Popen(command, cwd=REPOSITORY, env={**environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    metrics = parts / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert launcher.poll() is None
        time.sleep(0.02)
    os.kill(descendants(launcher.pid)[-1], signal.SIGKILL)
    assert launcher.wait(timeout=300) == 0
    assert "Going on from" in (parts / "train.log").read_text()
    assert checksum(parts / "checkpoints" / "last.pt") == checksum(straight / "checkpoints" / "last.pt")


def test_a_process_started_again_is_told_how_it_meets_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RESTART_COUNT", "1"), ("USE_AGENT_STORE", "True")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        distributed.process_group(torch.device("cpu")),
    ):
        pass


def hang(process: int, port: int, result: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process), "WORLD_SIZE": "2"}
    try:
        with distributed.process_group(torch.device("cpu"), timeout=5 / 60):
            dist.barrier()
            if process == 1:
                time.sleep(30)
                return
            distributed.mean(torch.ones(3))
    except Exception as error:
        result.put(str(error))
        raise


@pytest.mark.slow
def test_a_process_that_hangs_is_named(free_port: int) -> None:
    context = mp.get_context("spawn")
    result = context.SimpleQueue()
    processes = [context.Process(target=hang, args=(rank, free_port, result)) for rank in range(2)]
    for process in processes:
        process.start()
    processes[0].join(60)
    processes[1].kill()
    message = result.get()
    assert "Process 0 of 2 waited in vain" in message and "these do not answer: 1." in message
    assert "trainer.resume=auto" in message


def agree(process: int, port: int, result: Any) -> None:
    """Process 0 decides, both compare; then the other one dies."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process), "WORLD_SIZE": "2"}

    def refuse() -> None:
        raise UserError(f"refused by {process}")

    try:
        with distributed.process_group(torch.device("cpu"), timeout=0.5):
            distributed.check_same({"lr": "1", "seed": "2"})
            with pytest.raises(UserError) as refused:
                distributed.check_same({"lr": "1", "seed": str(process), f"only in {process}": "3"})
            result.put((process, str(refused.value)))
            with pytest.raises(UserError, match="refused by 0"):
                distributed.by_first(refuse)
            assert distributed.by_first(lambda: {"from": process, "weights": torch.ones(3)})["from"] == 0
            if process == 1:
                os._exit(1)
            distributed.mean(torch.ones(3))
    except UserError as error:
        result.put((process, str(error)))


def test_processes_agree_on_what_they_do_and_report_one_that_dies(free_port: int) -> None:
    context = mp.get_context("spawn")
    result = context.SimpleQueue()
    processes = [context.Process(target=agree, args=(rank, free_port, result)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    said = [result.get() for _ in range(3)]
    differ = [message for _, message in said if "differ" in message]
    host = socket.gethostname()
    assert differ[0] == differ[1] and f"seed is 1 in process 1 on {host}, 0 in process 0 on {host}" in differ[0]
    assert "only in 1 is 3 in process 1" in differ[0] and "only in 0 is absent in process 1" in differ[0]
    assert "lr" not in differ[0] and "the same command" in differ[0]
    [(process, lost)] = [(process, message) for process, message in said if "differ" not in message]
    assert process == 0 and lost.startswith("Process 0 of 2 lost the connection to another one")
    assert "Of processes 0 to 1 these do not answer: 1." in lost


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": None}, "RANK is not set, wanted a number of at least 0 and below 2. Start several"),
        ({"RANK": "2"}, "RANK is '2', wanted"),
        ({"RANK": "-1"}, "RANK is '-1', wanted"),
        ({"RANK": "first"}, "RANK is 'first', wanted"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', wanted a number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', wanted a number of at least 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', wanted a number of at least 1"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, wanted the name or address of the first machine"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is ''"),
        ({"MASTER_ADDR": "http://host"}, "MASTER_ADDR is 'http://host'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set, wanted a number of at least 1 and below 65536"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "1.5"}, "MASTER_PORT is '1.5'"),
        ({}, "Process 0 of 2 did not find the others at 127.0.0.1:"),
        ({"RANK": "1"}, "Process 1 of 2 did not find the others at 127.0.0.1:"),
    ],
)
def test_processes_that_do_not_meet_are_told_why(
    environment: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    complete = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    for name, value in {**complete, **environment}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as refused, distributed.process_group(torch.device("cpu"), timeout=0.01):
        pass
    assert message in str(refused.value)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use.*MASTER_PORT"),
            distributed.process_group(torch.device("cpu"), timeout=0.02),
        ):
            pass
