"""The page that evaluate.py and train.py write of an evaluation."""

import json
from pathlib import Path

import pytest

from detr.evaluation import coco_metrics
from tests.helpers.commands import run


@pytest.fixture
def data(shapes_root: Path, tmp_path: Path) -> list[str]:
    """Options for the shapes, whose images have a weather, and detections of them under tmp_path / "found.json"."""
    content = json.loads((shapes_root / "instances_val.json").read_text())
    for number, image in enumerate(content["images"]):
        image["weather"] = ("sun", "<b>rain</b>")[number % 2]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    rows = [
        {**{name: row[name] for name in ("image_id", "category_id", "bbox")}, "score": 0.9 - 0.01 * number}
        for number, row in enumerate(content["annotations"])
    ]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    (tmp_path / "fewer.json").write_text(json.dumps(rows[::2]))
    split = [f"data.val.images={shapes_root / 'val'}", f"data.val.annotations={tmp_path / 'annotations.json'}"]
    return ["data=coco", f"data.root={shapes_root}", *split, "device=cpu"]


def test_report_of_results_against_others(data: list[str], tmp_path: Path) -> None:
    first = run("evaluate.py", f"results={tmp_path / 'fewer.json'}", *data, f"run_dir={tmp_path / 'first'}")
    assert first.code == 0, first.output
    assert not (tmp_path / "first" / "evaluation" / "report.html").exists()
    options = [f"results={tmp_path / 'found.json'}", *data, f"run_dir={tmp_path / 'second'}", "report=true"]
    done = run("evaluate.py", *options, f"report_against={tmp_path / 'first'}")
    assert done.code == 0, done.output
    folder = tmp_path / "second" / "evaluation"
    numbers = json.loads((folder / "report.json").read_text())
    theirs = coco_metrics(tmp_path / "annotations.json", tmp_path / "fewer.json").summary
    assert numbers["metrics"]["AP"]["value"] == pytest.approx(1)
    assert {name: -1 if value is None else value for name, value in numbers["difference"]["other"].items()} == (
        pytest.approx(theirs)
    )
    assert {part["value"] for part in numbers["slices"]} >= {"sun", "<b>rain</b>"}
    page = (folder / "report.html").read_text()
    assert f"Against {tmp_path / 'first'}" in page and "&lt;b&gt;rain" in page and "<b>" not in page

    again = run("evaluate.py", *options)
    assert again.code == 2 and "exists already" in again.message
    (folder / "report.html").write_text("mine")
    again = run("evaluate.py", *options, "overwrite=true")
    assert again.code == 2 and "report.html" in again.message


def test_what_to_compare_with_is_there(data: list[str], tmp_path: Path) -> None:
    options = [f"results={tmp_path / 'found.json'}", *data, f"run_dir={tmp_path / 'run'}"]
    missing = run("evaluate.py", *options, "report=true", f"report_against={tmp_path}")
    assert missing.code == 2 and "evaluation/detections.json does not exist. Wanted report=true and" in missing.message
    needless = run("evaluate.py", *options, f"report_against={tmp_path / 'fewer.json'}")
    assert needless.code == 2 and "there is no report. Wanted report=true" in needless.message


def test_an_evaluation_of_other_images_is_not_compared(data: list[str], shapes_root: Path, tmp_path: Path) -> None:
    first = run("evaluate.py", f"results={tmp_path / 'found.json'}", *data, f"run_dir={tmp_path / 'first'}")
    assert first.code == 0, first.output
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"].pop()
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    rows = [row for row in json.loads((tmp_path / "found.json").read_text()) if row["image_id"] in ids]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    options = [f"results={tmp_path / 'found.json'}", *data, f"run_dir={tmp_path / 'second'}", "report=true"]
    done = run("evaluate.py", *options, f"report_against={tmp_path / 'first'}")
    assert done.code == 2 and "detections.json is of other images than" in done.message, done.output
    assert not (tmp_path / "second" / "evaluation").exists()


def test_report_of_a_training(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, f"run_dir={tmp_path}", "trainer.epochs=1", "report=true"]
    done = run("train.py", *options)
    assert done.code == 0, done.output
    numbers = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["bbox"]
    assert {name: found["value"] for name, found in numbers["metrics"].items()} == pytest.approx(
        {name: None if value < 0 else value for name, value in metrics.items()}
    )
    assert "<h2>What errors cost</h2>" in (tmp_path / "evaluation" / "report.html").read_text()
    limited = run("train.py", *options, "trainer.limit_evaluation_images=3", f"run_dir={tmp_path / 'limited'}")
    assert limited.code == 2 and "wanted trainer.limit_evaluation_images=null" in limited.message
