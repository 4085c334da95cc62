"""Every part of a checkpoint and of a failed step, spoilt: refused with one message before anything is built, or harmless."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detr import Detector
from detr.config import build_model, compose, plain
from detr.engine import failures
from detr.engine.callbacks import MovingAverage, Restart, Validation
from detr.engine.optim import adamw
from detr.engine.state import TrainingState
from detr.errors import UserError
from detr.evaluation import CocoEvaluator
from detr.images import pad_to_batch
from detr.types import Category
from tests.helpers import random_targets
from tests.helpers.commands import TINY_MODEL
from tools import replay

CATEGORIES = [asdict(Category(id, name)) for id, name in ((4, "cat"), (9, "dog"), (40, "gnu"))]
WEIGHT, BIAS = "heads.0.class_head.weight", "heads.0.class_head.bias"
Spoil = Callable[[dict[str, Any]], Any]


def small() -> tuple[dict[str, Any], nn.Module]:
    """A configuration and its model, whose files have 500 kB."""
    torch.manual_seed(0)
    options = [option for option in TINY_MODEL if not option.startswith("model.backbone")]
    config = plain(compose([*options, "data.size=64", "data.max_size=96", "data.root=x"]))
    config["model"]["backbone"] = {"_target_": "tests.helpers.TinyBackbone"}
    return config, build_model(config["model"], num_classes=3, allow=("detr", "tests")).train()


def state_of(folder: Path) -> TrainingState:
    """Of a training with a loss scale and a moving average, as train.py makes it."""
    config, model = small()
    average = MovingAverage(model=model, decay=0.9)
    evaluator = CocoEvaluator.__new__(CocoEvaluator)  # which is not called
    validation = Validation(evaluator=evaluator, monitor="AP")
    state = TrainingState(
        model=model,
        optimizer=adamw(model, lr_factors={"bias": 0.1}),
        scaler=torch.amp.GradScaler("cpu"),
        callbacks={
            "moving_average": average,
            "restart": Restart(validation=validation, average=average, decay=None, fall=0.1),
            "validation": validation,
        },
        run_dir=folder,
        images=2,
        metadata={"config": config, "categories": CATEGORIES},
        keep=1,
    )
    state.averaged = average.average.module
    return state


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> TrainingState:
    """After one step, saved."""
    made = state_of(tmp_path_factory.mktemp("run"))
    for parameter in made.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    made.optimizer.step()
    made.scaler.scale(torch.ones(()))
    made.step = 1
    made.save()
    made.wait()
    return made


@pytest.fixture(scope="module")
def valid(state: TrainingState) -> dict[str, Any]:
    return torch.load(state.path())


def at(*place: Any, value: Any = None, change: Callable[[Any], Any] | None = None) -> Spoil:
    """Put another value at a place, or none where neither is given."""

    def spoil(content: dict[str, Any]) -> None:
        for key in place[:-1]:
            content = content[key]
        if change is None and value is None:
            del content[place[-1]]
        else:
            content[place[-1]] = value if change is None else change(content[place[-1]])

    return spoil


def damaged(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "NaN": damaged(math.nan),
    "infinite": damaged(math.inf),
    "sparse": torch.Tensor.to_sparse,
    "on no device": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "integer": lambda tensor: tensor.to(torch.int64),
    "quantized": quantized,
    "of another shape": lambda tensor: tensor[:1],
    "without a dimension": lambda tensor: tensor.sum(),
    "empty": lambda tensor: tensor[:0],
    "expanded": lambda tensor: torch.zeros(1).expand(10**12),
    "a list": torch.Tensor.tolist,
    "a number": lambda tensor: 1.0,
    "text": lambda tensor: "x",
}
NO_COUNTS = ("x", -1, 2**60, 10**400, 1.5, math.nan, True, [1], {"a": 1}, torch.ones(()), None)
OPTIMIZER = ("training", "optimizer", "state", WEIGHT)
CALLBACKS = ("training", "callbacks")
BOTH, RESUME, USE = ("resume", "use"), ("resume",), ("use",)
SPOILT: dict[str, tuple[tuple[str, ...], Spoil]] = {
    **{f"weights {kind}": (BOTH, at("model", WEIGHT, change=change)) for kind, change in TENSORS.items()},
    **{
        f"raw weights {kind}": (RESUME, at("training", "model", WEIGHT, change=change))
        for kind, change in TENSORS.items()
    },
    **{f"average {kind}": (RESUME, at(*OPTIMIZER, "exp_avg", change=change)) for kind, change in TENSORS.items()},
    "squares below 0": (RESUME, at(*OPTIMIZER, "exp_avg_sq", change=damaged(-1.0))),
    "no squares": (RESUME, at(*OPTIMIZER, "exp_avg_sq")),
    "steps of the optimizer below 0": (RESUME, at(*OPTIMIZER, "step", value=torch.tensor(-1.0))),
    "steps of the optimizer are text": (RESUME, at(*OPTIMIZER, "step", value="x")),
    "state of the optimizer is text": (RESUME, at(*OPTIMIZER, value="x")),
    "states of the optimizer are a list": (RESUME, at("training", "optimizer", "state", value=[1])),
    "no class of the optimizer": (RESUME, at("training", "optimizer", "class")),
    "optimizer is text": (RESUME, at("training", "optimizer", value="x")),
    "weights are a list": (BOTH, at("model", value=[1])),
    "weights are empty": (BOTH, at("model", value={})),
    "a weight is missing": (BOTH, at("model", BIAS)),
    "a weight too many": (BOTH, at("model", "more", value=torch.ones(2))),
    "a weight with a number for a name": (BOTH, at("model", 3, value=torch.ones(2))),
    **{
        f"{name} {number!r:.12}": (RESUME, at("training", name, value=number))
        for name in ("step", "skipped", "images")
        for number in NO_COUNTS
        if number is not None
    },
    **{f"no {name}": (BOTH, at(name)) for name in ("model", "config", "categories", "training", "format")},
    **{f"{name} is text": (BOTH, at(name, value="x")) for name in ("config", "categories", "training", "format")},
    "of a later format": (BOTH, at("format", value="detr-checkpoint-99")),
    "format is a number": (BOTH, at("format", value=3)),
    **{
        f"no {name} in training": (RESUME, at("training", name))
        for name in ("step", "skipped", "images", "optimizer", "scaler", "callbacks")
    },
    "callbacks are a list": (RESUME, at(*CALLBACKS, value=[1])),
    "a callback's state is text": (RESUME, at(*CALLBACKS, "validation", value="x")),
    "best is NaN": (RESUME, at(*CALLBACKS, "validation", "best", value=math.nan)),
    "best is infinite": (RESUME, at(*CALLBACKS, "validation", "best", value=math.inf)),
    "best is text": (RESUME, at(*CALLBACKS, "validation", "best", value="x")),
    "best step is negative": (RESUME, at(*CALLBACKS, "validation", "best_step", value=-1)),
    "evaluated step is a tensor": (RESUME, at(*CALLBACKS, "validation", "evaluated_step", value=torch.ones(2))),
    "count of averages is text": (RESUME, at(*CALLBACKS, "moving_average", "averaged", value="x")),
    "count of averages is negative": (RESUME, at(*CALLBACKS, "moving_average", "averaged", value=torch.tensor(-1))),
    "number of restarts is negative": (RESUME, at(*CALLBACKS, "restart", "restarts", value=-1)),
    "restart is due by a number": (RESUME, at(*CALLBACKS, "restart", "due", value=1)),
    "best since the restart is NaN": (RESUME, at(*CALLBACKS, "restart", "best", value=math.nan)),
    "scale is text": (RESUME, at("training", "scaler", "scale", value="x")),
    "scale is NaN": (RESUME, at("training", "scaler", "scale", value=math.nan)),
    "no growth of the scale": (RESUME, at("training", "scaler", "growth_interval")),
    "scaler is a list": (RESUME, at("training", "scaler", value=[1])),
    "a class without a name": (BOTH, at("categories", 0, "name")),
    "a class with a number for a name": (BOTH, at("categories", 0, "name", value=3)),
    "a class with text for an id": (BOTH, at("categories", 0, "id", value="x")),
    "two classes of one id": (BOTH, at("categories", 1, "id", value=4)),
    "a class is a number": (BOTH, at("categories", 0, value=3)),
    "a class too many": (BOTH, at("categories", change=lambda rows: [*rows, {"id": 1, "name": "x"}])),
    "no classes": (BOTH, at("categories", value=[])),
    "10,000 classes": (BOTH, at("categories", value=[{"id": n, "name": "x"} for n in range(10**4)])),
    "model of the configuration is text": (BOTH, at("config", "model", value="x")),
    "data of the configuration are text": (BOTH, at("config", "data", value="x")),
    "validation data of the configuration are text": (BOTH, at("config", "data", "val", value="x")),
    "a tensor in the configuration": (BOTH, at("config", "model", "num_queries", value=torch.ones(()))),
    **{
        f"size {size!r:.12}": (USE, at("config", "data", name, value=size))
        for name in ("size", "max_size")
        for size in (0, -3, 10**9, 10**400, math.inf, math.nan, "x", 3.5, [1], True)
    },
    **{
        f"{'.'.join(map(str, place))} {value!r:.12}": (USE, at("config", "model", *place, value=value))
        for place in (
            ("num_queries",),
            ("encoder", "d_model"),
            ("encoder", "num_layers"),
            ("decoder", "num_layers"),
            ("decoder", "dim_feedforward"),
        )
        for value in (10**7, 10**12, 0, -1, "x", math.nan, [1])
    },
}


def some(names: Iterable[str]) -> list[Any]:
    """Every twelfth in the usual tests, all in the slow ones."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (index % 12 > 0)) for index, name in enumerate(names)]


