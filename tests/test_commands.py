"""The commands as a user runs them: train, evaluate, predict; stopping and going on."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from datasets import DetectionDataset
from detr import Detector
from detr.types import Target
from detr.weights import read_checkpoint
from tests.helpers.commands import REPOSITORY, TINY_MODEL, Outcome, checksum, save_untrained
from tests.helpers.commands import run as run_inside
from tests.helpers.exports import write_yolo


def run(*command: str, expect: int = 0) -> str:
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def save_tiny(path: Path, *overrides: str) -> None:
    """A checkpoint as train.py writes it, of an untrained model for two classes."""
    save_untrained(path, overrides, ("a", "b"))


def test_train_evaluate_predict(tiny_options: list[str], shapes_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train.py", *tiny_options, f"run_dir={folder}", "trainer.epochs=1", "log_every=2")
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "evaluation/metrics.json",
        "predictions/0.jpg",
    } <= written
    assert any(name.startswith("tensorboard/") for name in written)
    best = folder / "checkpoints" / "best.pt"

    output = run("evaluate.py", f"checkpoint={best}", f"run_dir={tmp_path / 'evaluated'}", "device=cpu")
    assert "AP50" in output and "triangle" in output
    trained = json.loads((folder / "evaluation" / "metrics.json").read_text())
    evaluated = json.loads((tmp_path / "evaluated" / "evaluation" / "metrics.json").read_text())
    assert evaluated["per_class"].keys() == trained["per_class"].keys()
    # Another batch size pads otherwise, so that scores may differ by rounding.
    assert evaluated["bbox"] == pytest.approx(trained["bbox"], abs=1e-3)

    source, found = shapes_root / "val", tmp_path / "found"
    run(
        "predict.py",
        f"checkpoint={best}",
        f"source={source}/*.jpg",
        f"output={found}",
        "threshold=0",
        f"run_dir={found}",
    )
    results = json.loads((found / "results.json").read_text())
    keys = {"file_name", "image_id", "category_id", "category_name", "bbox", "score"}
    assert len(results) == 7 * 7 and results[0].keys() == keys
    assert Image.open(found / "000003.jpg").size == Image.open(source / "000003.jpg").size
    detections = Detector.from_checkpoint(best).predict(source / "000000.jpg", threshold=0.0)[0]
    first = [row for row in results if row["file_name"] == "000000.jpg"]
    torch.testing.assert_close(detections.scores, torch.tensor([row["score"] for row in first]))
    assert {row["category_id"] for row in results} <= {1, 2, 3}


def test_a_training_on_squares_is_evaluated_and_used_on_squares(
    tiny_options: list[str], shapes_root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    augmented = ("data/mixing=[mosaic,mixup,copy_blend]", "data.batch_sizes=[40,56]", "data.transforms.zoom_out=0.5")
    schedule = (
        "trainer.epochs=4",
        "trainer.evaluate_every=4",
        "trainer.limit_epoch_steps=1",
        "data.plain_before=0.25",
        "data.mixing_until=0.5",
        "data.plain_after=0.75",
    )
    done = run_inside("train.py", *tiny_options, *augmented, *schedule, "data.square=true", f"run_dir={folder}")
    assert done.code == 0, done.output
    phases = "from epoch 0 plain transforms; from epoch 1 mixing and transforms; from epoch 2 transforms; from epoch 3"
    assert f"Augmentation (epochs count from 0): {phases}" in done.output
    best = folder / "checkpoints" / "best.pt"
    assert Detector.from_checkpoint(best).square
    done = run_inside("evaluate.py", f"checkpoint={best}", f"run_dir={tmp_path}", "device=cpu")
    assert "Evaluating on 7 images: 48 x 48 pixels." in done.output, done.output
    trained = json.loads((folder / "evaluation" / "metrics.json").read_text())
    again = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert again["bbox"] == pytest.approx(trained["bbox"], abs=1e-3)


@pytest.mark.parametrize("model", ["small", "detr", "conditional_detr", "deformable_detr"])
def test_predict_draws_attention(model: str, shapes_root: Path, tmp_path: Path) -> None:
    options = [option for option in TINY_MODEL if model != "small" or not option.startswith("model/backbone")]
    data = ["data.size=96", "data.max_size=96"]
    save_tiny(tmp_path / "best.pt", f"model={model}", *options, *data, "model/attention=[se,criss_cross]")
    done = run_inside(
        "predict.py",
        f"checkpoint={tmp_path / 'best.pt'}",
        f"source={shapes_root}/val/000001.jpg",
        f"output={tmp_path}",
        f"run_dir={tmp_path}",
        "threshold=0",
        "device=cpu",
        "attention=true",
        "attention_point=[0.25,0.75]",
    )
    assert done.code == 0, done.output
    drawn = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg")}
    assert drawn == {"000001.jpg", "attention/000001.jpg"}
    blocks = len(Detector.from_checkpoint(tmp_path / "best.pt").attention(shapes_root / "val" / "000001.jpg").blocks)
    shown = 7 if model == "detr" else 8  # of 7 queries, or of 7 queries with 2 classes each
    rows = math.ceil((1 + shown + 1 + blocks) / 3)  # what was found, the best detections, the encoder, the blocks
    assert blocks >= 3 and Image.open(tmp_path / "attention" / "000001.jpg").size == (2008, rows * 728 + 22)


def predict_inside(checkpoint_path: Path, folder: Path, source: str, output: Path, *overrides: str) -> Outcome:
    options = [f"checkpoint={checkpoint_path}", f"source={source}", f"output={output}", "threshold=0", "device=cpu"]
    return run_inside("predict.py", *options, f"run_dir={folder / 'run'}", *overrides)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "there, source, options",
    [
        (["a.jpg", "b.jpg"], "", []),
        (["a.jpg", "b.jpg"], "/*.jpg", []),
        (["b.jpg", "b.png"], "/*.png", []),
        (["a.png", "results.json"], "", []),
        (["a.png", "attention/a.jpg"], "", ["attention=true"]),
    ],
)
def test_predict_leaves_photographs_as_they_are(
    there: list[str], source: str, options: list[str], shapes_root: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "best.pt", *TINY_MODEL, "data.size=48")
    photographs = tmp_path / "photographs"
    for name in there:
        (photographs / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shapes_root / "val" / "000000.jpg", photographs / name)
    before = contents(photographs)
    done = predict_inside(tmp_path / "best.pt", tmp_path, f"{photographs}{source}", photographs, *options)
    assert done.code == 2 and "Choose another folder with output=DIR" in done.message, done.output
    assert contents(photographs) == before, "nothing is replaced, and nothing is put beside"


def test_predict_replaces_what_it_drew_and_nothing_else(shapes_root: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "best.pt", *TINY_MODEL, "data.size=48")
    found = tmp_path / "found"

    def predict(threshold: float, *more: str) -> Outcome:
        options = ["attention=true", f"threshold={threshold}", *more]
        return predict_inside(tmp_path / "best.pt", tmp_path, str(shapes_root / "val"), found, *options)

    drawn = []
    for threshold, overwrite in ((0.0, "false"), (1.0, "true")):
        assert predict(threshold, f"overwrite={overwrite}").code == 0
        drawn.append(contents(found))
        done = predict(0.5)
        assert done.code == 2 and "result of an earlier run" in done.message and "overwrite=true" in done.message
        assert contents(found) == drawn[-1]
    assert drawn[0].keys() == drawn[1].keys() and len(drawn[0]) == 7 + 7 + 4
    assert len(json.loads(drawn[0]["results.json"])) == 7 * 7 and json.loads(drawn[1]["results.json"]) == []
    assert all(drawn[0][name] != drawn[1][name] for name in drawn[0] if name.endswith(".jpg"))
    Image.open(found / "000003.jpg").rotate(90).save(found / "000003.jpg")
    before = contents(found)
    done = predict(0.0, "overwrite=true")
    assert done.code == 2 and f"{found / '000003.jpg'} exists already" in done.message
    assert contents(found) == before


def test_every_picture_has_a_name_of_its_own(shapes_root: Path, tmp_path: Path) -> None:
    """Also where its ending gives a name that another image has, and below folders of the same names."""
    save_tiny(tmp_path / "best.pt", *TINY_MODEL, "data.size=48")
    photograph = Image.open(shapes_root / "val" / "000000.jpg")
    wanted = {
        "a.bmp": "a_bmp.jpg",
        "a.png": "a_png.jpg",
        "a_png.bmp": "a_png-2.jpg",
        "b.png": "b-2.jpg",
        "attention/b.png": "attention/b.jpg",
        "0001.jpg": "0001.jpg",
        "deep/0001.jpg": "deep/0001.jpg",
    }
    for name in wanted:
        (tmp_path / "some" / name).parent.mkdir(parents=True, exist_ok=True)
        photograph.save(tmp_path / "some" / name)
    found = tmp_path / "found"
    done = predict_inside(tmp_path / "best.pt", tmp_path, f"{tmp_path}/some/**/*", found)
    assert done.code == 0, done.output
    images = json.loads((found / "images.json").read_text())["images"]
    assert {row["file_name"]: row["picture"] for row in images} == wanted
    assert {path.relative_to(found).as_posix() for path in found.rglob("*.jpg")} == set(wanted.values())
    assert {row["file_name"] for row in json.loads((found / "results.json").read_text())} == set(wanted)


def test_a_signal_saves_and_the_run_goes_on_exactly(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "data.workers=1", "trainer.epochs=2", "trainer.resume=auto"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run("train.py", *options, f"run_dir={straight}")
    command = [sys.executable, "train.py", *options, f"run_dir={stopped}", "log_every=1"]
    # A group of its own, and the signal to all of it, workers included, as a terminal or a scheduler would send it.
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE, text=True)
    records = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", "--", f"-{process.pid}"], check=True)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    step = read_checkpoint(stopped / "checkpoints" / "last.pt").training["step"]
    assert 2 <= step < 12
    assert f"at step {step}. Go on with trainer.resume=" in (stopped / "train.log").read_text()
    run("train.py", *options, f"run_dir={stopped}")
    assert checksum(stopped / "checkpoints" / "last.pt") == checksum(straight / "checkpoints" / "last.pt")


@pytest.mark.slow
def test_two_trainings_do_not_share_a_folder(tiny_options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "train.py", *tiny_options, f"run_dir={tmp_path}", "trainer.epochs=1000"]
    first = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        while not (tmp_path / "config.yaml").exists():
            assert first.poll() is None
            time.sleep(0.05)
        output = run("train.py", *tiny_options, f"run_dir={tmp_path}", "trainer.epochs=1", expect=2)
        assert f"Another training is at work in {tmp_path}. Give this one a folder of its own" in output
        assert "epochs: 1000" in (tmp_path / "config.yaml").read_text() and first.poll() is None
    finally:
        first.kill()
        first.wait()
    run("train.py", *tiny_options, f"run_dir={tmp_path}", "trainer.max_steps=1", "trainer.resume=auto")


def test_a_few_images_are_trained_and_evaluated_on(tiny_options: list[str], shapes_root: Path, tmp_path: Path) -> None:
    source = shapes_root / "instances_train.json"
    content = json.loads(source.read_text())
    empty, *others = [image["id"] for image in content["images"]]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != empty]
    (tmp_path / "without.json").write_text(json.dumps(content))
    seen: list[int] = []
    in_batch = DetectionDataset.__getitem__

    def noted(dataset: DetectionDataset, key: int | tuple[int, int]) -> tuple[torch.Tensor, Target]:
        seen.append(in_batch(dataset, key)[1].image_id)
        return in_batch(dataset, key)

    options = [*tiny_options, "data.workers=0", "data.batch_size=2", f"data.train.annotations={tmp_path}/without.json"]
    few = ["trainer.overfit_batches=2", "trainer.epochs=2", "data.val.annotations=/not/read.json"]
    with mock.patch.object(DetectionDataset, "__getitem__", noted):
        done = run_inside("train.py", *options, *few, f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.output
    assert set(seen) == set(others[:4]), "the first with objects, in training as in evaluation"
    assert "Training: 4 images" in done.output and "Evaluation: 4 images" in done.output


@pytest.mark.slow
def test_a_compiled_model_trains_as_others_do(tiny_options: list[str], tmp_path: Path) -> None:
    losses = {}
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        options = [f"trainer.compile={compiled}", "trainer.max_steps=8", "log_every=1", f"run_dir={folder}"]
        run("train.py", *tiny_options, "model.encoder.dropout=0.0", *options)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[compiled] = [record["loss"] for record in records if record["group"] == "train"]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)
    # With padding and without, each for the first size, for others of the same height or width, and for any.
    assert 1 <= max(record.get("compilations", 0) for record in records) <= 6


@pytest.mark.slow
def test_eight_photographs_are_learned_by_heart(shared: Path, tmp_path: Path) -> None:
    """Category ids with gaps, a crowd, one image without boxes, the others with 2 to 14 objects."""
    folder = shared / "data" / "coco_sample"
    content = json.loads((folder / "instances_train.json").read_text())
    objects = {image["id"]: 0 for image in content["images"]}
    crowds = set()
    for entry in content["annotations"]:
        objects[entry["image_id"]] += not entry["iscrowd"]
        crowds.update([entry["image_id"]] if entry["iscrowd"] else [])
    suitable = [image for image in content["images"] if 2 <= objects[image["id"]] <= 14]
    chosen = [
        *[image for image in suitable if image["id"] in crowds][:1],
        *[image for image in suitable if image["id"] not in crowds][:6],
        *[image for image in content["images"] if objects[image["id"]] == 0][:1],
    ]
    ids = {image["id"] for image in chosen}
    rows = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    subset = tmp_path / "eight.json"
    subset.write_text(json.dumps({"images": chosen, "annotations": rows, "categories": content["categories"]}))
    data = [f"data.train.images={folder / 'images' / 'train'}", f"data.train.annotations={subset}"]
    run("train.py", "experiment=overfit", *data, f"run_dir={tmp_path / 'run'}", "device=cpu")
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["bbox"]["AP"] >= 0.9


def test_overfitting_takes_data_in_any_format(shapes_root: Path, tmp_path: Path) -> None:
    content = json.loads((shapes_root / "instances_train.json").read_text())
    write_yolo(content, shapes_root / "train", tmp_path / "yolo", "train")
    options = ["data=yolo", f"data.root={tmp_path / 'yolo'}", *TINY_MODEL, "data.size=48", "data.batch_size=4"]
    run("train.py", "experiment=overfit", *options, "trainer.max_steps=1", f"run_dir={tmp_path / 'run'}", "device=cpu")
    assert (tmp_path / "run" / "evaluation" / "metrics.json").exists()


@pytest.mark.slow
def test_a_detector_is_finetuned_on_other_classes(shapes_root: Path, tmp_path: Path) -> None:
    """Twice the recipe for images of one's own: from a backbone, then from that detector, with one class renamed."""

    def finetune(name: str, rename: str, *options: str) -> tuple[Path, str]:
        data = [f"data.{split}.images={shapes_root / split}" for split in ("train", "val")]
        for split in ("train", "val"):
            content = json.loads((shapes_root / f"instances_{split}.json").read_text())
            content["categories"][0]["name"] = rename
            file = tmp_path / f"{name}_{split}.json"
            file.write_text(json.dumps(content))
            data.append(f"data.{split}.annotations={file}")
        quick = ["data.size=64", "data.workers=0", "device=cpu", "trainer.max_steps=13", f"run_dir={tmp_path / name}"]
        log = run("train.py", "experiment=finetune", *data, *quick, *options)
        return tmp_path / name / "checkpoints" / "best.pt", log

    best, log = finetune("first", "thing", "model.backbone.weights=null")
    assert re.findall(r"step (\d+)/13  evaluated", log) == ["6", "12", "13"], "24 images, four a step: after each epoch"
    _, log = finetune("second", "other", f"weights={best}")
    assert "mapped 4: rows of 2 of 3 classes" in log
    table = (tmp_path / "second" / "weights.txt").read_text()
    mapped = re.findall(r"^mapped   (\S+): rows of 2 of 3 classes", table, re.M)
    assert {name.rpartition(".")[0] for name in mapped} == {"heads.0.class_head", "proposal_head.class_head"}
    assert not re.search(r"^(fresh|skipped) ", table, re.M)


@pytest.mark.slow
def test_quickstart_learns_shapes(tmp_path: Path) -> None:
    run("train.py", "experiment=quickstart", f"data.root={tmp_path / 'shapes'}", f"run_dir={tmp_path / 'run'}")
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["bbox"]["AP"] >= 0.5 and metrics["bbox"]["AP50"] >= 0.75
