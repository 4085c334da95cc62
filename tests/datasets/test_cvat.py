"""The format CVAT for images: what is read, left out and refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from datasets.formats import Annotations
from datasets.formats.cvat import read_cvat
from detr.errors import UserError
from tests.helpers.exports import put

LABELS = "<meta><task><labels><label><name>dog</name></label><label><name>cat</name></label></labels></task></meta>"
BOX = '<box label="cat" xtl="1.5" ytl="2" xbr="11" ybr="8"/>'


def read(
    root: Path, *shapes: str, labels: str = LABELS, image: str = 'name="a ä.jpg" width="40" height="20"'
) -> Annotations:
    lines = ['<?xml version="1.0" encoding="utf-8"?>', f"<annotations>{labels}", f'<image id="0" {image}>', *shapes]
    put(root, {"a.xml": "\ufeff" + "\r\n".join([*lines, "</image>", "</annotations>"]), "images/a ä.jpg": (40, 20)})
    return read_cvat(images=root / "images", annotations=root / "a.xml")


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        (BOX, [1.5, 2, 9.5, 6]),
        ('<box label="cat" xtl="10" ytl="5" xbr="20" ybr="9" rotation="90"/>', [13, 2, 4, 10]),
        ('<box label="cat" xtl="10" ytl="5" xbr="20" ybr="9" rotation="180"/>', [10, 5, 10, 4]),
        ('<box label="cat" xtl="10" ytl="5" xbr="12" ybr="7" rotation="45"/>', [11 - 2**0.5, 6 - 2**0.5, 8**0.5, 8**0.5]),
        ('<polygon label="cat" points="3.5,4;9,1;7,12"/>', [3.5, 1, 5.5, 11]),
    ],
)  # fmt: skip
def test_shapes_become_boxes(shape: str, box: list[float], tmp_path: Path) -> None:
    found = read(tmp_path, shape)
    [record] = found.records
    assert (record.file_name, record.size, record.labels.tolist()) == ("a ä.jpg", (20, 40), [1])
    assert record.boxes.tolist() == [pytest.approx(box)]
    assert [(category.id, category.name) for category in found.categories] == [(1, "dog"), (2, "cat")]


def test_labels_are_those_of_the_boxes_where_there_is_no_list(tmp_path: Path) -> None:
    found = read(tmp_path, BOX.replace("cat", "zebra"), BOX, labels="", image='name="a ä.jpg"')
    assert [category.name for category in found.categories] == ["cat", "zebra"]
    assert found.records[0].labels.tolist() == [1, 0] and found.records[0].size == (20, 40)


def test_other_shapes_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert (
        len(read(tmp_path, BOX, '<points label="cat" points="1,2"/>', '<polyline label="dog"/>').records[0].labels) == 1
    )
    assert "2 shapes are no boxes or polygons, such as '<polyline> in line 6', and are left out" in caplog.text


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([BOX, BOX.replace('"1.5"', '"x"')], {}, "a.xml, line 5: this box has ['x', '2', '11', '8'], wanted the four numbers xtl, ytl, xbr, ybr"),
        ([BOX.replace('"1.5"', '"12"')], {}, "a.xml, line 4: the box reaches from (12, 2) to (11, 8), wanted left below right"),
        ([BOX.replace("cat", "cow")], {}, "line 4: the label 'cow' is not among those of the task, ['dog', 'cat']"),
        (['<polygon label="cat" points="1,2;3"/>'], {}, "line 4: this polygon has the points '1,2;3', wanted three or more"),
        ([], {"image": ""}, "line 3: this image has no name"),
        ([], {"labels": ""}, "there is no label, so there is nothing to detect"),
        ([], {"image": 'name="none.jpg"'}, "1 of 1 image files are missing in {tmp}/images, the first is 'none.jpg'"),
        ([], {"labels": "<track id='0'><box frame='0'/></track>"}, "line 2: this has tracks of a video. Export the task as 'CVAT for images 1.1'"),
        (["<box"], {}, "a.xml, line 5: this is no valid XML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(
    shapes: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        read(tmp_path, *shapes, **options)


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, "a.xml", "a.xml does not exist, wanted an XML file of CVAT. Set data.train.annotations"),
        ({"a.xml": "<annotation></annotation>"}, "a.xml", "is not in the format CVAT for images. {tmp}/a.xml looks like Pascal VOC's format: set data=voc data.root={tmp}."),
        ({"a.xml": "<svg/>"}, "a.xml", "the root is <svg>, wanted <annotations>"),
        ({"a.json": '{"images": [], "categories": []}'}, "a.json", "looks like COCO's format: set data=custom"),
        ({"train/_annotations.coco.json": "{}"}, ".", "is a folder, wanted an XML file of CVAT. {tmp} looks like Roboflow's"),
    ],
)  # fmt: skip
def test_another_format_is_recognized(files: dict[str, Any], given: str, message: str, tmp_path: Path) -> None:
    put(tmp_path, files)
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        read_cvat(images=tmp_path, annotations=tmp_path / given)
