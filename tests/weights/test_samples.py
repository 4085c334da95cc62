"""Checkpoints of each format, kept from when it was new: they are read, detect what they did, and their training goes on.

`python -m tests.weights.test_samples` adds that of today's format, when it is a new one. It never replaces one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets.shapes import generate
from detr import Detector
from detr.weights import read_checkpoint
from detr.weights.reading import FORMAT
from tests.helpers.commands import TINIEST_MODEL, run

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = Path(__file__).with_name("samples")
STEPS = 4
OPTIONS = (
    *TINIEST_MODEL,
    "allow_targets=[tests]",
    "data.prepare=null",
    "data.size=48",
    "data.max_size=64",
    "data.transforms.sizes=[48]",
    "data.batch_size=4",
    "data.workers=0",
    "trainer.ema=0.9",
    f"trainer.max_steps={STEPS}",
    f"trainer.limit_epoch_steps={STEPS // 2}",
    "trainer.keep=4",
    "trainer.resume=auto",
    "optimizer.lr=1e-4",
    "scheduler.warmup=0.0",
    "logger.tensorboard=null",
    "log_every=1",
    "device=cpu",
)


def train(data: Path, run_dir: Path) -> list[float]:
    """Go on with a training, or begin it; returns the losses of its steps."""
    generate(REPOSITORY / data, train_images=24, val_images=3, image_size=48, max_objects=3)
    outcome = run("train.py", *OPTIONS, f"data.root={data}", f"run_dir={run_dir}")
    assert outcome.code == 0, outcome.output
    lines = map(json.loads, (REPOSITORY / run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["group"] == "train"]


def detected(checkpoint: Path) -> dict[str, Any]:
    image = Image.fromarray((np.arange(48 * 64 * 3) % 251).astype(np.uint8).reshape(48, 64, 3))
    (found,) = Detector.from_checkpoint(checkpoint, allow_targets=["tests"]).predict(image, threshold=0.0)
    return {"scores": found.scores.tolist(), "boxes": found.boxes.tolist(), "labels": found.labels.tolist()}


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.pt")), ids=lambda path: path.stem)
def test_a_sample_is_read_and_its_training_goes_on(path: Path, tmp_path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    checkpoint = read_checkpoint(path)
    assert checkpoint.training is not None and checkpoint.training["step"] == STEPS // 2
    for name, values in detected(path).items():
        np.testing.assert_allclose(values, expected["detected"][name], atol=1e-3, err_msg=name)
    kept = tmp_path / "run" / "checkpoints" / "last.pt"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(path.read_bytes())
    assert train(tmp_path / "shapes", tmp_path / "run") == pytest.approx(expected["losses"][STEPS // 2 :], rel=1e-3)


def test_todays_format_has_a_sample() -> None:
    assert (SAMPLES / f"{FORMAT}.pt").exists(), "python -m tests.weights.test_samples adds it"


def main() -> None:
    target = SAMPLES / f"{FORMAT}.pt"
    assert not target.exists(), f"{target} is there: samples stay as they are"
    data, run_dir = Path("generated/sample"), Path("runs/sample")  # not a folder of this machine: the file names them
    losses = train(data, run_dir)
    SAMPLES.mkdir(exist_ok=True)
    (REPOSITORY / run_dir / "checkpoints" / "last-2.pt").replace(target)
    target.with_suffix(".json").write_text(json.dumps({"losses": losses, "detected": detected(target)}) + "\n")
    for folder in (data, run_dir):
        shutil.rmtree(REPOSITORY / folder)


if __name__ == "__main__":
    main()
