"""How long a checkpoint holds a training up: until its content is copied, and until it is on the disk."""

import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch

from benchmarks.results import Row
from detr.config import build, build_model, compose
from detr.engine.state import TrainingState

CLASSES = 80


def run(*, repeats: int = 7) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        state = _state(Path(folder))
        copied, written = [], []
        for _ in range(repeats):
            begun = time.perf_counter()
            state.save()
            copied.append(time.perf_counter() - begun)
            state.wait()
            written.append(time.perf_counter() - begun)
        size = state.path().stat().st_size / 2**20
    case = "checkpoint of detr with a moving average"
    yield Row(case, "size", "MiB", size)
    yield Row(case, "until training goes on", "s", median(copied))
    yield Row(case, "until it is on the disk", "s", median(written))


def _state(folder: Path) -> TrainingState:
    """After one step with made-up gradients, which fills the optimizer's state."""
    config = compose(["model=detr", "model.backbone.weights=null"])
    model = build_model(config.model, num_classes=CLASSES)
    optimizer = build(config.optimizer, path="optimizer", model=model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        callbacks={},
        run_dir=folder,
        images=16,
        metadata={"config": {"data": {}, "model": {}}, "categories": []},
        keep=2,
    )
    state.averaged = deepcopy(model)
    return state