@pytest.mark.parametrize("name", some(SPOILT))
def test_a_spoilt_checkpoint_is_refused_or_of_no_matter(
    name: str, valid: dict[str, Any], state: TrainingState, tmp_path: Path
) -> None:
    """Parts of the training are of no matter for use, options of the model for going on: those are the user's own."""
    refusing, spoil = SPOILT[name]
    content, path = copy.deepcopy(valid), tmp_path / "bad.pt"
    spoil(content)
    torch.save(content, path)
    readers: dict[str, Callable[[], Any]] = {
        "use": lambda: Detector.from_checkpoint(path, allow_targets=["tests"]),
        "resume": lambda: state.resume(str(path)),
    }
    for reader, read in readers.items():
        if reader in refusing:
            with pytest.raises(UserError, match=r"bad\.pt") as caught:
                read()
            assert len(str(caught.value)) < 1000
        else:
            read()


def test_the_valid_one_passes(state: TrainingState) -> None:
    assert state.resume(str(state.path())) == state.path() and state.step == 1
    assert Detector.from_checkpoint(state.path(), allow_targets=["tests"]).size == 64


# Failed steps.


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config, model = small()
    model.get_submodule("encoder").requires_grad_(False).eval()
    images = pad_to_batch([torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((37, 41), (32, 53))])
    batches = [(images, random_targets([2, 0], num_classes=3))]
    metadata = {"config": config, "categories": CATEGORIES}
    folder = tmp_path_factory.mktemp("failed")
    return torch.load(failures.save(folder, model, batches, step=7, seed=3, place=(0, 0), scale=1.0, metadata=metadata))


