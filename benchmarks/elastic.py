"""What the same bits on any number of processes cost: a step with and without them, in 1, 2 and 4 processes."""

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.multiprocessing as mp

from benchmarks.results import Row
from benchmarks.step import CLASSES, random_batch
from detr import distributed
from detr.config import build, build_criterion, build_model, compose
from detr.engine import TrainerConfig, TrainingStep
from detr.engine.elastic import ElasticStep

BATCHES, IMAGES, SIZE, MODEL = 4, 4, (160, 160), "small"


def run(*, repeats: int = 7) -> Iterator[Row]:
    for processes in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_measure, (processes, port, repeats, Path(folder)), nprocs=processes)
            plain, dealt, sent = json.loads((Path(folder) / "0.json").read_text())
        case = f"{processes} process{'es'[: 2 * (processes > 1)]}"
        yield Row(case, "step as usual", "s", plain)
        yield Row(case, "elastic step", "s", dealt)
        yield Row(case, "sent by each", "MiB", sent)


def _measure(process: int, processes: int, port: int, repeats: int, folder: Path) -> None:
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(process)}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        steps = {"plain": _step(False, BATCHES // processes), "elastic": _step(True, BATCHES)}
        batches = [random_batch(SIZE, IMAGES)] * (BATCHES // processes)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats + 1):
            for name, step in steps.items():
                distributed.barrier()
                begun = time.perf_counter()
                step(batches, 0)
                distributed.barrier()
                times[name].append(time.perf_counter() - begun)
        if process == 0:
            held = 4 * sum(p.numel() for p in steps["elastic"].model.parameters() if p.requires_grad)
            sent = 2 * held * (processes - 1) / processes / 2**20
            (folder / "0.json").write_text(json.dumps([median(times["plain"][1:]), median(times["elastic"][1:]), sent]))


def _step(elastic: bool, accumulate: int) -> TrainingStep:
    torch.manual_seed(0)
    config = compose([f"model={MODEL}", "model.backbone.weights=null"])
    model = build_model(config.model, num_classes=CLASSES).train()
    return (ElasticStep if elastic else TrainingStep)(
        model=model,
        criterion=build_criterion(config.criterion, num_classes=CLASSES),
        optimizer=build(config.optimizer, path="optimizer", model=model),
        config=TrainerConfig(elastic=elastic, accumulate=accumulate),
        seed=0,
    )
