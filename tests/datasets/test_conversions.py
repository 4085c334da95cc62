"""Data sets in the formats of labelling tools: the same records as in COCO's form, and the same commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from datasets.formats import Annotations
from datasets.formats.coco import read_coco
from detr.config import build, compose
from detr.evaluation import evaluate_coco
from tests.helpers import exports
from tests.helpers.commands import TINY_MODEL, figures, run

FORMATS = sorted(exports.WRITERS)
# What rounding in floating point may change, in pixels.
EXACT = {"csv": 1e-9, "cvat": 1e-9, "voc": 1e-9, "yolo": 1e-9, "roboflow": 0.0}


def read(name: str, root: Path, part: str) -> Annotations:
    config = compose(exports.options(name, root))
    return build(config.data[part], path=f"data.{part}")


def assert_same(found: Annotations, wanted: Annotations, tolerance: float, crowds: bool) -> None:
    """Images by the ends of their names, objects in their order, classes by name."""
    names = [[category.name for category in one.categories] for one in (found, wanted)]
    same = {record.file_name: record for record in wanted.records}
    assert len(found.records) == len(wanted.records) == len(same)
    for record in found.records:
        other = same[record.file_name.removeprefix("train ").removeprefix("val ")]
        assert record.size == other.size
        assert [names[0][label] for label in record.labels] == [names[1][label] for label in other.labels]
        np.testing.assert_allclose(record.boxes, other.boxes, rtol=0, atol=tolerance)
        np.testing.assert_allclose(record.areas, other.boxes[:, 2:].prod(1), rtol=1e-9)
        assert not crowds or record.crowds.tolist() == other.crowds.tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_blood_cells_are_the_same_in_all_formats(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "bccd"
    exports.write(name, source, tmp_path)
    for part in exports.PARTS:
        wanted = read_coco(images=source / "images" / part, annotations=source / f"instances_{part}.json")
        found = read(name, tmp_path, part)
        assert_same(found, wanted, EXACT[name], crowds=True)
        classes = [category.name for category in found.categories]
        assert classes == (["Platelets", "RBC", "WBC"] if name in ("voc", "csv") else ["RBC", "WBC", "Platelets"])
        assert [category.id for category in found.categories] == [1, 2, 3]


@pytest.mark.parametrize("name", FORMATS)
def test_photographs_with_crowds_and_without_objects(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "coco_sample"
    exports.write(name, source, tmp_path)
    wanted = read_coco(images=source / "images" / "train", annotations=source / "instances_train.json")
    assert any(not len(record.labels) for record in wanted.records) and any(r.crowds.any() for r in wanted.records)
    if name == "roboflow":
        return  # the file is COCO's own, areas of masks included
    assert_same(read(name, tmp_path, "train"), wanted, EXACT[name], crowds=name == "voc")


QUICK = (*TINY_MODEL, "data.size=48", "data.max_size=64", "data.transforms.sizes=[40,48]", "data.batch_size=4")
ON_CPU = ("data.workers=0", "device=cpu")
PER_CLASS = {"circle", "square", "triangle"}


def train(name: str, shapes_root: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """The options of a data set under an odd name, and the folder of a training with it."""
    root = tmp_path / "my Fotos \u00e4"
    exports.write(name, shapes_root, root, images="{}")
    own = ['{}="{}"'.format(*option.split("=")) for option in exports.options(name, root)]
    done = run("train.py", *own, *QUICK, *ON_CPU, "trainer.max_steps=2", f"run_dir={tmp_path / 'run'}")
    sizes = ("Training: 24 images", "Evaluation: 7 images")
    assert done.code == 0 and all(size in done.output for size in sizes), done.output
    return own, tmp_path / "run"


@pytest.mark.parametrize("name", FORMATS)
def test_a_data_set_trains_as_it_is(name: str, shapes_root: Path, tmp_path: Path) -> None:
    _, folder = train(name, shapes_root, tmp_path)
    assert figures(folder)["per_class"].keys() == PER_CLASS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "voc" else pytest.mark.slow) for name in FORMATS]
)
def test_evaluation_and_conversion_give_the_same_figures(name: str, shapes_root: Path, tmp_path: Path) -> None:
    own, folder = train(name, shapes_root, tmp_path)

    def evaluated(name: str, *options: str) -> dict[str, dict[str, float]]:
        best = f"checkpoint={folder / 'checkpoints' / 'best.pt'}"
        done = run("evaluate.py", best, *options, *ON_CPU, "data.batch_size=4", f"run_dir={tmp_path / name}")
        assert done.code == 0, done.output
        return figures(tmp_path / name)

    assert evaluated("stored") == evaluated("given", *own) == figures(folder)
    coco = [f"data.val.images={shapes_root / 'val'}", f"data.val.annotations={shapes_root / 'instances_val.json'}"]
    if name in ("yolo", "cvat", "roboflow"):  # in the others the classes have another order, and COCO's ids are fixed
        assert evaluated("coco", "data=custom", *coco) == figures(folder)
    done = run("tools/convert_data.py", *own, f"output={tmp_path / 'coco'}")
    assert done.code == 0, done.output
    found = json.loads((tmp_path / "given" / "evaluation" / "detections.json").read_text())
    judged = evaluate_coco(tmp_path / "coco" / "instances_val.json", found, backend="pycocotools")
    assert judged == pytest.approx(figures(folder)["bbox"], abs=1e-9)


def test_conversion_writes_what_pycocotools_reads(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "coco_sample"
    exports.write("voc", source, tmp_path / "set")
    data = ("data=voc", f"data.root={tmp_path / 'set'}", "data.val.part=train")  # the other one has more classes
    command = ("tools/convert_data.py", *data, f"output={tmp_path / 'coco'}")
    done = run(*command)
    assert done.code == 0 and f"Images are in {tmp_path / 'set' / 'JPEGImages'}" in done.output, done.output
    for part in exports.PARTS:
        wanted = COCO(source / "instances_train.json")
        found = COCO(tmp_path / "coco" / f"instances_{part}.json")
        names = {row["file_name"].removeprefix("train "): key for key, row in found.imgs.items()}
        assert len(names) == len(wanted.imgs)
        for key, row in wanted.imgs.items():
            image = found.imgs[names[row["file_name"]]]
            assert (image["width"], image["height"]) == (row["width"], row["height"])
            objects = [
                sorted(
                    (coco.cats[one["category_id"]]["name"], *np.round(one["bbox"], 6), one["iscrowd"]) for one in rows
                )
                for coco, rows in ((wanted, wanted.imgToAnns[key]), (found, found.imgToAnns[image["id"]]))
            ]
            assert objects[0] == objects[1]
    written = (tmp_path / "coco" / "instances_val.json").read_bytes()
    done = run(*command)
    assert done.code == 2 and "overwrite=true" in done.message
    assert run(*command, "overwrite=true").code == 0
    (tmp_path / "coco" / "instances_val.json").write_bytes(written + b" ")
    done = run(*command, "overwrite=true")
    assert done.code == 2 and "this command did not write it, or it was changed" in done.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data=yolo"], "The option data.root has no value. Set data.root=..."),
        (["data=yolo", "data.root=x"], "The option output has no value. Set output=..."),
        (["data=yolo", "data.root=x", "output={tmp}"], "x does not exist. Set data.root to the folder that holds data.yaml"),
        (["data=csv", "data.split=2", "output={tmp}"], "data.train.images has no value"),
        (["data=yolo", "data.root=x", "data.split=2", "output={tmp}"], "data.split: wanted at least 0.01 and at most 0.99"),
        (["data=yolo", "data.rot=x", "output={tmp}"], "There is no option data.rot. Did you mean data.root?"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_conversion_is_named(options: list[str], message: str, tmp_path: Path) -> None:
    done = run("tools/convert_data.py", *(option.replace("{tmp}", str(tmp_path)) for option in options))
    assert done.code == 2 and message in done.message and "Traceback" not in done.output, done.output
    assert not list(tmp_path.iterdir())


def test_masks_are_converted_where_they_are_asked_for(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "coco_sample"
    parts = [
        f"data.{part}.{name}={path}"
        for part in exports.PARTS
        for name, path in (("images", source / "images" / part), ("annotations", source / f"instances_{part}.json"))
    ]
    done = run("tools/convert_data.py", "data=custom", *parts, "masks=true", f"output={tmp_path}")
    assert done.code == 0, done.output
    for part in exports.PARTS:
        wanted, found = COCO(source / f"instances_{part}.json"), COCO(tmp_path / f"instances_{part}.json")
        for image in wanted.imgs:
            for row, other in zip(wanted.imgToAnns[image], found.imgToAnns[image], strict=True):
                assert np.array_equal(wanted.annToMask(row), found.annToMask(other))
    done = run("tools/convert_data.py", "data=custom", *parts, "overwrite=true", f"output={tmp_path}")
    assert done.code == 0, done.output
    rows = json.loads((tmp_path / "instances_val.json").read_text())["annotations"]
    assert rows and not any("segmentation" in row for row in rows)
