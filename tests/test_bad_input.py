"""What a user can get wrong, and what the commands answer: one message, exit code 2, no traceback.

`python tests/test_bad_input.py` prints all cases as a table.
"""

import json
import math
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from datasets.shapes import generate  # noqa: E402
from tests.helpers.commands import Outcome, run, run_process  # noqa: E402
from tests.helpers.exports import put  # noqa: E402

SIZE = 48
TRAIN, EVALUATE, PREDICT = "train.py", "evaluate.py", "predict.py"
# {tmp} stands for the folder of the case; it holds data/, valid.pt and picture.jpg.
DATA = (
    "data=custom",
    "data.train.images={tmp}/data/train",
    "data.train.annotations={tmp}/data/instances_train.json",
    "data.val.images={tmp}/data/val",
    "data.val.annotations={tmp}/data/instances_val.json",
    "data.workers=0",
    "data.batch_size=2",
)
BASE = {
    TRAIN: (
        *DATA,
        f"data.size={SIZE}",
        "data.max_size=64",
        f"data.transforms.sizes=[{SIZE}]",
        "data.transforms.crop=false",
        "model/backbone=resnet18",
        "model.backbone.weights=null",
        "model.backbone.norm=batch",
        "model.backbone.freeze=[]",
        "model.encoder.d_model=16",
        "model.encoder.nhead=2",
        "model.encoder.num_layers=1",
        "model.decoder.num_layers=1",
        "model.encoder.dim_feedforward=16",
        "model.num_queries=5",
        "trainer.max_steps=1",
        "device=cpu",
        "run_dir={tmp}/run",
    ),
    EVALUATE: (*DATA[1:], "checkpoint={tmp}/valid.pt", "device=cpu", "run_dir={tmp}/run"),
    PREDICT: ("checkpoint={tmp}/valid.pt", "source={tmp}/picture.jpg", "device=cpu", "run_dir={tmp}/run"),
}


@dataclass(frozen=True)
class Case:
    """One mistake.

    overrides: replace those of BASE with the same key. words: what the message must contain.
    prepare: makes the mistake in the case's folder. without: beginnings of BASE's overrides that are left out.
    """

    name: str
    script: str
    overrides: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    prepare: Callable[[Path], Any] | None = None
    without: tuple[str, ...] = ()
    code: int = 2
    environment: dict[str, str] = field(default_factory=dict)
    needs_no_cuda: bool = False


# Ways to spoil the data of a case.


def annotations(change: Callable[[dict[str, Any]], Any], split: str = "train") -> Callable[[Path], None]:
    """Change the content of an annotation file in place."""

    def prepare(tmp: Path) -> None:
        path = tmp / "data" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return prepare


def first(kind: str, **values: Any) -> Callable[[Path], None]:
    """Set values of the first entry of a list of the training annotations."""
    return annotations(lambda content: content[kind][0].update(values))


def repeated(kind: str) -> Callable[[Path], None]:
    """Let the first two entries of a list have the same id."""
    return annotations(lambda content: content[kind][1].update(id=content[kind][0]["id"]))


BAD_BOXES: list[list[float]] = [
    [5, 5, -3, 4],
    [math.nan, 5, 3, 4],
    [5, math.inf, 3, 4],
    [SIZE + 5, 5, 3, 4],
    [-9, 5, 3, 4],
    [5, 5, 0, 4],
]


def bad_boxes(tmp: Path) -> None:
    """Bad boxes beside the good ones, in both splits."""

    def change(content: dict[str, Any]) -> None:
        image = content["images"][0]["id"]
        content["annotations"] += [
            {"id": 1000 + number, "image_id": image, "category_id": 1, "bbox": box, "area": 9, "iscrowd": 0}
            for number, box in enumerate(BAD_BOXES)
        ]

    for split in ("train", "val"):
        annotations(change, split)(tmp)


def only(box: list[float]) -> Callable[[Path], None]:
    """The same box for all objects."""
    return annotations(lambda content: [entry.update(bbox=box) for entry in content["annotations"]])


def images(change: Callable[[Path], Any], split: str = "train") -> Callable[[Path], Any]:
    """Change every image file of a split."""
    return lambda tmp: [change(path) for path in (tmp / "data" / split).iterdir()]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def enlarge(path: Path) -> None:
    Image.new("RGB", (SIZE + 16, SIZE)).save(path)


def enormous(path: Path) -> None:
    """A PNG of some bytes whose header promises 60000 x 60000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def link_to(target: str) -> Callable[[Path], None]:
    """Make the training images links to another file, named from the case's folder."""

    def prepare(tmp: Path) -> None:
        for path in (tmp / "data" / "train").iterdir():
            path.unlink()
            path.symlink_to(tmp / target)

    return prepare


def remove(name: str) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        path = tmp / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def write(name: str, content: bytes = b"") -> Callable[[Path], Any]:
    return lambda tmp: (tmp / name).write_bytes(content)


# Ways to spoil a checkpoint, always as bad.pt.


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def hostile_pickle(plain: bool) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        content = {"model": {}, "extra": Hostile(f"touch {tmp / 'marker'}")}
        if plain:
            (tmp / "bad.pt").write_bytes(pickle.dumps(content))
        else:
            torch.save(content, tmp / "bad.pt")

    return prepare


