"""Trainings that are killed again and again, and one that runs for long. They print their figures."""

import hashlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.shapes import generate
from detr.files import read_tensors
from tests.helpers.commands import TINIEST_MODEL, run
from tests.helpers.trainings import assert_same_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# A model whose steps take milliseconds, and all options that carry something from step to step.
TINY = (
    *TINIEST_MODEL,
    "allow_targets=[tests]",
    "data.prepare=null",
    "data.size=48",
    "data.max_size=64",
    "data.transforms.sizes=[40,48]",
    "data/mixing=[mosaic,mixup]",
    "data.batch_size=2",
    "trainer.accumulate=2",
    "trainer.ema=0.9",
    "trainer.freeze={backbone: 0.3}",
    "trainer.restart_after=0.5",
    "trainer.evaluations=6",
    "trainer.save_every_steps=3",
    "trainer.resume=auto",
    "log_every=5",
    "device=cpu",
)
FP16 = ("trainer.precision=fp16", "data.workers=1")
ELASTIC = ("trainer.elastic=true", "data.workers=0")
KILLS, STEPS = 100, 120


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generate(tmp_path / "shapes", train_images=24, val_images=3, image_size=48, max_objects=3)
    return tmp_path / "shapes"


def train(process: int, processes: int, port: int, options: Sequence[str]) -> None:
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(process)}
    os.setpgrp()
    outcome = run("train.py", *options)
    if outcome.code:
        print(outcome.output)
    os._exit(outcome.code)


