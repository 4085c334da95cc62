"""YOLO's format: layouts, lines, and what is wrong in them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from datasets import DetectionDataset, before_training
from datasets.formats import Annotations
from datasets.formats.yolo import read_yolo
from detr.errors import UserError
from tests.helpers.exports import put

NAMES = "names: [cat, dog]\n"
SOUND: dict[str, Any] = {
    "data.yaml": f"train: images/train\nval: images/val\n{NAMES}",
    "images/train/a b.jpg": (40, 20),
    "images/train/ä.png": (40, 20),
    "images/val/c.jpg": (40, 20),
    "labels/train/a b.txt": "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.5 0.5\n",
    "labels/val/c.txt": "0 0.5 0.5 1 1\n",
}


def read(root: Path, changes: dict[str, Any] | None = None, part: Any = "train", given: str = ".") -> Annotations:
    files = {**SOUND, **(changes or {})}
    put(root, {name: content for name, content in files.items() if content is not None})
    return read_yolo(root=root / given, part=part)


def in_words(annotations: Annotations) -> list[tuple[str, list[str], list[list[float]]]]:
    names = [category.name for category in annotations.categories]
    return [
        (record.file_name, [names[label] for label in record.labels], record.boxes.tolist())
        for record in annotations.records
    ]


TRAINED = [("a b.jpg", ["dog", "cat"], [[15, 5, 10, 10], [0, 0, 20, 10]]), ("ä.png", [], [])]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.yaml": f"\ufefftrain: images/train\r\nval: images/val\r\n{NAMES}"},
        {"data.yaml": f"path: .\ntrain: images/train/\n{NAMES}"},
        {"data.yaml": f"path: /not/here\ntrain: images\\train\n{NAMES}"},
        {"data.yaml": f"path: C:\\Users\\me\\set\ntrain: images/train\n{NAMES}"},
        {"data.yaml": f"train: C:\\Users\\me\\set\\images\\train\n{NAMES}"},
        {"data.yaml": f"train: /home/me/set/images/train\n{NAMES}"},
        {"data.yaml": f"train: ../images/train\n{NAMES}"},
        {"data.yaml": f"train: [images/train]\n{NAMES}"},
        {"data.yaml": f"train: list.txt\n{NAMES}", "list.txt": "./images/train/a b.jpg\r\nimages/train/ä.png\r\n"},
        {"data.yaml": "train: images/train\nnames:\n  1: dog\n  0: cat\n"},
        {"data.yaml": "train: images/train\nnames: {3: dog, 2: cat}\n", "labels/train/a b.txt": "3 0.5 0.5 0.25 0.5\n2 0.25 0.25 0.5 0.5"},
        {"data.yaml": NAMES},
        {"data.yaml": None, "classes.txt": "cat\r\ndog\r\n"},
        {"data.yaml": None, "labels/classes.txt": "cat\ndog\n"},
        {"labels/train/a b.txt": "\ufeff1 0.5 0.5 0.25 0.5\r\n\r\n0\t0.25 0.25 0.5 0.5"},
        {"labels/train/a b.txt": "1.0 0.5 0.5 0.25 0.5\n0 0 0 0.5 0 0.5 0.5 0 0.5\n"},
        {"data.yaml": f"train: images/train\nkpt_shape: [2, 3]\n{NAMES}",
         "labels/train/a b.txt": "1 0.5 0.5 0.25 0.5 0 0 2 1 1 2\n0 0.25 0.25 0.5 0.5 0 0 0 0 0 0"},
    ],
)  # fmt: skip
def test_the_same_data_are_read_from_all_layouts(changes: dict[str, Any], tmp_path: Path) -> None:
    found = read(tmp_path, changes)
    assert in_words(found) == TRAINED and found.images == tmp_path / "images" / "train"
    assert [(category.id, category.name) for category in found.categories] == [(1, "cat"), (2, "dog")]


@pytest.mark.parametrize("layout", ["train/images", "train"])
def test_labels_are_beside_the_folder_or_the_images(layout: str, tmp_path: Path) -> None:
    labels = layout.replace("images", "labels")
    text = f"train: ../train/images\nval: ../valid/images\n{NAMES}" if layout != "train" else f"train: train\n{NAMES}"
    put(
        tmp_path,
        {
            "data.yaml": text,
            f"{layout}/a.jpg": (40, 20),
            f"{labels}/a.txt": "0 0.5 0.5 0.5 0.5",
            f"{layout}/deep/b.jpg": (4, 2),
        },
    )
    assert in_words(read_yolo(root=tmp_path)) == [("a.jpg", ["cat"], [[10, 5, 20, 10]]), ("deep/b.jpg", [], [])]


def test_parts_and_their_names(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "data.yaml": f"train: images/train\nvalid: images/val\n{NAMES}",
            "images/test/t.jpg": (4, 2),
            "labels/test/t.txt": "",
        },
    )
    assert [name for name, *_ in in_words(read(tmp_path, {"data.yaml": None}, "val"))] == ["c.jpg"]
    assert [name for name, *_ in in_words(read_yolo(root=tmp_path / "data.yaml", part="test"))] == ["t.jpg"]


def test_boxes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(tmp_path / "images" / "train" / "a b.jpg", exif=exif)
    found = read(tmp_path, {"images/train/a b.jpg": None})
    assert found.records[0].size == (20, 40) and in_words(found) == TRAINED


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"labels/train/a b.txt": "0 0.5 0.5 0.5 0.5\n0 0.5 x 0.1 0.1\n"}, "labels/train/a b.txt, line 2: got '0 0.5 x 0.1 0.1', wanted five numbers, class center_x"),
    ({"labels/train/a b.txt": "0 0.5 0.5 0.5\n"}, "line 1: got '0 0.5 0.5 0.5', wanted five numbers"),
    ({"labels/train/a b.txt": "0 0.5 0.5 0.5 0.5 0.9\n"}, "line 1: got '0 0.5 0.5 0.5 0.5 0.9', wanted five"),
    ({"labels/train/a b.txt": "0,0.5,0.5,0.5,0.5\n"}, "line 1: got '0,0.5,0.5,0.5,0.5', wanted five numbers"),
    ({"labels/train/a b.txt": "0 0.5 0.5 1.2 0.5\n"}, "line 1: 1.2 is outside of [0, 1]. Wanted places and sizes relative to the image"),
    ({"labels/train/a b.txt": "\n0 0.5 0.5 -0.1 0.5\n"}, "line 2: -0.1 is outside of [0, 1]"),
    ({"labels/train/a b.txt": "0 0.5 nan 0.1 0.5\n"}, "line 1: nan is outside of [0, 1]"),
    ({"labels/train/a b.txt": "2 0.5 0.5 0.5 0.5\n"}, "line 1: the class 2 is not among the 2 of 'names', which have the numbers [0, 1]"),
    ({"labels/train/a b.txt": "0.5 0.5 0.5 0.5 0.5\n"}, "line 1: the class 0.5 is not among the 2"),
    ({"labels/train/a b.txt": b"0 0.5 0.5 0.5 0.5\n\xe4"}, "line 2: this is no text in UTF-8, because of the byte 0xe4"),
    ({"labels/train/a b.txt": None}, "not one of 2 images has a label file. They were looked for in"),
    ({"data.yaml": "train: images/train\n"}, "data.yaml: 'names' is None, wanted the names of the classes"),
    ({"data.yaml": "train: images/train\nnames: [a, a]\n"}, "2 classes have the name 'a'"),
    ({"data.yaml": "train: images/train\nnames: {cat: 0}\n"}, "'names' has the keys ['cat'], wanted the numbers"),
    ({"data.yaml": "names: [a\ntrain: b"}, "data.yaml, line 2: this is no valid YAML"),
    ({"data.yaml": f"train: D:\\elsewhere\n{NAMES}"}, "data.yaml: 'train' names 'D:\\\\elsewhere', which is not in {tmp}. Write where the images are"),
    ({"data.yaml": f"train: https://x.org/a.zip\n{NAMES}"}, "'train' names 'https://x.org/a.zip', which is not in"),
    ({"data.yaml": f"train: list.txt\n{NAMES}", "list.txt": "images/train/a b.jpg\nimages/train/none.jpg\n"}, "list.txt, line 2: the image 'images/train/none.jpg' does not exist"),
    ({"data.yaml": f"train: data.yaml\n{NAMES}"}, "data.yaml is no folder of images and no .txt file"),
    ({"data.yaml": f"train: labels/train\n{NAMES}"}, "labels/train: there are no images of the part 'train'. Put them there"),
    ({"data.yaml": None}, "is no data set of YOLO: there is neither data.yaml nor classes.txt. Set data.root"),
    ({"images/train/ä.png": b"no image"}, "ä.png cannot be read: it is empty or no image. Replace it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_place(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    labels = {"labels/val/c.txt": None} if changes == {"data.yaml": None} else {}
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        read(tmp_path, {**changes, **labels})


def test_a_part_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    changes = {"data.yaml": f"train: images/train\n{NAMES}", "images/val/c.jpg": None, "labels/val/c.txt": None}
    with pytest.raises(UserError, match=r"data\.yaml has no part 'val': there is no 'val:' in it.*data\.split=0\.2"):
        read(tmp_path, changes, "val")
    with pytest.raises(UserError, match=r"does not exist. Set data\.root to the folder that holds data\.yaml"):
        read_yolo(root=tmp_path / "nowhere")


def test_images_of_both_parts_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lists = {"train.txt": "images/train/a b.jpg\nimages/train/ä.png", "val.txt": "images/train/a b.jpg\n"}
    changes = {"data.yaml": f"train: train.txt\nval: val.txt\n{NAMES}", **lists}
    before_training(*(DetectionDataset(read(tmp_path, changes, part)) for part in ("train", "val")))
    assert "val.txt: 1 of 1 images are trained on too, such as 'a b.jpg'" in caplog.text


def test_labels_without_images_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, {"labels/train/lost.txt": "0 0.5 0.5 0.5 0.5", "labels/train/classes.txt": "cat\ndog"})
    assert "1 label files have no image, such as" in caplog.text and "lost.txt" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/_annotations.coco.json": "{}", "train/a.jpg": (4, 2)}, "looks like Roboflow's COCO export: set data=roboflow data.root={tmp}."),
        ({"Annotations/a.xml": "<annotation></annotation>"}, "looks like Pascal VOC's format: set data=voc data.root={tmp}."),
        ({"a.json": '{"info": {}, "images": [], "annotations": []}'}, "set data=custom data.train.images=DIR data.train.annotations={tmp}/a.json."),
        ({"boxes.csv": "filename;class;x1;y1;x2;y2\n"}, "set data=csv data.train.images=DIR data.train.annotations={tmp}/boxes.csv."),
        ({"annotations.xml": "<?xml version='1.0'?>\n<annotations>"}, "set data=cvat data.train.images=DIR data.train.annotations={tmp}/annotations.xml."),
    ],
)  # fmt: skip
def test_another_format_is_recognized(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    put(tmp_path, files)
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        read_yolo(root=tmp_path)


def masked(root: Path, text: str) -> Annotations:
    put(root, {**SOUND, "labels/train/a b.txt": text})
    return read_yolo(root=root, masks=True)


def test_polygons_are_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Filled as pycocotools fills polygons in pixels; boxes alone, and what has no pixel, are left out."""
    relative = [[0.1, 0.2, 0.6, 0.25, 0.9, 0.9, 0.3, 0.7], [0.0, 0.0, 1.0, 0.0, 1.0, 1.0]]
    rows = [f"{label} {' '.join(map(str, points))}" for label, points in enumerate(relative)]
    text = "\n".join([rows[0], "1 0.5 0.5 0.25 0.5", rows[1], "0 0.5 0.5 0.5 0.5 0.5 0.5"])
    first, second = masked(tmp_path, text).records
    assert first.masks is not None and second.masks is not None and len(second.masks) == 0
    assert first.size == (20, 40) == first.masks.size and first.labels.tolist() == [0, 1]
    pixels = [[value * side for value, side in zip(points, [40, 20] * 4, strict=False)] for points in relative]
    wanted = [pycocotools.mask.decode(pycocotools.mask.frPyObjects([points], 20, 40))[..., 0] for points in pixels]
    assert np.array_equal(first.masks.decode().numpy(), np.stack(wanted).astype(bool))
    assert first.areas.tolist() == [mask.sum() for mask in wanted]
    assert "2 objects have no polygon with pixels in the image, such as" in caplog.text
    assert "a b.txt, line 2" in caplog.text
    boxes = read_yolo(root=tmp_path).records[0]
    assert boxes.masks is None and len(boxes.boxes) == 4
    assert np.array_equal(first.boxes, boxes.boxes[[0, 2]]), "boxes do not depend on the masks"


def test_boxes_alone_are_no_masks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not one of its 2 objects has a mask, which model\.masks"):
        masked(tmp_path, SOUND["labels/train/a b.txt"])
    assert masked(tmp_path, "").records[0].masks is not None, "images without objects are no mistake"
