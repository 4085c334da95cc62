"""Pascal VOC's format: layouts, and what is wrong in the files."""

import logging
import re
from pathlib import Path
from typing import Any

import hotcoco
import pytest

from datasets.formats import Annotations
from datasets.formats.voc import read_voc
from detr.errors import UserError
from tests.helpers.exports import put


def xml(*objects: str, name: str = "a.jpg", size: str = "<size><width>40</width><height>20</height></size>") -> str:
    return "\n".join(["<annotation>", f"<filename>{name}</filename>{size}", *objects, "</annotation>"])


def item(name: str, *edges: object, more: str = "") -> str:
    box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


HARD = "<difficult>1</difficult>"
A = xml(item("dog", 1, 2, 11, 8), item("cat", 0, 0, 40, 20, more=HARD))
B = xml(name="b ä.jpg")
C = xml(item("dog", 3.5, 2, 11, 8.25), name="c.jpg")
LAYOUTS: dict[str, dict[str, Any]] = {
    "as published": {
        "Annotations/a.xml": A, "Annotations/b ä.xml": B, "Annotations/c.xml": C,
        "JPEGImages/a.jpg": (40, 20), "JPEGImages/b ä.jpg": (40, 20), "JPEGImages/c.jpg": (40, 20),
        "ImageSets/Main/train.txt": "a\r\nb ä\r\n", "ImageSets/Main/val.txt": "\ufeffc\n",
    },
    "folders": {
        "train/a.xml": A, "train/a.jpg": (40, 20), "train/b ä.xml": B, "train/b ä.jpg": (40, 20),
        "valid/c.xml": C, "valid/c.jpg": (40, 20),
    },
    "folders of folders": {
        "train/annotations/a.xml": A, "train/images/a.jpg": (40, 20),
        "train/annotations/b ä.xml": B, "train/images/b ä.jpg": (40, 20),
        "val/annotations/c.xml": C, "val/images/c.jpg": (40, 20),
    },
}  # fmt: skip


