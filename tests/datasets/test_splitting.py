"""Images held out for validation: classes shared out evenly, near-duplicates on one side, the same for the same seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from datasets import hold_out
from datasets.formats import Annotations, ImageRecord
from datasets.formats.coco import read_coco
from datasets.similarity import similar_images, thumbnails
from detr.errors import UserError
from detr.types import Category
from tests.helpers.commands import TINY_MODEL, figures, run


def names(annotations: Annotations) -> list[str]:
    return [record.file_name for record in annotations.records]


def noise(folder: Path, labels: list[list[int]], seed: int = 0) -> Annotations:
    """Images of noise, which are all different, with an object of each of these labels."""
    generator = np.random.default_rng(seed)
    records = []
    for number, own in enumerate(labels):
        file = f"{number}.png"
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).resize((24, 24)).save(folder / file)
        records.append(ImageRecord.of(file, [[0, 0, 5, 5]] * len(own), own, id=number, size=(24, 24)))
    categories = [Category(number, f"c{number}") for number in range(3)]
    return Annotations(source=folder, images=folder, categories=categories, records=records)


def test_each_class_is_on_both_sides_in_its_share(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    labels = [[0] * int(generator.integers(1, 9)) for _ in range(60)]
    for number in range(0, 20, 2):
        labels[number].append(1)
    for number in range(5):
        labels[3 * number] = [2]
    labels += [[] for _ in range(15)]
    whole = noise(tmp_path, labels)
    for seed in range(5):
        train, val = hold_out(whole, 0.2, seed)
        assert sorted(names(train) + names(val)) == sorted(names(whole))
        assert 14 <= len(val.records) <= 16
        for label in range(3):
            total, held_out = (sum(label in one.labels for one in part.records) for part in (whole, val))
            assert abs(held_out - 0.2 * total) <= 1, (label, seed)
        assert abs(sum(not len(record.labels) for record in val.records) - 3) <= 1


def test_a_seed_decides_whatever_the_order_of_runs(tmp_path: Path) -> None:
    whole = noise(tmp_path, [[number % 3] for number in range(30)])
    held_out = [names(hold_out(whole, 0.3, seed)[1]) for seed in (0, 0, 1, 2)]
    assert held_out[0] == held_out[1] and held_out[0] not in held_out[2:]
    assert held_out[0] == [name for name in names(whole) if name in held_out[0]], "in their order"


def test_the_only_image_of_a_class_is_trained_on(tmp_path: Path) -> None:
    whole = noise(tmp_path, [[0]] * 8 + [[0, 1], [2]])
    for seed in range(5):
        assert {"8.png", "9.png"} <= {*names(hold_out(whole, 0.3, seed)[0])}


def test_copies_stay_on_one_side(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "coco_sample"
    read = read_coco(images=source / "images" / "train", annotations=source / "instances_train.json")
    records = []
    for record in read.records:
        image = Image.open(read.images / record.file_name).convert("RGB")
        width, height = image.size
        kinds = {
            "a": image,
            "b": image.resize((width // 2, height // 2)),
            "c": ImageEnhance.Contrast(image).enhance(0.7),
            "d": image.crop((width // 150, 0, width, height)),
        }
        for kind, changed in kinds.items():
            file = f"{kind}{record.file_name}"
            changed.save(tmp_path / file, quality=30 if kind == "b" else 90)
            records.append(ImageRecord.of(file, [], [], id=len(records), size=changed.size[::-1]))
    groups = similar_images(thumbnails(tmp_path / record.file_name for record in records)).reshape(-1, 4)
    assert (groups == groups[:, :1]).all() and len(np.unique(groups)) == len(groups), "copies, and nothing else"


def test_blood_cells_have_two_photographs_of_one_place(shared: Path) -> None:
    folder = shared / "data" / "bccd"
    whole = read_coco(images=folder / "images" / "train", annotations=folder / "instances_train.json")
    groups = similar_images(thumbnails(whole.images / record.file_name for record in whole.records))
    [same] = [group for group in range(groups.max() + 1) if (groups == group).sum() > 1]
    assert [whole.records[i].file_name for i in np.flatnonzero(groups == same)] == [
        "BloodImage_00037.jpg",
        "BloodImage_00038.jpg",
    ]


def test_images_of_a_standing_camera_are_split_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = noise(tmp_path, [[0]] * 10)
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / "9.png").read_bytes())
    train, val = hold_out(whole, 0.3)
    assert len(train.records) == 7 and len(val.records) == 3
    assert "8 of 10 images are nearly the same, as those of a standing camera" in caplog.text


def test_a_part_must_not_be_empty(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.split=0\.1 leaves all of the 2 images, in 2 groups of similar ones, for"
    ):
        hold_out(noise(tmp_path, [[0], [1]]), 0.1)
    with pytest.raises(UserError, match=r"leaves none of the 0 images, in 0 groups"):
        hold_out(noise(tmp_path, []), 0.1)


@pytest.mark.parametrize("name", ["custom", "csv"])
def test_one_file_trains_and_evaluates_on_the_part_held_out(name: str, shapes_root: Path, tmp_path: Path) -> None:
    annotations = shapes_root / "instances_train.json"
    if name == "csv":
        content = json.loads(annotations.read_text())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [(files[row["image_id"]], row["category_id"], row["bbox"]) for row in content["annotations"]]
        lines = [f"{file},c{label},{x},{y},{x + width},{y + height}" for file, label, (x, y, width, height) in rows]
        annotations = tmp_path / "boxes.csv"
        annotations.write_text("\n".join(["file,class,x1,y1,x2,y2", *lines]))
    data = [f"data={name}", f"data.train.images={shapes_root / 'train'}", f"data.train.annotations={annotations}"]
    quick = ("data.size=48", "data.max_size=64", "data.transforms.sizes=[48]", "data.batch_size=4", "data.workers=0")
    folder = tmp_path / "run"
    done = run(
        "train.py",
        *data,
        "data.split=0.25",
        *quick,
        *TINY_MODEL,
        "device=cpu",
        "trainer.max_steps=2",
        f"run_dir={folder}",
    )
    assert done.code == 0, done.output
    assert "Training: 18 images" in done.output and "Evaluation: 6 images" in done.output, done.output
    trained = figures(folder)
    best = f"checkpoint={folder / 'checkpoints' / 'best.pt'}"
    for number, given in enumerate(([], [*data, "data.split=0.25"], data[1:])):
        again = tmp_path / str(number)
        done = run("evaluate.py", best, *given, "device=cpu", "data.batch_size=4", "data.workers=0", f"run_dir={again}")
        assert done.code == 0 and "Evaluating on 6 images" in done.output, done.output
        assert figures(again) == trained
    done = run("train.py", *data, *quick, *TINY_MODEL, f"run_dir={tmp_path / 'refused'}")
    assert done.code == 2 and "data.val.images" in done.message