def start(processes: int, options: Sequence[str]) -> list[BaseProcess]:
    """Forked from here, where everything is imported, so that a start takes no longer than it must."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=train, args=(n, processes, port, options)) for n in range(processes)]
    for process in started:
        process.start()
    return started


def end(processes: Sequence[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def last(run_dir: Path) -> dict[str, Any]:
    return read_tensors(run_dir / "checkpoints" / "last.pt")


@pytest.mark.parametrize(("options", "worlds"), [(FP16, (1,)), (ELASTIC, (1, 2))], ids=["fp16", "elastic"])
def test_killed_a_hundred_times_a_training_ends_as_if_it_had_not_been(
    data: Path, tmp_path: Path, options: Sequence[str], worlds: Sequence[int]
) -> None:
    """With kill -9, at random instants: while it starts, trains, evaluates, saves, and returns to its best."""
    common = [*TINY, *options, f"data.root={data}", f"trainer.max_steps={STEPS}"]
    torch.set_num_threads(1)
    straight = tmp_path / "straight"
    begun = time.monotonic()
    first = start(1, [*common, f"run_dir={straight}"])
    while not (straight / "checkpoints" / "last.pt").exists():
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    assert end(first) == [0]
    expected = last(straight)
    assert expected["training"]["step"] == STEPS
    random, kills, while_saving, rounds = np.random.default_rng(len(worlds)), 0, 0, 0
    while kills < KILLS:
        rounds += 1
        killed, ended = tmp_path / f"killed{rounds}", False
        while not ended:
            world = 1 if kills >= KILLS else worlds[random.integers(len(worlds))]
            processes = start(world, [*common, f"run_dir={killed}"])
            for process in processes if kills < KILLS else ():
                process.join(random.uniform(0, 2.5 * seconds) / world)
            if kills >= KILLS or any(process.exitcode is not None for process in processes):
                assert end(processes) == [0] * world
                ended = True
                continue
            for process in processes:
                assert process.pid is not None
                for pid in [*children(process.pid), process.pid]:
                    os.kill(pid, signal.SIGKILL)
            end(processes)
            while_saving += any((killed / "checkpoints").glob("*.tmp"))
            kills += 1
        found = last(killed)
        found["config"] = expected["config"]
        assert_same_state(found, expected)
        print(f"{kills} kills, {while_saving} while saving; {rounds} trainings of {STEPS} steps, all equal", flush=True)


def test_any_number_of_processes_gives_the_same_bits(data: Path, tmp_path: Path) -> None:
    """1, 2, 3 and 4 without a stop, and a training that is killed and goes on with another number of them."""
    common = [*TINY, *ELASTIC, f"data.root={data}", "trainer.accumulate=4", "trainer.max_steps=40"]
    common += ["model.encoder.dropout=0.1", "trainer.freeze=null"]
    torch.set_num_threads(1)
    found = {}
    for world in (1, 2, 3, 4):
        begun = time.monotonic()
        assert end(start(world, [*common, f"run_dir={tmp_path / str(world)}"])) == [0] * world
        found[f"{world} processes, {time.monotonic() - begun:.0f} s"] = checksum(tmp_path / str(world))
    killed, worlds = tmp_path / "killed", []
    for world, step in ((4, 7), (1, 16), (3, 25), (2, 33)):
        processes = start(world, [*common, f"run_dir={killed}"])
        while (
            not (killed / "metrics.jsonl").exists()
            or f'"step": {step - step % 5}' not in (killed / "metrics.jsonl").read_text()
        ):
            time.sleep(0.01)
        for process in processes:
            assert process.exitcode is None and process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        end(processes)
        worlds.append(f"{world} to step {last(killed)['training']['step']}")
    assert end(start(1, [*common, f"run_dir={killed}"])) == [0]
    found[f"killed: {', '.join(worlds)}, 1 to the end"] = checksum(killed)
    for name, digest in found.items():
        print(f"{digest}  {name}", flush=True)
    assert len(set(found.values())) == 1


def checksum(run_dir: Path) -> str:
    """Of all tensors and numbers in the last checkpoint."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for name in value:
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
        else:
            digest.update(repr(value).encode())

    content = last(run_dir)
    assert content["training"]["step"] == 40
    add({name: value for name, value in content.items() if name != "config"})  # which names the folder
    return digest.hexdigest()[:16]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def measured(pid: int) -> tuple[float, int]:
    """MiB in main memory, shared or not, and the number of open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_a_long_training_takes_no_more_and_no_more(data: Path, tmp_path: Path) -> None:
    """Memory and open files of the training and of its workers, and what it logs, over 2,000 steps."""
    steps = 2000
    options = [*TINY, f"data.root={data}", f"run_dir={tmp_path / 'run'}", "data.workers=2", "trainer.evaluations=40"]
    options += ["trainer.save_every_steps=50", "trainer.accumulate=1", f"trainer.max_steps={steps}"]
    (process,) = start(1, options)
    assert process.pid is not None
    log, rows = tmp_path / "run" / "metrics.jsonl", []
    while process.is_alive():
        time.sleep(1)
        try:
            own, workers = measured(process.pid), [measured(child) for child in children(process.pid)]
            bytes_logged = sum(
                file.stat().st_size for file in log.parent.rglob("*") if file.suffix not in (".pt", ".tmp")
            )
        except (OSError, IndexError):  # one that has ended meanwhile
            continue
        if len(workers) == 2:  # not while it evaluates, with two more
            step = log.read_text().count("\n") if log.exists() else 0
            rows.append([step, *own, *(max(values) for values in zip(*workers, strict=True)), bytes_logged])
    process.join()
    assert process.exitcode == 0
    table = np.array(rows)
    third = len(table) // 3
    names = ("MiB of the training", "its open files", "MiB of a worker", "its open files", "bytes logged")
    early, late = np.median(table[third : 2 * third], axis=0), np.median(table[-third:], axis=0)
    for name, before, after in zip(names, early[1:], late[1:], strict=True):
        print(f"{name}: {before:.1f} in the second third of the time, {after:.1f} in the last")
    assert (late[[1, 3]] < 1.03 * early[[1, 3]] + 2).all()  # memory
    assert (late[[2, 4]] <= early[[2, 4]] + 5).all()  # files; those of a worker are batches on their way
    growth = (late[5] - early[5]) / (late[0] - early[0])
    print(f"{growth:.0f} bytes for each line of metrics.jsonl")
    assert growth < 2 * early[5] / early[0]