def in_words(found: Annotations) -> list[tuple[str, list[str], list[list[float]], list[bool]]]:
    names = [category.name for category in found.categories]
    return [
        (one.file_name, [names[label] for label in one.labels], one.boxes.tolist(), one.crowds.tolist())
        for one in found.records
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_all_layouts(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    put(tmp_path, LAYOUTS[layout])
    train, val = read_voc(root=tmp_path), read_voc(root=tmp_path, part="val")
    assert in_words(train) == [
        ("a.jpg", ["dog", "cat"], [[1, 2, 10, 6], [0, 0, 40, 20]], [False, True]),
        ("b ä.jpg", [], [], []),
    ]
    assert in_words(val) == [("c.jpg", ["dog"], [[3.5, 2, 7.5, 6.25]], [False])]
    assert [category.name for category in train.categories] == ["cat", "dog"]
    assert [(category.id, category.name) for category in val.classified(train.categories).categories] == [
        (1, "cat"),
        (2, "dog"),
    ]
    assert (
        "1 objects are difficult: training leaves them out, and evaluation ignores detections in them." in caplog.text
    )
    with pytest.raises(UserError, match="has no part 'test'"):
        read_voc(root=tmp_path, part="test")


def test_without_parts_all_is_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(
        tmp_path,
        {
            "a.xml": A,
            "a.png": (40, 20),
            "c.xml": xml(item("dog", 1, 2, 3, 4), name="c.jpg", size=""),
            "c.bmp": (30, 10),
            "lost.jpg": (4, 2),
        },
    )
    found = read_voc(root=tmp_path)
    assert [(record.file_name, record.size) for record in found.records] == [("a.png", (20, 40)), ("c.bmp", (10, 30))]
    assert "1 images have no XML file, such as 'lost.jpg', and are left out" in caplog.text
    with pytest.raises(UserError, match=r"has no part 'val': .*data\.split=0\.2"):
        read_voc(root=tmp_path, part="val")


def test_pixels_counted_from_1_as_another_library_reads_them(tmp_path: Path) -> None:
    put(tmp_path, {"Annotations/a.xml": A, "JPEGImages/a.jpg": (40, 20)})
    [record] = read_voc(root=tmp_path, first_pixel=1).records
    other = hotcoco.COCO.from_voc(str(tmp_path)).dataset["annotations"]
    assert record.boxes.tolist() == [row["bbox"] for row in other] == [[0, 1, 11, 7], [-1, -1, 41, 21]]
    assert record.crowds.tolist() == [bool(row["iscrowd"]) for row in other]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.xml": "<annotation>\n<object>\n</annotation>"}, "a.xml, line 3: this is no valid XML: mismatched tag. The file may be cut short"),
        ({"a.xml": "<annotation>\n"}, "a.xml, line 2: this is no valid XML: no element found"),
        ({"a.xml": ""}, "this is no valid XML: no element found"),
        ({"a.xml": b"<annotation>\xff</annotation>"}, "a.xml, line 1: this is no valid XML: not well-formed"),
        ({"a.xml": '<!DOCTYPE a [<!ENTITY b "c">]>\n<annotation/>'}, "no valid XML: it declares an entity"),
        ({"a.xml": xml(item("dog", 9, 2, 5, 8))}, "a.xml, line 3: the box reaches from (9, 2) to (5, 8), wanted left below right"),
        ({"a.xml": xml("", item("dog", "x", 2, 5, 8))}, "a.xml, line 4: this object has the <bndbox> ['x', '2', '5', '8'], wanted the four numbers xmin"),
        ({"a.xml": xml("<object><name>dog</name></object>")}, "line 3: this object has the <bndbox> [None, None, None, None]"),
        ({"a.xml": xml(item("dog", "nan", 2, 5, 8))}, "['nan', '2', '5', '8'], wanted the four numbers"),
        ({"a.xml": xml(item(" ", 1, 2, 5, 8))}, "line 3: this object has no <name>"),
        ({"a.xml": xml(item("dog", 1, 2, 5, 8, more="<difficult>maybe</difficult>"))}, "<difficult> is 'maybe', wanted 0 or 1"),
        ({"a.xml": "<annotations/>"}, "a.xml: the root is <annotations>, wanted <annotation>, as Pascal VOC has it. {tmp}/a.xml looks like the format CVAT"),
        ({"a.xml": xml()}, "no object is annotated in its 1 XML files"),
        ({"a.jpg": None}, "1 of 1 image files are missing in {tmp}, the first is 'a.jpg'"),
        ({"a.xml": None}, "is no data set of Pascal VOC: {tmp} holds no XML file. Set data.root"),
        ({"a.xml": None, "data.yaml": "names: [a]\n"}, "looks like YOLO's format: set data=yolo data.root={tmp}."),
        ({"Annotations/b.xml": C, "ImageSets/Main/train.txt": "b\nnone\n"}, "train.txt, line 2: {tmp}/Annotations/none.xml does not exist"),
        ({"Annotations/b.xml": C, "ImageSets/Main/train.txt": ""}, "train.txt lists no image"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {"a.xml": A, "a.jpg": (40, 20), **files}
    put(tmp_path, {name: value for name, value in content.items() if value is not None})
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        read_voc(root=tmp_path)


def test_classes_that_training_does_not_have_are_named(tmp_path: Path) -> None:
    put(tmp_path, {**LAYOUTS["folders"], "valid/c.xml": xml(item("Dog", 3, 2, 11, 8))})
    train, val = read_voc(root=tmp_path), read_voc(root=tmp_path, part="val")
    message = r"the classes \['Dog'\] are not among the 2 that the model is trained on, so that they can never be found\. Not here, but there: \['cat', 'dog'\]"
    with pytest.raises(UserError, match=message):
        val.classified(train.categories)
