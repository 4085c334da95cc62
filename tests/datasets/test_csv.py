"""Tables: headers, separators, lines without boxes, and what is wrong in them."""

import re
from pathlib import Path

import pytest

from datasets.formats import Annotations
from datasets.formats.csv import read_csv
from detr.errors import UserError
from tests.helpers.exports import put

HEAD = "file,class,x1,y1,x2,y2"
ROWS = ["b.jpg,dog,1,2,11,8", "a ä.jpg,cat,0,0,4.5,5", "b.jpg,cat,3,3,9,9", "c.jpg,,,,,"]


def read(root: Path, text: str | bytes) -> Annotations:
    put(root, {"boxes.csv": text, **{f"images/{name}.jpg": (40, 20) for name in ("a ä", "b", "c")}})
    return read_csv(images=root / "images", annotations=root / "boxes.csv")


def lines(*rows: str, head: str = HEAD) -> str:
    return "\n".join([head, *rows]) + "\n"


SOUND = lines(*ROWS)


@pytest.mark.parametrize(
    "text",
    [
        SOUND,
        "\ufeff" + SOUND.replace("\n", "\r\n"),
        SOUND.encode("utf-16"),
        "\n" + SOUND.replace("\n", "\n\n"),
        SOUND.replace(",", "\t"),
        SOUND.replace(",", ";").replace("4.5", "4,5"),
        SOUND.replace(",", ", "),
        SOUND.replace("dog", '"dog"').replace("a ä.jpg", '"a ä.jpg"'),
        lines(*ROWS, head="Image Path,Class Name,X_Min,Y_Min,X_Max,Y_Max"),
        lines(*ROWS, head="filename,label,xmin,ymin,xmax,ymax"),
        lines(*ROWS, head="image_id,category,bbox_x1,bbox_y1,bbox_x2,bbox_y2"),
        lines(*(f"40,20,{row}" for row in ROWS), head="width,height,img,name,left,top,right,bottom"),
        SOUND.replace("c.jpg,,,,,", "c.jpg"),
        SOUND + "b.jpg,,,,,\n",
        SOUND.replace("c.jpg", ".\\c.jpg").replace("b.jpg", "B.JPG"),
    ],
)
def test_the_same_data_are_read_from_all_spellings(text: str | bytes, tmp_path: Path) -> None:
    found = read(tmp_path, text)
    assert [(category.id, category.name) for category in found.categories] == [(1, "cat"), (2, "dog")]
    words = [(record.labels.tolist(), record.boxes.tolist(), record.size) for record in found.records]
    assert [Path(record.file_name).name for record in found.records] == ["b.jpg", "a ä.jpg", "c.jpg"]
    assert words == [
        ([1, 0], [[1, 2, 10, 6], [3, 3, 6, 6]], (20, 40)),
        ([0], [[0, 0, 4.5, 5]], (20, 40)),
        ([], [], (20, 40)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines("b.jpg,dog,1,2,11,8", "b.jpg,dog,9,2,5,8"), "boxes.csv, line 3: the box reaches from (9, 2) to (5, 8), wanted left below right"),
        (lines("", "b.jpg,dog,1,x,11,8"), "boxes.csv, line 3: the box is ['1', 'x', '11', '8'], wanted four numbers of pixels"),
        (lines("b.jpg,dog,1,2,11"), "line 2: the box is ['1', '2', '11', '']"),
        (lines("b.jpg,dog,1,2,inf,8"), "line 2: the box is ['1', '2', 'inf', '8']"),
        (lines("b.jpg,,1,2,11,8"), "line 2: the box has no class"),
        (lines(",dog,1,2,11,8"), "line 2: there is no file name"),
        (lines("none.jpg,dog,1,2,11,8"), "1 of 1 image files are missing in {tmp}/images, the first is 'none.jpg'"),
        (lines("C:\\a.jpg,dog,1,2,11,8"), "which is an absolute path"),
        (lines('b.jpg,"dog'), "boxes.csv, line 2: this is no valid CSV: unexpected end of data"),
        (lines("b.jpg,dog,1,2,3,4", head="file,class,x,y,width,height"), "the header has no column for x1, y1, x2, y2, only ['file', 'class', 'x', 'y', 'width', 'height']. These look like boxes of x, y, width, height: write the corners"),
        (lines("b.jpg,dog,1,2,3,4", head="b.jpg,dog,1,2,3,4"), "the header has no column for file, class, x1, y1, x2, y2"),
        ("", "the header has no column for file, class"),
        (lines("b.jpg,,,,,"), "there is no line with a box, so there is nothing to detect"),
        (b"file,class,x1,y1,x2,y2\nb\xe4r.jpg,dog,1,2,3,4", "line 2: this is no text in UTF-8, because of the byte 0xe4. Save the file as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        read(tmp_path, text)


def test_another_format_is_recognized(tmp_path: Path) -> None:
    put(tmp_path, {"set/train/_annotations.coco.json": "{}", "a.xml": "<annotations>"})
    for given, message in (
        ("set", r"is a folder, wanted a CSV file\. .*set looks like Roboflow's COCO export"),
        ("a.xml", r"a\.xml is no CSV file\. .* looks like the format CVAT for images: set data=cvat"),
        ("none.csv", r"none\.csv does not exist, wanted a CSV file\. Set data\.train\.annotations"),
    ):
        with pytest.raises(UserError, match=message):
            read_csv(images=tmp_path, annotations=tmp_path / given)
