"""Annotation files as other programs export them: what is read as meant, what is refused, and what is said of it."""

import json
import os
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DetectionDataset
from detr.errors import UserError
from detr.evaluation import evaluate_coco
from tests.helpers.data import coco_set

Content = dict[str, Any]
Change = Callable[[Content], Any]
BACKENDS = ["hotcoco", "pycocotools"]
NFC, NFD = "B\u00e4r.png", "Ba\u0308r.png"


def sound() -> Content:
    """Two images of 30 x 20 pixels, with three objects of two categories, of which one is a crowd."""
    return {
        "images": [{"id": key, "file_name": f"{key}.png", "width": 30, "height": 20} for key in (1, 2)],
        "annotations": [
            {"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 2, 5.5, 6], "area": 33.0, "iscrowd": 0},
            {"id": 8, "image_id": 2, "category_id": 4, "bbox": [0, 0, 20, 10], "area": 200.0, "iscrowd": 0},
            {"id": 9, "image_id": 2, "category_id": 3, "bbox": [3, 3, 9, 9], "area": 81.0, "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
    }


def read(folder: Path, content: Content, files: tuple[str, ...] = ("1.png", "2.png")) -> DetectionDataset:
    for name in files:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20)).save(path)
    (folder / "a.json").write_text(json.dumps(content))
    return coco_set(folder / "images", folder / "a.json")


def changed(change: Change) -> Content:
    content = sound()
    change(content)
    return content


def each(kind: str, change: Change) -> Change:
    return lambda content: [change(entry) for entry in content[kind]]


AS_MEANT: dict[str, tuple[Change, str]] = {
    "bbox of texts": (
        each("annotations", lambda e: e.update(bbox=[str(v) for v in e["bbox"]])),
        "12 numbers as text, such as bbox '1' of annotation 7",
    ),
    "areas of texts": (each("annotations", lambda e: e.update(area=str(e["area"]))), "3 numbers as text, such as area"),
    "areas that are null": (lambda c: c["annotations"][1].update(area=None), "1 fields without a value, such as area None"),
    "negative areas": (each("annotations", lambda e: e.update(area=-1.0)), "3 areas that are not above 0"),
    "areas of 0": (each("annotations", lambda e: e.update(area=0)), "3 areas that are not above 0"),
    "enormous areas": (each("annotations", lambda e: e.update(area=2e10)), "3 areas that are not above 0, or above"),
    "NaN areas": (each("annotations", lambda e: e.update(area=float("nan"))), "3 fields without a value, such as area nan"),
    "areas of a text that is NaN": (each("annotations", lambda e: e.update(area="NaN")), "3 fields without a value"),
    "blank areas": (each("annotations", lambda e: e.update(area=" ")), "3 fields without a value, such as area ' '"),
    "infinite areas": (each("annotations", lambda e: e.update(area=float("inf"))), "3 areas that are infinite"),
    "sizes with decimals": (each("images", lambda e: e.update(width=30.0, height=20.0)), "4 whole numbers with decimals"),
    "sizes of texts": (each("images", lambda e: e.update(width="30", height=" 20 ")), "4 numbers as text"),
    "category ids with decimals": (
        lambda c: [e.update(category_id=float(e["category_id"])) for e in c["annotations"]],
        "3 whole numbers with decimals, such as category_id 3.0 of annotation 7",
    ),
    "sizes of texts with decimals": (each("images", lambda e: e.update(width="30.0", height="20.")), "4 numbers as text"),
    "category ids of texts with decimals": (
        lambda c: [e.update(category_id=f"{e['category_id']}.0") for e in c["annotations"]],
        "3 numbers as text, such as category_id '3.0' of annotation 7",
    ),
    "ids of categories as texts": (each("categories", lambda e: e.update(id=str(e["id"]))), "2 numbers as text"),
    "image ids of texts": (each("images", lambda e: e.update(id=str(e["id"]))), "2 numbers as text, such as id '1'"),
    "image ids of annotations as texts": (
        each("annotations", lambda e: e.update(image_id=f"0{e['image_id']}")),
        "3 numbers as text, such as image_id '01'",
    ),
    "annotations without ids": (each("annotations", lambda e: e.pop("id")), "3 annotations without an id"),
    "annotations with ids that are null": (each("annotations", lambda e: e.update(id=None)), "3 annotations without an id"),
    "annotations with blank ids": (each("annotations", lambda e: e.update(id="")), "3 annotations without an id"),
    "iscrowd of texts": (
        each("annotations", lambda e: e.update(iscrowd=str(e["iscrowd"]))),
        "3 numbers as text, such as iscrowd '0' of annotation 7",
    ),
    "iscrowd of words": (
        each("annotations", lambda e: e.update(iscrowd="True" if e["iscrowd"] else "false")), "3 numbers as text"
    ),
    "iscrowd that is null": (lambda c: c["annotations"][0].update(iscrowd=None), "1 fields without a value, such as iscrowd None"),
    "iscrowd of texts with decimals": (
        each("annotations", lambda e: e.update(iscrowd=f"{e['iscrowd']}.0")), "3 numbers as text, such as iscrowd '0.0'"
    ),
    "iscrowd that is NaN or blank": (
        lambda c: [e.update(iscrowd=v) for e, v in zip(c["annotations"], (float("nan"), " "), strict=False)],
        "2 fields without a value, such as iscrowd nan",
    ),
    "ignore": (lambda c: c["annotations"][0].update(ignore=1), "1 annotations with 'ignore', which COCO does not know"),
    "an object without a bbox": (
        lambda c: c["annotations"].append({"id": 1, "image_id": 1, "category_id": 3, "bbox": None}),
        "1 annotations without a bbox, which are left out, such as annotation 1",
    ),
}  # fmt: skip
SILENT: dict[str, Change] = {
    "no iscrowd": lambda content: content["annotations"][0].pop("iscrowd"),
    "iscrowd of true and false": each("annotations", lambda e: e.update(iscrowd=bool(e["iscrowd"]))),
    "no areas": each("annotations", lambda e: e.pop("area")),
    "ids of annotations that are no numbers": each("annotations", lambda e: e.update(id=f"a{e['id']}")),
    "segmentations of any shape": lambda content: [
        entry.update(segmentation=odd)
        for entry, odd in zip(content["annotations"], (None, [[1, 2]], {"counts": "x"}), strict=True)
    ],
    "fields that are not read": each("images", lambda e: e.update(license=None, coco_url=3, flickr_url=[])),
}


def found_by(dataset: DetectionDataset) -> list[Any]:
    targets = [dataset[index][1] for index in range(len(dataset))]
    return [(target.image_id, target.labels.tolist(), target.boxes.tolist()) for target in targets]


@pytest.mark.parametrize("name", [*AS_MEANT, *SILENT])
def test_harmless_values_are_read_as_meant(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = read(tmp_path / "sound", sound())
    assert not caplog.records
    change, said = AS_MEANT[name] if name in AS_MEANT else (SILENT[name], "")
    dataset = read(tmp_path, changed(change))
    assert found_by(dataset) == found_by(wanted)
    truth, same = dataset.ground_truth(), wanted.ground_truth()
    assert truth == same, "evaluation reads what training reads"
    warned = [record.getMessage() for record in caplog.records if "writes some values otherwise" in record.getMessage()]
    assert len(warned) == bool(said) and all(said in text and str(tmp_path / "a.json") in text for text in warned)


RESULTS = [
    {"image_id": 1, "category_id": 3, "bbox": [1, 2, 5, 6], "score": 0.9},
    {"image_id": 2, "category_id": 4, "bbox": [1, 0, 19, 10], "score": 0.8},
    {"image_id": 2, "category_id": 3, "bbox": [3, 3, 9, 8], "score": 0.7},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", [name for name in (*AS_MEANT, *SILENT) if name not in ("areas of 0", "enormous areas")]
)
def test_evaluation_of_the_file_gives_the_same(
    name: str, tmp_path: Path, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = evaluate_coco(sound(), RESULTS, backend=backend)
    change = AS_MEANT[name][0] if name in AS_MEANT else SILENT[name]
    content = changed(change)
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = evaluate_coco(tmp_path / "a.json", RESULTS, backend=backend)
    if name == "negative areas":  # pycocotools' own figure, but not silently
        assert found["AP"] == -1 and "3 areas below 0, which count for no size" in caplog.text
    else:
        assert found == wanted and 0 < found["AP"] < 1
    assert evaluate_coco(content, deepcopy(RESULTS), backend=backend) == found


REFUSED: dict[str, tuple[Change, str]] = {
    "iscrowd of 2": (lambda c: c["annotations"][0].update(iscrowd=2), "annotation 7 has iscrowd 2, wanted 0 or 1"),
    "iscrowd that is a list": (lambda c: c["annotations"][0].update(iscrowd=[]), r"iscrowd \[\], wanted 0 or 1"),
    "iscrowd of other words": (lambda c: c["annotations"][0].update(iscrowd="maybe"), "iscrowd 'maybe', wanted 0 or 1"),
    "area of words": (lambda c: c["annotations"][0].update(area="big"), "the area 'big', wanted a number of pixels"),
    "area that is a list": (lambda c: c["annotations"][0].update(area=[3]), r"the area \[3\], wanted a number"),
    "bbox of a text": (lambda c: c["annotations"][0].update(bbox="1 2 3 4"), "has the bbox '1 2 3 4', wanted"),
    "bbox with a null": (lambda c: c["annotations"][0].update(bbox=[1, 2, None, 4]), "None, 4], wanted .x, y, width"),
    "bbox of flags": (lambda c: c["annotations"][0].update(bbox=[True] * 4), "has the bbox .True"),
    "bbox of five numbers": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 4, 0.9]), "has the bbox .1, 2, 3, 4, 0.9"),
    "a file name that is a number": (lambda c: c["images"][0].update(file_name=1), "image 1 has the file_name 1, wanted"),
    "an image that is a name": (lambda c: c["images"].append("3.png"), "entry 2 of 'images' is '3.png', wanted an object"),
    "a width that is missing": (lambda c: c["images"][0].pop("width"), "image 1 has width None .* Give the size"),
    "annotations that are missing": (lambda c: c.pop("annotations"), "'annotations' is missing or no list"),
    "width with a fraction": (lambda c: c["images"][0].update(width=30.5), "image 1 has width 30.5"),
    "category id with a fraction": (lambda c: c["annotations"][0].update(category_id=3.5), "has the category 3.5"),
    "ids that are the same": (lambda c: c["images"][0].update(id="2"), "the id 2 occurs twice in 'images'"),
    "annotation ids that are the same": (lambda c: c["annotations"][0].update(id="8"), "8 occurs twice in 'annotations'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_mean_anything_is_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    with pytest.raises(UserError, match=message.replace("None, 4]", r"None, 4\]")):
        read(tmp_path, changed(change))


