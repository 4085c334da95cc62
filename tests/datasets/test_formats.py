"""A format of one's own is one file and one YAML: trained with and evaluated through the commands."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import DetectionDataset
from datasets.formats import Annotations, ImageRecord
from datasets.formats.base import MOST_CATEGORIES
from detr.config import build, compose
from detr.errors import UserError
from detr.evaluation import evaluate_coco
from detr.masks import Masks
from detr.types import Category
from tests.helpers import commands
from tests.helpers.commands import TINY_MODEL, figures
from tests.helpers.data import coco_set, shapes_set

READER = """
from pathlib import Path

import numpy as np

from datasets.formats import Annotations, ImageRecord
from detr.errors import UserError
from detr.types import Category


def read_lines(*, folder: str) -> Annotations:
    source = Path(folder) / "objects.txt"
    if not source.is_file():
        raise UserError(f"{source} does not exist. Set data.train.folder and data.val.folder.")
    names, *lines = source.read_text().splitlines()
    categories = [Category(id=number, name=name) for number, name in enumerate(names.split(), start=1)]
    records = []
    for number, line in enumerate(lines):
        file_name, width, height, *values = line.split()
        rows = np.array(values, dtype=np.float64).reshape(-1, 5)
        records.append(
            ImageRecord(
                id=number,
                file_name=file_name,
                size=(int(height), int(width)),
                boxes=rows[:, 1:],
                labels=rows[:, 0].astype(np.int64),
                crowds=np.zeros(len(rows), dtype=bool),
                areas=rows[:, 3] * rows[:, 4],
            )
        )
    return Annotations(source=source, images=Path(folder), categories=categories, records=records)
"""
CONFIG = """
root: null
train:
  _target_: line_format.read_lines
  folder: ???
val:
  _target_: line_format.read_lines
  folder: ???
