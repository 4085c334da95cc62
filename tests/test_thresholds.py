"""Best thresholds from their evaluation to predictions, and results of others judged as those of a model."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from detr import Detector, UserError
from detr.evaluation import Threshold, Thresholds
from tests.helpers.commands import TINY_MODEL, run, save_untrained

NAMES = ("circle", "square", "triangle")


def threshold(score: float) -> Threshold:
    return Threshold(score=score, f1=0.5, precision=0.5, recall=0.5, objects=30)


def make_checkpoint(path: Path, root: Path, thresholds: Thresholds | None) -> Path:
    """Of an untrained model for the shapes, with the thresholds of an evaluation."""
    overrides = [*TINY_MODEL, f"data.root={root}", "data.size=48", "data.max_size=64"]
    return save_untrained(path, overrides, NAMES, **({} if thresholds is None else {"thresholds": asdict(thresholds)}))


def test_each_class_has_its_threshold(shapes_root: Path, tmp_path: Path) -> None:
    images = sorted((shapes_root / "val").glob("*.jpg"))
    without = Detector.from_checkpoint(make_checkpoint(tmp_path / "without.pt", shapes_root, None))
    everything = without.predict(images, threshold=0.0)
    middle = {name: torch.cat([one.scores[one.labels == n] for one in everything]) for n, name in enumerate(NAMES)}
    least = {name: float(scores.median()) if len(scores) else 1.0 for name, scores in middle.items()}
    overall, *known = NAMES
    thresholds = Thresholds(threshold(least[overall]), {name: threshold(least[name]) for name in known})
    expected = [[(d.name, d.score) for d in one if d.score >= least[d.name]] for one in everything]
    assert 0 < sum(map(len, expected)) < sum(map(len, everything))

    path = make_checkpoint(tmp_path / "with.pt", shapes_root, thresholds)
    found = Detector.from_checkpoint(path).predict(images, threshold="best")
    assert [[(d.name, d.score) for d in one] for one in found] == expected
    (tmp_path / "metrics.json").write_text(json.dumps({"thresholds": thresholds.content()}))
    assert [len(one) for one in without.predict(images, threshold=tmp_path / "metrics.json")] == list(
        map(len, expected)
    )
    with pytest.raises(UserError, match=r"these weights hold none\. Evaluate them with python evaluate\.py"):
        without.predict(images, threshold="best")

    for checkpoint, option in ((path, "best"), (tmp_path / "without.pt", tmp_path / "metrics.json")):
        output = tmp_path / f"found_{checkpoint.stem}"
        options = [f"checkpoint={checkpoint}", f"source={shapes_root / 'val'}", f"output={output}", "device=cpu"]
        done = run("predict.py", *options, f"run_dir={output}", f"threshold={option}")
        assert done.code == 0, done.output
        rows = json.loads((output / "results.json").read_text())
        assert len(rows) == sum(map(len, expected))
        assert all(row["score"] >= least[row["category_name"]] - 1e-6 for row in rows)


def test_thresholds_of_other_classes_are_told(
    shapes_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector = Detector.from_checkpoint(make_checkpoint(tmp_path / "best.pt", shapes_root, None))
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"thresholds": Thresholds(threshold(0.25), {"square": threshold(0.5)}).content()}))
    assert detector.limit(file).tolist() == [0.25, 0.5, 0.25]
    assert "does not know 2 of the model's 3 classes, such as circle. They get that of all together" in caplog.text
    file.write_text(json.dumps({"thresholds": Thresholds(threshold(0.25), {"cube": threshold(0.5)}).content()}))
    with pytest.raises(UserError, match="knows none of the model's classes, such as circle"):
        detector.limit(file)


def test_results_are_judged_as_those_of_a_model(shapes_root: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "best.pt", shapes_root, None)
    data = ["data=coco", f"data.root={shapes_root}", *splits(shapes_root), "device=cpu", "data.workers=0"]
    done = run("evaluate.py", f"checkpoint={checkpoint}", *data, f"run_dir={tmp_path / 'model'}")
    assert done.code == 0, done.output
    results = tmp_path / "model" / "evaluation" / "detections.json"
    again = run("evaluate.py", f"results={results}", *data, f"run_dir={tmp_path / 'results'}")
    assert again.code == 0, again.output
    for name in ("metrics.json", "detections.json"):
        first, second = (tmp_path / folder / "evaluation" / name for folder in ("model", "results"))
        assert first.read_text() == second.read_text()
    table = [line for line in done.output.splitlines() if "AP50" in line]
    assert table and all(line in again.output for line in table)


def splits(root: Path) -> list[str]:
    return [f"data.val.images={root / 'val'}", f"data.val.annotations={root / 'instances_val.json'}"]


def test_a_checkpoint_and_results_are_two_things(tmp_path: Path) -> None:
    both = run("evaluate.py", "checkpoint=a.pt", "results=b.json", "device=cpu", f"run_dir={tmp_path}")
    neither = run("evaluate.py", "device=cpu", f"run_dir={tmp_path}")
    assert (both.code, neither.code) == (2, 2)
    assert "wanted a checkpoint or results, got both" in both.message
    assert "wanted a checkpoint or results, got neither. Set checkpoint=" in neither.message