# Names of files

FILES = {
    "slashes of Windows": ("cam 1\\0.png", "cam 1/0.png"),
    "slashes of this system": ("cam 1/0.png", "cam 1/0.png"),
    "a name with a backslash": ("cam 1\\0.png", "cam 1\\0.png"),
    "accents in two characters": (NFC, NFD),
    "accents in one character": (NFD, NFC),
    "accents in a folder": (f"{NFC}/1.png", f"{NFD}/1.png"),
    "other capitals": ("Images/IMG_1.JPG.PNG", "images/img_1.jpg.png"),
    "a point in front": ("./1.png", "1.png"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_found_under_other_names(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written, there = FILES[name]
    dataset = read(tmp_path, changed(lambda c: c["images"][0].update(file_name=written)), ("2.png", there))
    assert dataset[0][0].shape == (3, 20, 30)
    same = Path(written) == Path(there)
    assert ("1 file names are written otherwise than in" in caplog.text) != same


def test_a_name_that_could_be_two_files_is_missing(tmp_path: Path) -> None:
    content = changed(lambda c: c["images"][0].update(file_name="IMG.png"))
    with pytest.raises(UserError, match=r"1 of 2 image files are missing in .*, the first is 'IMG\.png'"):
        read(tmp_path, content, ("2.png", "img.png", "Img.png"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://x.org/a.png", "is an address. Download the images"),
        ("s3://bucket/a.png", "is an address"),
        ("file:///a.png", "is an address"),
        ("/data/a.png", "is an absolute path, and may lead out of"),
        ("C:\\data\\a.png", "is an absolute path"),
        ("C:a.png", "is an absolute path"),
        ("..\\a.png", "leads out of the image folder"),
    ],
)
def test_names_that_are_not_in_the_folder(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"image 1 has the file name .*, which {message}.*Give names relative"):
        read(tmp_path, changed(lambda c: c["images"][0].update(file_name=name)))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["a pipe", "a folder"])
def test_images_are_regular_files(make: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    make(tmp_path / "images" / "1.png")
    with pytest.raises(UserError, match="1 of 2 image files are missing"):
        read(tmp_path, sound(), ("2.png",))


# Other formats

YOLO = b"0 0.5 0.5 0.25 1\n1 0.5 0.25 0.1 0.1\n"
VOC = b"<?xml version='1.0'?>\n<annotation><object><name>cat</name></object></annotation>"


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({"labels/0.txt": YOLO}, "labels", "looks like YOLO's format: set data=yolo data.root={tmp}."),
        ({"labels/train/0.txt": b"", "labels/train/1.txt": YOLO}, "labels", "data=yolo data.root={tmp}."),
        ({"labels/0.txt": YOLO}, "labels/0.txt", "data=yolo data.root={tmp}."),
        ({"labels/0.txt": b"3 0.1 0.2 0.3 0.4 0.5 0.6\n"}, "labels", "data=yolo data.root={tmp}."),
        (
            {"data.yaml": b"path: ..\ntrain: images/train\nnames:\n  0: cat\n"},
            "data.yaml",
            "data=yolo data.root={tmp}.",
        ),
        ({"a/0.jpg": b"", "a/data.yml": b"nc: 3\n"}, "a", "data=yolo data.root={tmp}/a."),
        ({"voc/0.xml": VOC}, "voc", "looks like Pascal VOC's format: set data=voc data.root={tmp}/voc."),
        ({"set/Annotations/0.xml": VOC}, "set", "data=voc data.root={tmp}/set."),
        ({"voc/0.xml": VOC}, "voc/0.xml", "data=voc data.root={tmp}/voc."),
        ({"set/valid/_annotations.coco.json": b"{}"}, "set", "looks like Roboflow's COCO export: set data=roboflow"),
        ({"set/train/_annotations.coco.json": b"{}"}, "set/a.json", "data=roboflow data.root={tmp}/set."),
        (
            {"a.xml": b"<annotations></annotations>"},
            "a.xml",
            "data=cvat data.train.images=DIR data.train.annotations={tmp}/a.xml.",
        ),
        (
            {"a.csv": b"f,c,x1,y1,x2,y2\n"},
            "a.csv",
            "data=csv data.train.images=DIR data.train.annotations={tmp}/a.csv.",
        ),
        ({"a/0.jpg": b""}, "a", "is a folder, wanted a JSON file"),
        ({"a.json": b'[{"image_id": 1, "bbox": [], "score": 1}]'}, "a.json", "holds detections, which have scores"),
        ({"a.json": b'{"version": 1, "shapes": []}'}, "a.json", "format of LabelMe, wanted COCO"),
        ({"a.txt": b"not a label"}, "a.txt", "is no valid JSON"),
    ],
)
def test_other_formats_are_recognized(files: dict[str, bytes], given: str, message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))):
        coco_set(tmp_path, tmp_path / given)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", ["json", "txt", "xml"])
def test_annotations_that_are_a_pipe_are_refused(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a.{suffix}")
    with pytest.raises(UserError, match="is a device or a pipe"):
        coco_set(tmp_path, tmp_path / f"a.{suffix}")
    with pytest.raises(UserError, match="is a device or a pipe"):
        evaluate_coco(tmp_path / f"a.{suffix}", [])


def test_the_arrays_of_what_was_coerced_have_their_types(tmp_path: Path) -> None:
    dataset = read(tmp_path, changed(AS_MEANT["bbox of texts"][0]))
    assert all(record.boxes.dtype == np.float64 and record.crowds.dtype == bool for record in dataset.records)
    assert dataset[0][1].boxes.dtype == torch.float32
