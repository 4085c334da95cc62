"""Records, and drawings that stay inside the image."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch import nn

from detr.drawing import draw_detections
from detr.errors import UserError
from detr.evaluation import Sample
from detr.reporting import JsonLines, Progress, Reporter, TensorBoard, describe_model
from detr.reporting.samples import draw_sample
from detr.types import Detections
from tests.helpers import make_batch, make_target

HOSTILE = "<b>[x](javascript:alert(1))"


def detections(boxes: list[list[float]]) -> Detections:
    count = len(boxes)
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.linspace(0.9, 0.2, count),
        labels=torch.arange(count),
        names=[f"class {index}" for index in range(count)],
        queries=torch.arange(count),
    )


@pytest.mark.parametrize("brightness", [0, 255])
def test_boxes_contrast_with_their_surroundings(brightness: int) -> None:
    image = Image.fromarray(np.full((320, 360, 3), brightness, np.uint8))
    drawn = np.asarray(draw_detections(image, detections([[40, 50, 100, 90]]))).astype(int)
    assert np.asarray(image).min() == brightness, "the original stays as it is"
    edge = drawn[48:53, 70]  # across the upper edge of the box
    assert np.abs(edge - brightness).max() > 100
    assert (drawn[60:80, 50:90] == brightness).all(), "the inside of the box stays visible"


def test_boxes_beyond_the_image_and_none_at_all() -> None:
    image = Image.new("RGB", (31, 17), "gray")
    outside = detections([[-50, -50, 500, 500], [30, 16, 31, 17], [5, 5, 5, 5], [100, 100, 120, 120], [4, 2, 20, 9]])
    assert draw_detections(image, outside).size == (31, 17)
    assert draw_detections(image, outside, enlarge=True).size == (310, 170)
    assert (np.asarray(draw_detections(image, detections([]))) == np.asarray(image)).all()


def test_small_images_are_enlarged_with_their_boxes_on_request() -> None:
    image = Image.new("RGB", (96, 64), "gray")
    drawn = np.asarray(draw_detections(image, detections([[20, 30, 50, 50]]), enlarge=True)).astype(int)
    assert drawn.shape == (256, 384, 3)
    assert np.abs(drawn[118:123, 140] - 128).max() > 100 and (drawn[140:180, 100:180] == 128).all()


def run(folder: Path, first: int, last: int) -> None:
    (folder / "config.yaml").write_text(f"seed: 3\nname: |\n\n  ```\n{HOSTILE}\n")
    sinks = {"jsonl": JsonLines(), "tensorboard": TensorBoard(), "progress": Progress()}
    reporter = Reporter(sinks=sinks, run_dir=folder, log_every=2)
    with reporter:
        reporter.start(first, total_steps=6)
        for step in range(first + 1, last + 1):
            reporter.step(step, {"loss": float(step), "loss_ce_0": 1.0}, {"lr": 0.5}, images=3, waited=0.0)
        found = detections([[2, 3, 9, 9]])
        reporter.evaluation(
            last, {"AP": 0.25}, [Sample(torch.zeros(3, 20, 30, dtype=torch.uint8), truth=found, found=found)]
        )


def test_records_are_averages_and_a_resumed_run_repeats_none(tmp_path: Path) -> None:
    run(tmp_path, 0, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "group": "tr')  # killed while writing
    run(tmp_path, 2, 6)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["group"] == "train"]
    assert [(record["step"], record["loss"]) for record in train] == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert train[-1]["lr"] == 0.5 and 0 <= train[-1]["data_wait"] <= 1 and train[-1]["eta_minutes"] == 0
    assert [record for record in records if record["group"] == "val"] == [{"step": 6, "group": "val", "AP": 0.25}]
    assert Image.open(tmp_path / "predictions" / "0.jpg").size == (300 + 6 + 300, 200 + 22)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "val/AP"} <= set(tags["scalars"]) and "val/0" in tags["images"]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    [tag] = [tag for tag in tags["tensors"] if "config" in tag]
    shown = markdown_to_safe_html(events.Tensors(tag)[-1].tensor_proto.string_val[0])
    assert HOSTILE not in shown and "&lt;b&gt;[x](javascript:alert(1))" in shown and "<a" not in shown


def test_a_step_whose_gradient_overflows_is_left_out_of_the_averages(tmp_path: Path) -> None:
    """As the first ones with fp16: neither the log nor the state of a checkpoint has NaN."""

    def reporter() -> Reporter:
        return Reporter(sinks={"jsonl": JsonLines()}, run_dir=tmp_path, log_every=4)

    (tmp_path / "config.yaml").touch()
    before, after = reporter(), reporter()
    values = {"grad_norm": [math.inf, math.nan, 1.0, 4.0], "loss": [1.0, 2.0, 3.0, 4.0], "always": [math.nan] * 4}
    for part, steps in ((before, (1, 2)), (after, (3, 4))):
        with part:
            part.start(steps[0] - 1, total_steps=4)
            for step in steps:
                part.step(step, {name: row[step - 1] for name, row in values.items()}, {}, images=1, waited=0.0)
            if part is before:
                state = part.state_dict()
                assert all(map(math.isfinite, state["sums"].values()))
                after.load_state_dict(json.loads(json.dumps(state)))
    (record,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (record["grad_norm"], record["loss"]) == (2.5, 2.5) and "always" not in record
    after.load_state_dict({"sums": {"grad_norm": math.nan, "loss": 2.0}, "count": 2})  # of an earlier version
    assert after.state_dict() == {"sums": {"loss": 2.0}, "count": 2, "left_out": {}}


@pytest.mark.parametrize("sink", [5, "tensorboard", {"dir": "x"}, [], True])
def test_a_sink_that_is_none_is_refused(tmp_path: Path, sink: object) -> None:
    with pytest.raises(UserError, match=r"^logger\.mine: wanted a place to log to .*, got "):
        Reporter(sinks={"jsonl": JsonLines(), "off": None, "mine": sink}, run_dir=tmp_path)  # type: ignore[dict-item]


def test_the_log_is_short_and_begins_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").touch()
    losses = {"loss": 4.5, "loss_ce": 1.0, "loss_ce_0": 1.0, "grad_norm": 2.0}
    with caplog.at_level("INFO"), Reporter(sinks={"progress": Progress()}, run_dir=tmp_path, log_every=5) as reporter:
        reporter.start(10, total_steps=20)
        for step in range(11, 16):
            reporter.step(step, losses, {"lr": 0.5}, images=3, waited=0.0)
            assert caplog.messages[0] == "step 11/20  loss 4.5"
        reporter.evaluation(15, {"AP": 0.25, "AP50": 0.5, "recall": 0.75}, [])
        reporter.evaluation(15, {"AP": 0.125, "AP50": 0.5, "recall": 0.75}, [])
        for step in range(16, 21):
            reporter.step(step, losses, {"lr": 0.5}, images=3, waited=0.0)
    assert re.fullmatch(r"step 15/20  loss 4.5  images/s \S+  00:00 left", caplog.messages[1])
    assert caplog.messages[2] == "step 15/20  evaluated: AP 0.250  AP50 0.500"
    assert re.fullmatch(r"step 20/20  loss 4.5  AP 0.125 \(best 0.250\)  images/s \S+  00:00 left", caplog.messages[4])


def test_a_run_that_goes_on_shows_what_it_has_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"step": 5, "group": "val", "AP": 0.5},
        {"step": 7, "group": "train", "loss": 1.0, "AP": 0.875},
        {"step": 10, "group": "val", "AP": 0.25},
        {"step": 15, "group": "val", "AP": 0.75},  # behind the checkpoint: it is evaluated again
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for sinks in ({"progress": Progress()}, {"jsonl": JsonLines(), "progress": Progress()}):
        caplog.clear()
        with caplog.at_level("INFO"), Reporter(sinks=sinks, run_dir=tmp_path, log_every=5) as reporter:
            reporter.start(10, total_steps=20)
            for step in range(11, 16):
                reporter.step(step, {"loss": 4.5}, {"lr": 0.5}, images=3, waited=0.0)
        line = r"step 15/20  loss 4.5  AP 0.250 \(best 0.500\)  images/s \S+  00:00 left"
        assert re.fullmatch(line, caplog.messages[-1])


def test_a_model_is_described() -> None:
    model = torch.nn.ModuleDict({"stem": torch.nn.Linear(3, 2), "head": torch.nn.Sequential(torch.nn.Linear(2, 3))})
    assert describe_model(model) == "17 parameters, 17 train"
    model["stem"].requires_grad_(False)
    model["head"][0].bias.requires_grad_(False)
    assert describe_model(model) == "17 parameters, 6 train; frozen: stem"
    model.requires_grad_(False)
    assert describe_model(model) == "17 parameters, 0 train; frozen: everything"
    norms = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    norms[1:].requires_grad_(False)
    assert describe_model(norms) == "21 parameters, 9 train; frozen: 2 batch norms"


def sample(found: Detections, *, count: int = 2, size: tuple[int, int] = (320, 360)) -> Sample:
    truth = detections([[10.0 + 50 * index, 10, 50 + 50 * index, 60] for index in range(count)])
    return Sample(torch.zeros(3, *size, dtype=torch.uint8), truth=truth, found=found)


@pytest.mark.parametrize(
    ("scores", "count", "shown"),
    [([0.01, 0.009, 0.001], 2, 2), ([0.01, 0.001], 0, 1), ([0.9, 0.8, 0.7, 0.1], 2, 3), ([], 2, 0)],
)
def test_a_weak_model_shows_its_best_boxes(scores: list[float], count: int, shown: int) -> None:
    boxes = [[20.0, 100 + 30 * index, 60, 120 + 30 * index] for index in range(len(scores))]
    found = replace(detections(boxes), scores=torch.tensor(scores, dtype=torch.float32))
    drawn = draw_sample(sample(found, count=count))
    caption = drawn.height - 320
    right = np.asarray(drawn)[caption:, 360 + 6 :]
    assert drawn.width == 2 * 360 + 6 and right.shape == (320, 360, 3)
    for index, box in enumerate(boxes):
        left, top, *_ = (round(edge) for edge in box)
        assert right[top + 10, left].any() == (index < shown)
    left_half = np.asarray(drawn)[caption:, :360]
    assert left_half[35, 10].any() == (count > 0), "what is annotated is beside it"


def test_pictures_in_tensorboard_are_small(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    noise = Image.effect_noise((1333, 800), 40).convert("RGB")  # which compresses worse than photographs
    sink = TensorBoard()
    sink.start(tmp_path, 0, 1)
    sink.pictures(1, [noise] * 8)
    sink.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert file.stat().st_size < 8 * 2**17
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    picture = Image.open(io.BytesIO(events.Images("val/7")[0].encoded_image_string))
    assert picture.format == "JPEG" and picture.width * picture.height == pytest.approx(300_000, rel=0.01)


def test_the_first_training_batch_is_drawn_once(tmp_path: Path) -> None:
    batch = make_batch([torch.rand(3, 40, 30), torch.rand(3, 30, 50)])
    batch = replace(batch, images=(batch.images * 255).to(torch.uint8))
    targets = [
        make_target(torch.tensor([1, 0]), torch.rand(2, 4) / 2),
        make_target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)),
    ]
    for _ in range(2):
        reporter = Reporter(sinks={}, run_dir=tmp_path, names=["ant", "bee"])
        reporter.batch(batch, targets)
        drawn = (tmp_path / "training_batch.jpg").read_bytes()
        reporter.batch(replace(batch, images=batch.images // 2), targets)
        assert (tmp_path / "training_batch.jpg").read_bytes() == drawn
        batch = replace(batch, images=batch.images // 2)


def test_pictures_that_cannot_be_written_do_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "predictions").write_text("in the way")
    Reporter(sinks={}, run_dir=tmp_path).evaluation(1, {}, [sample(detections([]))])
    assert f"No picture at {tmp_path / 'predictions' / '0.jpg'}" in caplog.text
