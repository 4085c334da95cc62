"""Records, and drawings that stay inside the image."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from detr.reporting import JsonLines, Progress, Reporter, TensorBoard, describe_model, draw_detections
from detr.types import Detections

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
    assert draw_detections(image, outside).size == (310, 170)
    small = np.asarray(draw_detections(image, detections([])).resize(image.size, Image.Resampling.NEAREST))
    assert (small == np.asarray(image)).all()


def test_small_images_are_enlarged_with_their_boxes() -> None:
    image = Image.new("RGB", (96, 64), "gray")
    drawn = np.asarray(draw_detections(image, detections([[20, 30, 50, 50]]))).astype(int)
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
        sample = torch.zeros(3, 20, 30, dtype=torch.uint8)
        reporter.evaluation(last, {"AP": 0.25}, [(sample, detections([[2, 3, 9, 9]]))])


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
    assert Image.open(tmp_path / "predictions" / "0.jpg").size == (300, 200)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "val/AP"} <= set(tags["scalars"]) and "val/0" in tags["images"]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    [tag] = [tag for tag in tags["tensors"] if "config" in tag]
    shown = markdown_to_safe_html(events.Tensors(tag)[-1].tensor_proto.string_val[0])
    assert HOSTILE not in shown and "&lt;b&gt;[x](javascript:alert(1))" in shown and "<a" not in shown


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
    assert re.fullmatch(r"step 20/20  loss 4.5  images/s \S+  AP 0.125 \(best 0.250\)  00:00 left", caplog.messages[4])


def test_a_model_is_described() -> None:
    model = torch.nn.ModuleDict({"stem": torch.nn.Linear(3, 2), "head": torch.nn.Sequential(torch.nn.Linear(2, 3))})
    assert describe_model(model) == "17 parameters, 17 train"
    model["stem"].requires_grad_(False)
    model["head"][0].bias.requires_grad_(False)
    assert describe_model(model) == "17 parameters, 6 train; frozen: stem"
    model.requires_grad_(False)
    assert describe_model(model) == "17 parameters, 0 train; frozen: everything"