BATCH = ("batches", 0)
TARGET = (*BATCH, "targets", 0)
FAILED: dict[str, Spoil] = {
    **{
        f"no {name}": at(name)
        for name in ("model", "frozen", "evaluated", "batches", "step", "seed", "process", "first", "scale")
    },
    **{f"no {name}": at(name) for name in ("config", "categories", "format")},
    **{
        f"weights {kind}": at("model", WEIGHT, change=change)
        for kind, change in TENSORS.items()
        if kind not in ("NaN", "infinite")  # which may be what made the step fail
    },
    **{
        f"{name} {number!r:.12}": at(name, value=number)
        for name in ("step", "seed", "process", "first")
        for number in ("x", -1)
    },
    "step is huge": at("step", value=10**400),
    **{f"scale {number!r}": at("scale", value=number) for number in ("x", -1.0, math.inf, math.nan)},
    "frozen are unknown": at("frozen", value=["x"]),
    "frozen are numbers": at("frozen", value=[1]),
    "evaluated are unknown": at("evaluated", value=["x"]),
    "evaluated are text": at("evaluated", value="x"),
    "no batch": at("batches", value=[]),
    "batches are text": at("batches", value="x"),
    "no images": at(*BATCH, "images"),
    "images of floats": at(*BATCH, "images", "images", change=torch.Tensor.float),
    "images of one channel": at(*BATCH, "images", "images", change=lambda images: images[:, :1]),
    "images without pixels": at(*BATCH, "images", "images", change=lambda images: images[..., :0]),
    "a mask of another size": at(*BATCH, "images", "mask", change=lambda mask: mask[:, :5]),
    "a mask of numbers": at(*BATCH, "images", "mask", change=torch.Tensor.float),
    "padded is text": at(*BATCH, "images", "padded", value="x"),
    "a target too few": at(*BATCH, "targets", change=lambda targets: targets[:1]),
    "an unknown field": at(*TARGET, "more", value=1),
    "labels out of range": at(*TARGET, "labels", value=torch.tensor([0, 3])),
    "labels below 0": at(*TARGET, "labels", value=torch.tensor([0, -1])),
    "labels of floats": at(*TARGET, "labels", change=torch.Tensor.float),
    "boxes of three numbers": at(*TARGET, "boxes", change=lambda boxes: boxes[:, :3]),
    "boxes too few": at(*TARGET, "boxes", change=lambda boxes: boxes[:1]),
    "image id is text": at(*TARGET, "image_id", value="x"),
    "size of three numbers": at(*TARGET, "original_size", value=(1, 2, 3)),
    "size of zero": at(*TARGET, "original_size", value=(0, 3)),
    "classes too many": at("categories", change=lambda rows: [*rows, {"id": 1, "name": "x"}]),
    "classes are text": at("categories", value="x"),
    "trainer is text": at("config", "trainer", value="x"),
    "unknown precision": at("config", "trainer", "precision", value="fp7"),
    "precision is a list": at("config", "trainer", "precision", value=[1]),
    "accumulate is text": at("config", "trainer", "accumulate", value="x"),
    "criterion is a number": at("config", "criterion", value=3),
    "weight of a loss is text": at("config", "criterion", "terms", "bbox", "weight", value="x"),
    "d_model is absurd": at("config", "model", "encoder", "d_model", value=10**7),
    "num_layers is absurd": at("config", "model", "encoder", "num_layers", value=10**6),
}


@pytest.mark.parametrize("name", some(FAILED))
def test_a_spoilt_failed_step_is_refused(name: str, failed: dict[str, Any], tmp_path: Path) -> None:
    content = copy.deepcopy(failed)
    FAILED[name](content)
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt"):
        replay.main(["--allow-targets", "tests", str(tmp_path / "bad.pt")])


def test_weights_that_are_nan_are_looked_into(
    failed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = copy.deepcopy(failed)
    content["model"][WEIGHT] = damaged(math.nan)(content["model"][WEIGHT])
    torch.save(content, tmp_path / "bad.pt")
    replay.main(["--allow-targets", "tests", str(tmp_path / "bad.pt")])
    assert "Step 7 failed again" in capsys.readouterr().out