size: 48
max_size: 64
transforms: {sizes: [40, 48], crop: false}
"""


@pytest.fixture
def lines(shapes_root: Path, tmp_path: Path) -> Path:
    """The generated shapes in a text format, its reader, and its YAML."""
    for split in ("train", "val"):
        content = json.loads((shapes_root / f"instances_{split}.json").read_text())
        rows = [" ".join(category["name"] for category in content["categories"])]
        for image in content["images"]:
            objects = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
            values = [value for entry in objects for value in (entry["category_id"] - 1, *entry["bbox"])]
            rows.append(" ".join(map(str, [image["file_name"], image["width"], image["height"], *values])))
        shutil.copytree(shapes_root / split, tmp_path / split)
        (tmp_path / split / "objects.txt").write_text("\n".join(rows))
    (tmp_path / "line_format.py").write_text(READER)
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "configs" / "data" / "lines.yaml").write_text(CONFIG)
    return tmp_path


def run(*command: str, expect: int = 0) -> str:
    outcome = commands.run(*command)
    assert outcome.code == expect, outcome.output
    return outcome.output


def test_a_format_of_ones_own_trains_and_evaluates(
    lines: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(lines)
    own = ["--config-dir", str(lines / "configs"), "data=lines", "allow_targets=[line_format]", "device=cpu"]
    splits = [f"data.train.folder={lines / 'train'}", f"data.val.folder={lines / 'val'}"]
    batches = ["data.batch_size=4", "data.workers=0"]
    run("train.py", *own, *splits, *batches, *TINY_MODEL, "trainer.max_steps=2", f"run_dir={lines / 'run'}")
    checkpoint = f"checkpoint={lines / 'run' / 'checkpoints' / 'best.pt'}"

    def metrics(name: str, *options: str) -> dict[str, object]:
        run("evaluate.py", *options, checkpoint, *batches, f"run_dir={lines / name}")
        return figures(lines / name)

    found = metrics("again", "device=cpu", "allow_targets=[line_format]")
    assert found == figures(lines / "run")
    assert metrics("given", *own, splits[1]) == found, "what training would need may be missing"
    coco = [f"data.val.images={shapes_root / 'val'}", f"data.val.annotations={shapes_root / 'instances_val.json'}"]
    assert metrics("coco", "data=custom", "device=cpu", *coco) == found, "another format may be evaluated on"
    output = run("evaluate.py", checkpoint, f"run_dir={lines / 'refused'}", "device=cpu", expect=2)
    assert "data.val._target_: 'line_format.read_lines' is refused" in output and "allow_targets" in output
    output = run("train.py", *own, *TINY_MODEL, *splits, "data.val.folder=none", f"run_dir={lines}", expect=2)
    assert "none/objects.txt does not exist. Set data.train.folder" in output and "Traceback" not in output


def test_the_same_objects_in_two_formats_are_the_same_data(
    lines: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(lines)
    node = {"_target_": "line_format.read_lines", "folder": str(lines / "val")}
    ours = DetectionDataset(build(node, path="data.val", allow=("line_format",)))
    coco = shapes_set(shapes_root, "val")
    assert ours.categories == coco.categories and len(ours) == len(coco) == 7
    for (image, target), (same, same_target) in zip(map(ours.__getitem__, range(7)), coco, strict=False):
        assert torch.equal(image, same) and target.original_size == same_target.original_size
        assert torch.equal(target.boxes, same_target.boxes) and torch.equal(target.labels, same_target.labels)


def test_records_of_any_format_are_checked(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lines)
    node = {"_target_": "line_format.read_lines", "folder": str(lines / "val")}

    def read(line: str) -> DetectionDataset:
        (lines / "val" / "objects.txt").write_text(f"circle square triangle\n{line}")
        return DetectionDataset(build(node, path="data.val", allow=("line_format",)))

    with pytest.raises(UserError, match=r"objects\.txt: not one of the 1 boxes is usable \(1 of zero size\)"):
        read("000001.jpg 48 48 0 3 3 0 5")
    with pytest.raises(UserError, match="1 of 1 image files are missing"):
        read("nothing.jpg 48 48")
    with pytest.raises(UserError, match=r"image 0 has the file name '\.\./train/000001\.jpg', which leads out"):
        read("../train/000001.jpg 48 48")
    assert len(read("000001.jpg 48 48 0 3 3 5 5 1 60 3 5 5").ground_truth()["annotations"]) == 1


@dataclass(frozen=True, kw_only=True)
class MarkedRecord(ImageRecord):
    """A record with one more thing to know of each object, as a mask head would want."""

    crops: np.ndarray


def record(image: int = 0, count: int = 3) -> MarkedRecord:
    return MarkedRecord(
        id=image,
        file_name=f"{image}.jpg",
        size=(11, 13),
        boxes=np.arange(count * 4, dtype=np.float64).reshape(-1, 4),
        labels=np.arange(count) % 3,
        crowds=np.arange(count) == 1,
        areas=np.arange(count, dtype=np.float64),
        crops=np.arange(count * 11 * 13).reshape(-1, 11, 13),
    )


def test_every_array_of_a_record_travels_with_its_objects() -> None:
    whole, chosen = record(count=5), np.array([True, False, True, True, False])
    some = whole.select(chosen)
    assert (some.id, some.file_name, some.size) == (whole.id, whole.file_name, whole.size)
    for name in ("boxes", "labels", "crowds", "areas", "crops"):
        assert np.array_equal(getattr(some, name), [getattr(whole, name)[index] for index in (0, 2, 3)]), name


CLASSES = [Category(7, "a"), Category(9, "b"), Category(90, "c")]


def annotated(*records: ImageRecord, categories: Sequence[Category] = CLASSES) -> Annotations:
    return Annotations(source=Path("boxes.txt"), images=Path("images"), categories=categories, records=records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 5}, "2 images have the id 5. Ids must be unique."),
        (
            {"labels": np.array([0, 3, 1])},
            "image 7 has the label 3, wanted the rank of one of the 3 categories, 0 to 2.",
        ),
        ({"labels": np.array([0, 2, -1])}, "image 7 has the label -1, wanted the rank"),
        ({"labels": np.array([0, 1])}, "image 7 has 3 boxes, 2 labels, 3 crowds, 3 areas, 3 crops, and boxes of shape"),
        ({"crops": np.zeros((4, 11, 13))}, "3 areas, 4 crops, and boxes of shape (3, 4). Wanted one of each"),
        ({"boxes": np.zeros((3, 5))}, "boxes of shape (3, 5). Wanted one of each for each of the n objects"),
        ({"labels": np.array([0.0, 1, 2])}, "labels are float64, wanted int64, in images without objects too."),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    sound = [record(5), record(6, count=0), record(7)]
    assert annotated(*sound).records == tuple(sound) and not annotated().records
    with pytest.raises(UserError, match=f"^boxes.txt: .*{re.escape(message)}"):
        annotated(*sound[:2], replace(sound[2], **change))


def test_some_images_without_masks_are_refused() -> None:
    masks = Masks.encode(torch.ones(3, 11, 13, dtype=torch.bool))
    empty = replace(record(6, count=0), masks=masks.select([]))
    annotated(replace(record(5), masks=masks), empty)
    for mixed in ([replace(record(5), masks=masks), record(6, count=0)], [record(6, count=0), empty]):
        numbered = [replace(one, id=number) for number, one in enumerate(mixed)]
        without = [one.id for one in numbered if one.masks is None]
        with pytest.raises(UserError, match=f"1 of 2 images, such as {without[0]}, have no masks. Wanted them in all"):
            annotated(*numbered)


@pytest.mark.parametrize("ids", [[9, 7, 90], [7, 9, 9], []])
def test_categories_out_of_order_are_refused(ids: list[int]) -> None:
    message = re.escape(f"boxes.txt: the categories have the ids {ids}, wanted at least one, each once and sorted.")
    with pytest.raises(UserError, match=message):
        annotated(categories=[Category(number, "name") for number in ids])


def test_an_option_that_a_reader_does_not_have_is_named() -> None:
    with pytest.raises(
        UserError, match=r"data\.train\.folder is not an option of .*read_coco, whose options are images"
    ):
        compose(["data=custom", *FILLED_IN, "+data.train.folder=x"])
    with pytest.raises(UserError, match=r"data\.train\.images: wanted .*, got 3"):
        compose(["data=custom", *FILLED_IN, "data.train.images=3"])


FILLED_IN = [f"data.{split}.{name}=x" for split in ("train", "val") for name in ("images", "annotations")]


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_the_ground_truth_gives_the_figures_of_the_file(shared: Path, tmp_path: Path, backend: str) -> None:
    """Crowds, missing areas, whole numbers, boxes beyond the image; in any order."""
    folder = shared / "data" / "coco_sample"
    content = json.loads((folder / "instances_train.json").read_text())
    generator = torch.Generator().manual_seed(3)
    for entry in content["annotations"]:
        change = int(torch.randint(8, (), generator=generator))
        if change == 0:
            del entry["area"]
        elif change == 1:
            entry["bbox"] = [int(value) + 1 for value in entry["bbox"]]
        elif change == 2:
            entry["bbox"][0] -= 7.25
        elif change == 3:
            entry["iscrowd"] = 1
    order = torch.randperm(len(content["annotations"]), generator=generator)
    content["annotations"] = [content["annotations"][index] for index in order]
    (tmp_path / "changed.json").write_text(json.dumps(content))
    results = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": [value + shift for value, shift in zip(entry["bbox"], moved, strict=True)],
            "score": score,
        }
        for entry in content["annotations"]
        for *moved, score in (torch.rand(2, 5, generator=generator) * 4).tolist()
    ]
    dataset = coco_set(folder / "images" / "train", tmp_path / "changed.json")
    found = evaluate_coco(dataset.ground_truth(), results, backend=backend)
    assert found == evaluate_coco(tmp_path / "changed.json", results, backend=backend) and 0.1 < found["AP"] < 0.99


def test_too_many_categories_are_refused(tmp_path: Path) -> None:
    categories = [Category(id=number, name=str(number)) for number in range(MOST_CATEGORIES + 1)]
    Annotations(source=tmp_path, images=tmp_path, categories=categories[1:], records=[])
    with pytest.raises(UserError, match=r"there are 20001 categories, wanted at most 20000, .*Join classes"):
        Annotations(source=tmp_path, images=tmp_path, categories=categories, records=[])