def checkpoint(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    """A valid checkpoint whose content is changed."""

    def prepare(tmp: Path) -> None:
        content = torch.load(tmp / "valid.pt", weights_only=True)
        change(content, tmp)
        torch.save(content, tmp / "bad.pt")

    return prepare


def not_finite(tmp: Path) -> None:
    checkpoint(lambda content, _: content["model"]["queries.position.weight"].view(-1)[0].fill_(math.nan))(tmp)


def flip(tmp: Path) -> None:
    content = bytearray((tmp / "valid.pt").read_bytes())
    content[len(content) // 3] ^= 16
    (tmp / "bad.pt").write_bytes(content)


def hostile_model(node: Any, *place: str) -> Callable[[Path], None]:
    """A checkpoint whose model configuration has a hostile value at a place; {tmp} in it is filled in."""

    def change(content: dict[str, Any], tmp: Path) -> None:
        folder = tmp / "evil"
        folder.mkdir()
        (folder / "hubconf.py").write_text(f"open({str(tmp / 'marker')!r}, 'w')\n")
        parent: dict[str, Any] = content["config"]
        for key in ("model", *place[:-1]):
            parent = parent[key]
        filled = in_folder(node, tmp)
        if place:
            parent[place[-1]] = filled
        else:
            parent.update(filled)

    return checkpoint(change)


def in_folder(value: Any, tmp: Path) -> Any:
    if isinstance(value, dict):
        return {key: in_folder(entry, tmp) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(in_folder(entry, tmp) for entry in value)
    return value.replace("{tmp}", str(tmp)) if isinstance(value, str) else value


HUB = {"repo_or_dir": "{tmp}/evil", "model": "any", "source": "local"}
LOG_FILE = {"_target_": "logging.FileHandler", "filename": "{tmp}/marker"}
HOSTILE_NODES: list[dict[str, Any]] = [
    {"_target_": "os.system", "command": "touch {tmp}/marker"},
    {"_target_": "torch.hub.load", **HUB},
    {"_target_": "builtins.eval", "_args_": ["__import__('os').system('touch {tmp}/marker')"]},
    {"_target_": "detr.models.backbones.resnet.torch.hub.load", **HUB},
    {"_target_": "detr.models.layers.positions.torch.os.system", "command": "touch {tmp}/marker"},
    LOG_FILE,
]
BAD = ("checkpoint={tmp}/bad.pt",)
REFUSED = ("bad.pt", "refused")
TARGET = ("_target_", "is refused", "allow_targets")

CASES = [
    # Data
    Case("no data folder", TRAIN, (), ("instances_train.json", "does not exist", "data.root"), remove("data")),
    Case("no image folder", TRAIN, (), ("data/train", "does not exist", "data.train.images"), remove("data/train")),
    Case(
        "annotation file missing",
        TRAIN,
        (),
        ("instances_train.json", "does not exist", "data.train.annotations"),
        remove("data/instances_train.json"),
    ),
    Case(
        "annotation file truncated",
        TRAIN,
        (),
        ("instances_train.json", "no valid JSON", "cut short"),
        lambda tmp: cut(tmp / "data" / "instances_train.json"),
    ),
    Case(
        "annotation file is binary",
        TRAIN,
        (),
        ("instances_train.json", "no valid JSON"),
        write("data/instances_train.json", b"\xff\xfe\x00\x01"),
    ),
    Case(
        "annotation file is a folder", TRAIN, ("data.train.annotations={tmp}/data",), ("/data", "is a folder", "JSON")
    ),
    Case(
        "annotations are a list",
        TRAIN,
        (),
        ("instances_train.json", "not in COCO format"),
        write("data/instances_train.json", b"[1]"),
    ),
    Case(
        "annotations lack categories",
        TRAIN,
        (),
        ("instances_train.json", "COCO", "'categories' is missing"),
        annotations(lambda content: content.pop("categories")),
    ),
    Case(
        "categories are empty",
        TRAIN,
        (),
        ("instances_train.json", "no categories"),
        annotations(lambda content: content["categories"].clear()),
    ),
    Case(
        "annotation is no object",
        TRAIN,
        (),
        ("instances_train.json", "'annotations'", "wanted"),
        annotations(lambda content: content["annotations"].append(7)),
    ),
    Case(
        "image file missing",
        TRAIN,
        (),
        ("image files are missing", "data/train", "000001.jpg"),
        remove("data/train/000001.jpg"),
    ),
    Case("image file truncated", TRAIN, (), (".jpg", "cannot be read", "Replace it"), images(cut)),
    Case(
        "image file truncated, in a worker",
        TRAIN,
        ("data.workers=1",),
        (".jpg", "cannot be read", "Replace it"),
        images(cut),
    ),
    Case("image file empty", TRAIN, (), (".jpg", "cannot be read", "empty", "Replace it"), images(empty)),
    Case(
        "image file empty, in a worker",
        TRAIN,
        ("data.workers=1",),
        (".jpg", "cannot be read", "empty", "Replace it"),
        images(empty),
    ),
    Case("image file truncated, evaluated", EVALUATE, (), (".jpg", "cannot be read"), images(cut, "val")),
    Case(
        "image of another size",
        TRAIN,
        (),
        (".jpg", f"{SIZE + 16}x{SIZE}", f"{SIZE}x{SIZE}", "correct width and height"),
        images(enlarge),
    ),
    Case("some bad boxes are dropped", TRAIN, (), ("dropped 6 of ", "NaN", "negative"), bad_boxes, code=0),
    *(
        Case(f"only {name} boxes", TRAIN, (), ("instances_train.json", "not one of", name, "[x, y,"), only(box))
        for name, box in (
            ("negative", BAD_BOXES[0]),
            ("NaN", BAD_BOXES[1]),
            ("infinite", BAD_BOXES[2]),
            ("outside", BAD_BOXES[3]),
            ("zero", BAD_BOXES[5]),
        )
    ),
    Case("bbox too short", TRAIN, (), ("annotation 1", "[1, 2, 3]", "wanted [x, y,"), only([1, 2, 3])),
    Case("bbox of words", TRAIN, (), ("annotation 1", "wanted [x, y,"), first("annotations", bbox=["a"] * 4)),
    Case(
        "unknown category id",
        TRAIN,
        (),
        ("annotation 1", "category 77", "'categories'"),
        first("annotations", category_id=77),
    ),
    Case("category id is a list", TRAIN, (), ("annotation 1", "category"), first("annotations", category_id=[1])),
    Case("unknown image id", TRAIN, (), ("annotation 1", "image 77", "'images'"), first("annotations", image_id=77)),
    Case("image id is a list", TRAIN, (), ("annotation 1", "image"), first("annotations", image_id=[0])),
    Case("image id is no number", TRAIN, (), ("'images'", "'a'", "whole number"), first("images", id="a")),
    Case("image without a size", TRAIN, (), ("image 0", "None", "whole numbers"), first("images", width=None)),
    Case("image without a file name", TRAIN, (), ("image 0", "file_name"), first("images", file_name=None)),
    Case("links that lead out", TRAIN, (), ("links that lead out of", "data/train"), link_to("picture.jpg")),
    Case("image promises to be enormous", TRAIN, (), ("refused", "decompress", "178956970"), images(enormous)),
    Case(
        "picture promises to be enormous",
        PREDICT,
        (),
        ("refused", "178956970"),
        lambda tmp: enormous(tmp / "picture.jpg"),
    ),
    Case(
        "annotations nested deeply", TRAIN, (), ("nested too deeply",), write("data/instances_train.json", b"[" * 10**5)
    ),
    Case(
        "annotations with a key twice",
        TRAIN,
        (),
        ("'images'", "twice"),
        write("data/instances_train.json", b'{"images": [], "images": [], "annotations": [], "categories": []}'),
    ),
    Case("image of enormous size", TRAIN, (), ("image 0", "whole numbers"), first("images", width=10**300)),
    Case("enormous box", TRAIN, (), ("dropped", "NaN"), first("annotations", bbox=[0, 0, 10**400, 1]), code=0),
    Case("enormous id", TRAIN, (), ("whole number",), first("images", id=10**30)),
    *(
        Case(f"repeated id in {kind}", TRAIN, (), ("instances_train.json", "twice", f"'{kind}'"), repeated(kind))
        for kind in ("images", "annotations", "categories")
    ),
    *(
        Case(f"file name leads out: {name!r}", TRAIN, (), ("image 0", "out of"), first("images", file_name=name))
        for name in (
            "../picture.jpg",
            "a/../../picture.jpg",
            "/etc/hostname",
            "C:\\a.jpg",
            "..\\..\\a.jpg",
            "\\\\host\\a.jpg",
            "a\0.jpg",
        )
    ),
    Case(
        "validation has another category",
        TRAIN,
        (),
        ("instances_val.json", "category 9", "same categories"),
        annotations(lambda content: content["categories"].append({"id": 9, "name": "star"}), "val"),
    ),
    Case(
        "validation calls all categories otherwise",
        EVALUATE,
        (),
        ("instances_val.json", "no category that the model knows", "'star 1'", "'circle'", "classes of the same names"),
        annotations(lambda content: [one.update(name=f"star {one['id']}") for one in content["categories"]], "val"),
    ),
    Case(
        "batch larger than the data set", TRAIN, ("data.batch_size=5",), ("4 images", "data.batch_size", "batch of 5")
    ),
    Case("batch size of 0", TRAIN, ("data.batch_size=0",), ("data.batch_size", "0")),
    Case("pad_to of 0", TRAIN, ("data.pad_to=0",), ("data.pad_to", "0")),
    Case("unknown way with unreadable images", TRAIN, ("data.unreadable=hide",), ("data.unreadable", "skip", "'hide'")),
    Case("negative number of workers", TRAIN, ("data.workers=-1",), ("data.workers", "-1")),
    Case(
        "no images in the training set",
        TRAIN,
        (),
        ("instances_train.json", "0 images"),
        annotations(lambda content: content.update(images=[], annotations=[])),
    ),
    Case(
        "no images in the validation set",
        TRAIN,
        (),
        ("instances_val.json",),
        annotations(lambda content: content.update(images=[], annotations=[]), "val"),
    ),
    Case(
        "nothing but crowds to train on",
        TRAIN,
        (),
        ("instances_train.json", "no object to train on", "iscrowd"),
        annotations(lambda content: [entry.update(iscrowd="1") for entry in content["annotations"]]),
    ),
    Case(
        "YOLO labels",
        TRAIN,
        ("data.train.annotations={tmp}/labels.txt",),
        ("labels.txt", "no JSON file in COCO format", "looks like YOLO's format", "data=yolo data.root={tmp}"),
        write("labels.txt", b"0 0.5 0.5 0.2 0.2\n"),
    ),
    Case(
        "YOLO chosen for Roboflow's export",
        TRAIN,
        ("data=yolo", "data.root={tmp}/set"),
        ("neither data.yaml nor classes.txt", "Roboflow's COCO export", "set data=roboflow data.root={tmp}/set"),
        lambda tmp: put(tmp, {"set/train/_annotations.coco.json": "{}"}),
        without=("data",),
    ),
    Case(
        "Roboflow's export chosen for YOLO",
        TRAIN,
        ("data=roboflow", "data.root={tmp}/set"),
        ("_annotations.coco.json does not exist", "YOLO's format", "set data=yolo data.root={tmp}/set"),
        lambda tmp: put(tmp, {"set/data.yaml": "names: [a]"}),
        without=("data",),
    ),
    Case(
        "COCO chosen for Roboflow's export",
        TRAIN,
        ("data=coco", "data.root={tmp}/set"),
        ("instances_train2017.json does not exist", "set data=roboflow data.root={tmp}/set"),
        lambda tmp: put(tmp, {"set/train/_annotations.coco.json": "{}"}),
        without=("data",),
    ),
    Case(
        "YOLO label in pixels",
        TRAIN,
        ("data=yolo", "data.root={tmp}/data"),
        ("data/labels/000000.txt, line 2", "17 is outside of [0, 1]", "divide pixels"),
        lambda tmp: put(
            tmp / "data",
            {
                "data.yaml": "train: images\nnames: [a]",
                "images/000000.jpg": (48, 48),
                "labels/000000.txt": "0 0.5 0.5 0.1 0.1\n0 17 5 9 9\n",
            },
        ),
        without=("data",),
    ),
    Case(
        "broken XML",
        TRAIN,
        ("data=voc", "data.root={tmp}/data"),
        ("data/train/000000.xml, line 1", "no valid XML"),
        write("data/train/000000.xml", b"<annotation><object>"),
        without=("data",),
    ),
    Case(
        "CVAT's format for video",
        TRAIN,
        ("data=cvat", "data.train.annotations={tmp}/a.xml"),
        ("a.xml, line 2", "tracks of a video", "CVAT for images 1.1"),
        write("a.xml", b"<annotations>\n<track id='0'/></annotations>"),
    ),
    Case(
        "box turned round in a table",
        TRAIN,
        ("data=csv", "data.train.annotations={tmp}/a.csv"),
        ("a.csv, line 2", "wanted left below right"),
        write("a.csv", b"file,class,x1,y1,x2,y2\n000000.jpg,a,9,9,3,12\n"),
    ),
    Case(
        "validation has a class that training does not have",
        TRAIN,
        ("data=csv", "data.train.annotations={tmp}/a.csv", "data.val.annotations={tmp}/b.csv"),
        ("b.csv", "the classes ['b'] are not among the 1", "Not here, but there: ['a']"),
        lambda tmp: put(
            tmp,
            {
                "a.csv": "file,class,x1,y1,x2,y2\n000000.jpg,a,3,3,9,9\n000001.jpg,a,3,3,9,9\n",
                "b.csv": "file,class,x1,y1,x2,y2\n000000.jpg,b,3,3,9,9\n",
            },
        ),
    ),
    Case(
        "one table without data.split",
        TRAIN,
        ("data=csv", "data.train.images={tmp}/data/train", "data.train.annotations={tmp}/a.csv"),
        ("data.val.images has no value",),
        without=("data",),
    ),
    Case(
        "boxes as corners are reported",
        TRAIN,
        (),
        ("look like [left, top, right, bottom]", "such as"),
        annotations(lambda content: [entry.update(bbox=[20, 20, 40, 40]) for entry in content["annotations"]]),
        code=0,
    ),
    Case(
        "folder of another project for generated shapes",
        TRAIN,
        ("data=shapes", "data.root={tmp}/data"),
        ("/data", "holds something else", "Nothing in it was changed", "data.root"),
        write("data/manifest.json", b'{"name": "web application"}'),
    ),
    # Options
    Case("misspelt option", TRAIN, ("model.num_querys=5",), ("model.num_querys", "Did you mean model.num_queries?")),
    Case("misspelt fixed option", TRAIN, ("trainer.epoch=5",), ("trainer.epoch", "Did you mean trainer.epochs?")),
    Case("option without its section", TRAIN, ("epochs=3",), ("option epochs", "Did you mean trainer.epochs?")),
    Case("group without its section", TRAIN, ("backbone=resnet18",), ("backbone", "Did you mean model/backbone?")),
    Case("misspelt fixed option with +", TRAIN, ("+trainer.epoch=5",), ("trainer.epoch.", "Did you mean epochs?")),
    Case("option beside the fixed ones", TRAIN, ("+foobar=1",), ("There is no option foobar.",)),
    Case(
        "option that has moved", TRAIN, ("model.transformer.num_levels=2",), ("has moved: set model.neck.num_levels",)
    ),
    Case("group that has moved", PREDICT, ("model/position=learned",), ("has moved: set model/encoder/position.",)),
    Case("option that is like no other", TRAIN, ("foobar=1",), ("foobar", "TrainConfig")),
    Case("option that does not exist", TRAIN, ("+model.foo=1",), ("model.foo", "not an option", "num_queries")),
    Case("misspelt option with +", TRAIN, ("+model.num_querys=5",), ("model.num_querys", "Did you mean num_queries")),
    Case("epochs is no number", TRAIN, ("trainer.epochs=abc",), ("trainer.epochs", "abc")),
    Case("num_queries is no number", TRAIN, ("model.num_queries=abc",), ("model.num_queries", "int", "'abc'")),
    Case("num_queries of 0", TRAIN, ("model.num_queries=0",), ("num_queries=0", "at least one")),
    Case(
        "dropout is a list",
        TRAIN,
        ("model.encoder.dropout=[1]",),
        ("model.encoder.dropout", "float", "[1]"),
    ),
    Case("dropout above 1", TRAIN, ("model.encoder.dropout=1.5",), ("dropout", "1.5")),
    Case("nhead does not divide d_model", TRAIN, ("model.encoder.nhead=3",), ("nhead", "16", "3")),
    Case(
        "loss that does not fit the head",
        TRAIN,
        ("criterion=focal", "model.background=true"),
        ("class head", "background=False"),
    ),
    Case(
        "output for no object that the loss has no use for",
        TRAIN,
        ("criterion=focal", "criterion.classification.background=true"),
        ("criterion.classification.background", "False", "True"),
    ),
    Case("term that is a number", TRAIN, ("criterion.terms.giou=3",), ("wanted a subclass of", "Term", "giou", "int")),
    Case("group set to null", TRAIN, ("model/denoising=null",), ("group", "null", "~model/denoising")),
    Case("denoising without anchors", TRAIN, ("model/denoising=cdn",), ("denoising", "anchors", "model/queries=")),
    Case("refinement without anchors", TRAIN, ("model.refine=true",), ("refine", "anchors", "model/queries=")),
    Case("too few levels", TRAIN, ("model.neck.num_levels=0",), ("model.neck", "num_levels", "at least 1")),
    Case("features out of order", TRAIN, ("model.backbone.features=[layer4,layer2]",), ("features", "in this order")),
    Case("plain_after above 1", TRAIN, ("data.plain_after=2",), ("data.plain_after", "at most 1", "2")),
    Case("num_groups of 0", TRAIN, ("model.queries.num_groups=0",), ("model.queries", "num_groups", "at least 1")),
    *(
        Case(
            f"reduction of 0 in {block}",
            TRAIN,
            (f"model/attention={block}", f"model.attention.{block}.block.reduction=0"),
            ("reduction", "at least 1", "got 0"),
        )
        for block in ("se", "non_local", "criss_cross", "dual")
    ),
    Case(
        "hidden features of 0",
        TRAIN,
        ("model/attention=spatial_transformer", "model.attention.spatial_transformer.block.hidden=0"),
        ("model.attention.spatial_transformer.block", "hidden of at least 1"),
    ),
    Case(
        "dropout of 2",
        TRAIN,
        ("model.encoder.dropout=2.0",),
        ("model.encoder", "dropout", "probability", "2.0"),
    ),
    Case(
        "batch norm of a single value",
        TRAIN,
        ("model/attention=residual", "data.batch_size=1"),
        ("single value", "data.batch_size"),
    ),
    Case("nhead of 0", TRAIN, ("model.encoder.nhead=0",), ("model.encoder", "multiple of nhead", "0")),
    Case("unknown norm", TRAIN, ("model.backbone.norm=layer",), ("norm", "frozen", "layer")),
    Case("unknown stage", TRAIN, ("model.backbone.freeze=[layer9]",), ("freeze", "layer9", "layer4")),
    Case("unknown group choice", TRAIN, ("model/backbone=resnet99",), ("model/backbone", "resnet99", "resnet50")),
    Case("unknown experiment", TRAIN, ("experiment=nothing",), ("experiment", "nothing")),
    Case("malformed override", TRAIN, ("model.num_queries",), ("model.num_queries",), without=("model.num_queries",)),
    Case("malformed list", TRAIN, ("data.transforms.sizes=[48",), ("[48",)),
    Case("unknown backend", TRAIN, ("evaluation.backend=fast",), ("backend", "pycocotools", "fast")),
    Case("former backend", EVALUATE, ("evaluation.backend=faster",), ("evaluation.backend", "write 'hotcoco'")),
    Case("too few max_dets", EVALUATE, ("evaluation.max_dets=5",), ("max_dets", "5")),
    Case(
        "coco without data.root", TRAIN, ("data=coco",), ("data.root has no value", "Set data.root="), without=("data",)
    ),
    Case("custom without folders", TRAIN, ("data=custom",), ("data.train.images", "Set"), without=("data",)),
    Case("evaluate without checkpoint", EVALUATE, (), ("checkpoint", "Set checkpoint="), without=("checkpoint",)),
    Case("predict without source", PREDICT, (), ("source", "Set source="), without=("source",)),
    Case(
        "refused target",
        TRAIN,
        ("data.transforms._target_=os.system",),
        ("data.transforms._target_", "os.system", "refused", "allow_targets"),
    ),
    Case(
        "target that does not exist",
        TRAIN,
        ("data.transforms._target_=datasets.transforms.trian",),
        ("data.transforms._target_", "datasets.transforms.trian", "does not exist"),
    ),
    Case("size of 0", TRAIN, ("data.size=0",), ("data.size", "0")),
    Case("option with dashes", TRAIN, ("--trainer.epochs", "3"), ("--trainer.epochs: options have no dashes",)),
    Case("sweep that starts nothing", TRAIN, ("-m", "--cfg", "job"), ("-m starts a sweep", "Leave one")),
    Case("negative steps", TRAIN, ("trainer.max_steps=-1",), ("trainer.max_steps", "-1")),
    Case(
        "evaluate_every of 0",
        TRAIN,
        ("trainer.evaluate_every=0", "trainer.max_steps=null", "trainer.epochs=2"),
        ("trainer.evaluate_every", "0"),
    ),
    Case("unknown precision", TRAIN, ("trainer.precision=half",), ("trainer.precision", "bf16", "'half'")),
    Case("moving average that never moves", TRAIN, ("trainer.ema=1",), ("trainer.ema", "below 1")),
    Case("unknown part to freeze", TRAIN, ("trainer.freeze={bakbone:1}",), ("trainer.freeze", "bakbone", "backbone")),
    Case("part to freeze without an epoch", TRAIN, ("trainer.freeze=backbone",), ("trainer.freeze", "{backbone: 5}")),
    Case("part of a block that does not exist", TRAIN, ("trainer.freeze={encoder.x:1}",), ("freeze", "encoder.x")),
    Case("unknown metric to monitor", TRAIN, ("trainer.monitor=mAP",), ("trainer.monitor", "'mAP'", "AP50")),
    Case("more to accumulate than there is", TRAIN, ("trainer.accumulate=99",), ("trainer.accumulate=99", "2 batches")),
    Case("layer decay of 0", TRAIN, ("optimizer.layer_decay=0.0",), ("optimizer.layer_decay", "above 0", "got 0.0")),
    Case("weight decay of no part", TRAIN, ("optimizer.weight_decays={nrom:0.0}",), ("weight_decays", "'nrom'")),
    *(
        Case(f"{name}={value}", TRAIN, (f"trainer.{name}={value}",), (f"trainer.{name}", "at least", f"got {value}"))
        for name, value in (
            ("accumulate", "0"),
            ("evaluations", "0"),
            ("keep", "0"),
            ("limit_epoch_steps", "0"),
            ("limit_evaluation_images", "0"),
            ("max_skips", "-1"),
            ("overfit_batches", "0"),
            ("patience", "0"),
            ("save_every_minutes", "-1.0"),
            ("timeout", "0.0"),
        )
    ),
    Case("log_every of 0", TRAIN, ("log_every=0",), ("log_every", "0")),
    Case("negative learning rate", TRAIN, ("optimizer.lr=-1.0",), ("optimizer", "learning rate", "-1")),
    # Devices and folders
    Case("cuda where there is none", TRAIN, ("device=cuda",), ("device=cuda", "device=cpu"), needs_no_cuda=True),
    Case("unknown device", TRAIN, ("device=toaster",), ("device", "cuda", "'toaster'")),
    Case("device of another machine", PREDICT, ("device=xpu",), ("device", "xpu")),
    Case("run folder below a file", TRAIN, ("run_dir={tmp}/picture.jpg/run",), ("picture.jpg/run",)),
    Case("run folder is a file", PREDICT, ("run_dir={tmp}/picture.jpg",), ("picture.jpg",)),
    Case("output folder below a file", PREDICT, ("output={tmp}/picture.jpg/out",), ("picture.jpg/out",)),
    # Weights of the backbone
    Case(
        "unknown weights of the backbone",
        TRAIN,
        ("model.backbone.weights=IMAGENET9",),
        ("'IMAGENET9'", "IMAGENET1K_V1", "model.backbone:", "Correct weights"),
    ),
    Case(
        "weights of the backbone without network",
        TRAIN,
        ("model.backbone.weights=IMAGENET1K_V1",),
        ("could not download", "resnet18", "model.backbone:", "weights=PATH"),
        # Nothing listens there; and an empty folder in place of the cache.
        environment={"https_proxy": "http://127.0.0.1:9", "no_proxy": "", "TORCH_HOME": "{tmp}/cache"},
    ),
    Case(
        "file of the backbone missing",
        TRAIN,
        ("model.backbone.weights={tmp}/none.safetensors",),
        ("none.safetensors", "does not exist", "model.backbone.weights"),
    ),
    Case(
        "file of the backbone damaged",
        TRAIN,
        ("model.backbone.weights={tmp}/bad.pth",),
        ("model.backbone.weights", "bad.pth", "damaged"),
        write("bad.pth", bytes(range(256)) * 20),
    ),
    Case(
        "file of the backbone hostile",
        TRAIN,
        ("model.backbone.weights={tmp}/bad.pt",),
        ("bad.pt", "model.backbone.weights"),
        hostile_pickle(False),
    ),
    Case(
        "file of the backbone of another model",
        TRAIN,
        ("model.backbone.weights={tmp}/bad.pt",),
        ("bad.pt", "resnet18", "model/backbone"),
        lambda tmp: torch.save({"conv1.weight": torch.zeros(1)}, tmp / "bad.pt"),
    ),
    # Checkpoints
    Case("checkpoint missing", EVALUATE, ("checkpoint={tmp}/none.pt",), ("none.pt", "does not exist")),
    Case("checkpoint is a folder", EVALUATE, ("checkpoint={tmp}/data",), ("/data", "is a folder", "best.pt")),
    Case("checkpoint empty", EVALUATE, BAD, ("bad.pt", "damaged"), write("bad.pt")),
    Case(
        "checkpoint of random bytes",
        EVALUATE,
        BAD,
        ("bad.pt", "damaged"),
        write("bad.pt", np.random.default_rng(0).bytes(5000)),
    ),
    Case("checkpoint of text", EVALUATE, BAD, ("bad.pt", "damaged"), write("bad.pt", b"hello, world\n" * 50)),
    Case(
        "checkpoint truncated",
        PREDICT,
        BAD,
        ("bad.pt", "cut short"),
        lambda tmp: (tmp / "bad.pt").write_bytes((tmp / "valid.pt").read_bytes()[:-100_000]),
    ),
    Case(
        "checkpoint is a list", PREDICT, BAD, ("bad.pt", "list", "wanted"), lambda tmp: torch.save([1], tmp / "bad.pt")
    ),
    Case(
        "checkpoint of another program",
        PREDICT,
        BAD,
        ("bad.pt", "another program"),
        lambda tmp: torch.save({"model": {"a": torch.zeros(1)}}, tmp / "bad.pt"),
    ),
    Case(
        "checkpoint without configuration",
        PREDICT,
        BAD,
        ("bad.pt", "config"),
        checkpoint(lambda content, _: content.pop("config")),
    ),
    Case(
        "checkpoint without backbone in its configuration",
        PREDICT,
        BAD,
        ("bad.pt", "backbone"),
        checkpoint(lambda content, _: content["config"]["model"].pop("backbone")),
    ),
    Case(
        "checkpoint with other shapes",
        EVALUATE,
        BAD,
        ("bad.pt", "not of the model", "queries.position.weight", "[5, 16]", "[7, 16]"),
        checkpoint(lambda content, _: content["config"]["model"].update(num_queries=7)),
    ),
    Case(
        "checkpoint with numbers for tensors",
        EVALUATE,
        BAD,
        ("bad.pt", "model"),
        checkpoint(lambda content, _: content["model"].update({"queries.position.weight": 1})),
    ),
    Case("evaluate: hostile pickle", EVALUATE, BAD, REFUSED, hostile_pickle(False)),
    Case("predict: hostile pickle", PREDICT, BAD, REFUSED, hostile_pickle(False)),
    Case("predict: hostile pickle of another kind", PREDICT, BAD, REFUSED, hostile_pickle(True)),
    Case("weights: hostile pickle", TRAIN, ("weights={tmp}/bad.pt",), REFUSED, hostile_pickle(False)),
    Case("resume: hostile pickle", TRAIN, ("trainer.resume={tmp}/bad.pt",), REFUSED, hostile_pickle(False)),
    *(
        Case(
            f"hostile configuration: {node['_target_']}", PREDICT, BAD, (node["_target_"], *TARGET), hostile_model(node)
        )
        for node in HOSTILE_NODES
    ),
    Case(
        "hostile configuration, nested",
        EVALUATE,
        BAD,
        ("model.encoder.position", *TARGET),
        hostile_model({"_target_": "os.system", "command": "touch {tmp}/marker"}, "encoder", "position"),
    ),
    Case(
        "hostile configuration in a tuple",
        PREDICT,
        BAD,
        ("model.encoder.position", "refused"),
        hostile_model(
            {"_target_": "detr.models.layers.positions.SinePosition", "d_model": {"x": (LOG_FILE,)}},
            "encoder",
            "position",
        ),
    ),
    Case(
        "hostile configuration from a resolver",
        PREDICT,
        BAD,
        ("model.backbone.name", "refused"),
        hostile_model("${oc.create:{_target_:logging.FileHandler,filename:'{tmp}/marker'}}", "backbone", "name"),
    ),
    Case(
        "hostile configuration from a resolver, in a dict",
        PREDICT,
        BAD,
        ("model.encoder.position.d_model.x", "refused"),
        hostile_model(
            {"x": "${oc.create:{_target_:logging.FileHandler,filename:'{tmp}/marker'}}"},
            "encoder",
            "position",
            "d_model",
        ),
    ),
    Case(
        "hostile configuration of the data is not used",
        EVALUATE,
        BAD,
        (),
        checkpoint(
            lambda content, tmp: content["config"]["data"].update(prepare=in_folder(LOG_FILE, tmp), transforms=LOG_FILE)
        ),
        code=0,
    ),
    Case(
        "hostile configuration of the validation data",
        EVALUATE,
        BAD,
        ("data.val", *TARGET),
        checkpoint(
            lambda content, tmp: content["config"]["data"].update(
                val={"_target_": "datasets.shapes.generate", "root": str(tmp / "marker")}
            )
        ),
        without=("data",),
    ),
    Case(
        "checkpoint from before there were data formats",
        EVALUATE,
        BAD,
        ("AP50",),
        checkpoint(lambda content, _: content["config"]["data"]["val"].pop("_target_")),
        code=0,
        without=("data",),
    ),
    Case(
        "validation data by half",
        EVALUATE,
        (*BAD, "data.val.images={tmp}/data/val"),
        ("data.val", "annotations", "Set data.val.annotations"),
        checkpoint(lambda content, _: content["config"]["data"].pop("val")),
        without=("data",),
    ),
    Case("resume from a missing file", TRAIN, ("trainer.resume={tmp}/none.pt",), ("none.pt", "does not exist")),
    Case(
        "resume with parts that did not train",
        TRAIN,
        ("trainer.resume={tmp}/valid.pt",),
        ("The optimizer's state of 60 of", "starts anew", "has none of them: backbone."),
        code=0,
    ),
    Case(
        "resume of version 2 with other parameter groups",
        TRAIN,
        ("trainer.resume={tmp}/bad.pt",),
        ("bad.pt", "parameter groups", "weights=PATH"),
        checkpoint(
            lambda content, _: content["training"].update(
                optimizer={"state": {}, "param_groups": [{"name": "lr", "params": [0, 1]}]}
            )
        ),
    ),
    Case(
        "resume beside best.pt alone",
        TRAIN,
        ("trainer.resume=auto",),
        ("has best.pt, but no last.pt", "trainer.resume={tmp}/run/checkpoints/best.pt"),
        lambda tmp: (
            shutil.copytree(tmp, tmp / "run" / "checkpoints", ignore=lambda *_: ["data", "picture.jpg", "run"])
            and (tmp / "run" / "checkpoints" / "valid.pt").rename(tmp / "run" / "checkpoints" / "best.pt")
        ),
    ),
    *(
        Case(f"{script}: weights that are NaN", script, options, ("bad.pt", "NaN or infinite", "1 of"), not_finite)
        for script, options in (
            (EVALUATE, BAD),
            (PREDICT, BAD),
            (TRAIN, ("weights={tmp}/bad.pt",)),
            (TRAIN, ("trainer.resume={tmp}/bad.pt",)),
        )
    ),
    Case(
        "checkpoint with a flipped bit",
        PREDICT,
        BAD,
        ("bad.pt", "damaged", "checksum"),
        flip,
    ),
    Case(
        "checkpoint of absurd size",
        EVALUATE,
        BAD,
        ("bad.pt", "model", "tensors"),
        checkpoint(lambda content, _: content["config"]["model"]["encoder"].update(num_layers=10**6)),
    ),
    Case("checkpoint is a pipe", PREDICT, BAD, ("bad.pt", "pipe"), lambda tmp: os.mkfifo(tmp / "bad.pt")),
    Case(
        "resume from a pipe",
        TRAIN,
        ("trainer.resume={tmp}/bad.pt",),
        ("bad.pt", "pipe"),
        lambda tmp: os.mkfifo(tmp / "bad.pt"),
    ),
    Case(
        "resume with a model of another width",
        TRAIN,
        ("trainer.resume={tmp}/valid.pt", "model.encoder.d_model=32"),
        ("valid.pt", "not of the model", "model options"),
    ),
    Case(
        "resume without training state",
        TRAIN,
        ("trainer.resume={tmp}/bad.pt",),
        ("bad.pt", "training"),
        checkpoint(lambda content, _: content.pop("training")),
    ),
    Case("weights missing", TRAIN, ("weights={tmp}/none.pt",), ("none.pt", "does not exist")),
    Case(
        "weights of another width",
        TRAIN,
        ("weights={tmp}/valid.pt", "model.encoder.d_model=32"),
        ("valid.pt", "not of the model", "[48, 16], wanted [96, 32]", "model options"),
    ),
    # Prediction
    Case("source missing", PREDICT, ("source={tmp}/none.jpg",), ("source=", "none.jpg", "names no image")),
    Case(
        "source is an empty folder",
        PREDICT,
        ("source={tmp}/nothing",),
        ("source=", "nothing", "names no image"),
        lambda tmp: (tmp / "nothing").mkdir(),
    ),
    Case("source is no image", PREDICT, ("source={tmp}/valid.pt",), ("source=", "valid.pt", "names no image")),
    Case("source truncated", PREDICT, (), ("picture.jpg", "cannot be read"), lambda tmp: cut(tmp / "picture.jpg")),
    Case("source empty", PREDICT, (), ("picture.jpg", "cannot be read"), lambda tmp: empty(tmp / "picture.jpg")),
    Case(
        "pictures in the place of the photographs",
        PREDICT,
        ("output={tmp}",),
        ("{tmp}/picture.jpg exists already", "did not write it", "output=DIR"),
    ),
    Case(
        "pictures in the place of photographs beside",
        PREDICT,
        ("source={tmp}/picture.png", "output={tmp}"),
        ("{tmp}/picture.jpg exists already", "output=DIR"),
        lambda tmp: shutil.copy(tmp / "picture.jpg", tmp / "picture.png"),
    ),
    Case(
        "results.json of someone else",
        PREDICT,
        ("output={tmp}/data",),
        ("{tmp}/data/results.json exists already", "output=DIR"),
        write("data/results.json", b"[]"),
    ),
    Case(
        "attention in the place of a photograph",
        PREDICT,
        ("attention=true", "output={tmp}/data"),
        ("{tmp}/data/attention/picture.jpg exists already", "output=DIR"),
        lambda tmp: shutil.copytree(tmp, tmp / "data" / "attention", ignore=shutil.ignore_patterns("data", "*.pt")),
    ),
    Case("misspelt option of predict", PREDICT, ("treshold=0.5",), ("treshold", "Did you mean threshold?")),
    Case("threshold is no number", PREDICT, ("threshold=high",), ("threshold", "high")),
    Case(
        "attention of a point outside of the image",
        PREDICT,
        ("attention=true", "attention_point=[0.5,1.5]"),
        ("attention_point", "[0.5, 1.5]"),
    ),
    Case("attention of no point", PREDICT, ("attention=true", "attention_point=high"), ("attention_point",)),
    Case("misspelt option of evaluate", EVALUATE, ("data.rot=x",), ("data.rot", "Did you mean data.root?")),
    Case(
        "evaluate without data",
        EVALUATE,
        BAD,
        ("data.root", "data.val.annotations"),
        checkpoint(lambda content, _: content["config"]["data"].pop("val")),
        without=("data",),
    ),
]
# One of each command starts a process as a user does; the others would only wait for imports.
AS_PROCESS = (
    "image file empty, in a worker",
    "evaluate: hostile pickle",
)


def arguments(case: Case, tmp: Path) -> list[str]:
    replaced = {override.partition("=")[0] for override in case.overrides}
    base = [
        override
        for override in BASE[case.script]
        if override.partition("=")[0] not in replaced and not override.startswith(case.without or "\0")
    ]
    return [override.replace("{tmp}", str(tmp)) for override in (*base, *case.overrides)]


def make_template(folder: Path) -> Path:
    """Data, a picture and the checkpoint of one step, which every case gets a copy of."""
    generate(folder / "data", train_images=4, val_images=2, image_size=SIZE, max_objects=2)
    shutil.copy(folder / "data" / "val" / "000000.jpg", folder / "picture.jpg")
    frozen = "model.backbone.freeze=[stem,layer1,layer2,layer3,layer4]"  # a small optimizer state
    outcome = run(TRAIN, *arguments(Case("valid", TRAIN, (frozen,)), folder))
    assert outcome.code == 0, outcome.output
    (folder / "run" / "checkpoints" / "last.pt").rename(folder / "valid.pt")
    shutil.rmtree(folder / "run")
    return folder


def run_case(case: Case, template: Path, tmp: Path, start: Callable[..., Outcome] = run) -> Outcome:
    shutil.copytree(template, tmp, dirs_exist_ok=True, copy_function=_copy_or_link)
    if case.prepare is not None:
        case.prepare(tmp)
    environment = {key: value.replace("{tmp}", str(tmp)) for key, value in case.environment.items()}
    with mock.patch.dict(os.environ, environment):
        return start(case.script, *arguments(case, tmp))


def _copy_or_link(source: str, target: str) -> None:
    (os.symlink if source.endswith(".pt") else shutil.copy)(source, target)


def check(case: Case, outcome: Outcome, tmp: Path) -> None:
    assert not (tmp / "marker").exists(), "code from the input was run"
    assert "Traceback" not in outcome.output, outcome.output
    assert outcome.code == case.code, outcome.output
    words = [word.replace("{tmp}", str(tmp)) for word in case.words]
    missing = [word for word in words if word not in (outcome.output if case.code == 0 else outcome.message)]
    assert not missing, f"{missing} not in: {outcome.message}"
    assert "Error in call to target" not in outcome.message, "the message is wrapped in another one"
    assert "`False`" not in outcome.message, "the message advises to load the file unsafely"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answers_with_a_message(case: Case, template: Path, tmp_path: Path) -> None:
    if case.needs_no_cuda and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    check(case, run_case(case, template, tmp_path), tmp_path)


@pytest.mark.parametrize("name", AS_PROCESS)
def test_answers_as_a_process(name: str, template: Path, tmp_path: Path) -> None:
    [case] = [case for case in CASES if case.name == name]
    check(case, run_case(case, template, tmp_path, run_process), tmp_path)


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, PREDICT])
def test_valid_input_passes(script: str, template: Path, tmp_path: Path) -> None:
    outcome = run_case(Case("valid", script), template, tmp_path)
    assert outcome.code == 0, outcome.output


def table() -> Iterator[str]:
    """All cases as rows of a markdown table; those that fail their checks are marked."""
    yield "| case | command | message | exit code |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        template = make_template(Path(folder) / "template")
        for number, case in enumerate(CASES):
            if case.needs_no_cuda and torch.cuda.is_available():
                continue
            tmp = Path(folder) / str(number)
            outcome = run_case(case, template, tmp)
            name = case.name
            try:
                check(case, outcome, tmp)
            except AssertionError:
                name = f"FAILED {name}"
            message = outcome.message.replace(f"{tmp}/", "").replace(str(REPOSITORY), ".").replace("|", "\\|")
            command = " ".join((case.script, *case.overrides)).replace("{tmp}/", "")
            yield f"| {name} | `{command}` | {message} | {outcome.code} |"
            shutil.rmtree(tmp)


if __name__ == "__main__":
    for row in table():
        print(row, flush=True)
