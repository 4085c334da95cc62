"""Roboflow's COCO export."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from datasets.formats.roboflow import read_roboflow
from detr.errors import UserError
from detr.types import Category
from tests.helpers.exports import put


def content(*objects: int, heading: str = "none") -> str:
    return json.dumps(
        {
            "images": [{"id": 0, "file_name": "a_jpg.rf.0.jpg", "width": 40, "height": 20}],
            "annotations": [
                {"id": number, "image_id": 0, "category_id": category, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
                for number, category in enumerate(objects)
            ],
            "categories": [
                {"id": 0, "name": "animals", "supercategory": heading},
                {"id": 1, "name": "cat", "supercategory": "animals"},
                {"id": 2, "name": "dog", "supercategory": "animals"},
            ],
        }
    )


def export(root: Path, **parts: str) -> Path:
    for part, text in parts.items():
        put(root, {f"{part}/_annotations.coco.json": text, f"{part}/a_jpg.rf.0.jpg": (40, 20)})
    return root


def test_the_heading_is_no_class(tmp_path: Path) -> None:
    root = export(tmp_path, train=content(2, 1), valid=content(2), test=content())
    found = [read_roboflow(root=root, part=part) for part in ("train", "val", "test")]
    assert all(list(one.categories) == [Category(1, "cat"), Category(2, "dog")] for one in found)
    assert [one.records[0].labels.tolist() for one in found] == [[1, 0], [1], []]
    assert found[1].images == tmp_path / "valid"


def test_a_heading_with_objects_is_a_class(tmp_path: Path) -> None:
    root = export(tmp_path, train=content(0, 1), other=content(1, heading="things"))
    assert [category.name for category in read_roboflow(root=root).categories] == ["animals", "cat", "dog"]
    assert len(read_roboflow(root=root / "other").categories) == 3


def test_both_parts_agree_on_classes_by_their_names(tmp_path: Path) -> None:
    root = export(tmp_path, train=content(1, 2), valid=content(0))
    train, val = read_roboflow(root=root), read_roboflow(root=root, part="val")
    with pytest.raises(
        UserError, match=re.escape("the classes ['animals'] are not among the 2 that the model is trained")
    ):
        val.classified(train.categories)
    renumbered = val.classified([Category(7, "dog"), Category(8, "cat"), Category(9, "animals")])
    assert renumbered.records[0].labels.tolist() == [2]


@pytest.mark.parametrize(
    ("files", "part", "message"),
    [
        ({"train/_annotations.coco.json": "{}"}, "val", "has no part 'val': there is no folder val or valid or validation. Add it, or set data.split=0.2"),
        ({"train/a.jpg": (4, 2)}, "train", "is no COCO export of Roboflow: {tmp}/train/_annotations.coco.json does not exist. Export"),
        ({"data.yaml": "names: [a]", "train/images/a.jpg": (4, 2)}, "train", "looks like YOLO's format: set data=yolo data.root={tmp}."),
        ({"train/_annotations.coco.json": "{"}, "train", "is no valid JSON"),
        ({"train/_annotations.coco.json": "[]"}, "train", "is not in COCO format"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(files: dict[str, Any], part: Any, message: str, tmp_path: Path) -> None:
    put(tmp_path, files)
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        read_roboflow(root=tmp_path, part=part)
    with pytest.raises(UserError, match=r"nowhere is no folder\. Set data\.root"):
        read_roboflow(root=tmp_path / "nowhere")
