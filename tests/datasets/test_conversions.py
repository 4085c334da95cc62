"""Data sets in the formats of labelling tools: the same records as in COCO's form, and the same commands."""

import json
from pathlib import Path

import numpy as np
import pytest

from datasets.formats import Annotations
from datasets.formats.coco import read_coco
from detr.config import build, compose
from detr.evaluation import evaluate_coco
from tests.helpers import exports
from tests.helpers.commands import TINY_MODEL, run

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


@pytest.mark.parametrize("name", FORMATS)
def test_a_data_set_trains_and_evaluates_as_it_is(name: str, shapes_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "my Fotos \u00e4"
    exports.write(name, shapes_root, root, images="{}")
    own = [f'{option.partition("=")[0]}="{option.partition("=")[2]}"' for option in exports.options(name, root)]
    done = run("train.py", *own, *QUICK, *ON_CPU, "trainer.max_steps=2", f"run_dir={tmp_path / 'run'}")
    assert done.code == 0 and "Training: 24 images" in done.output and "Evaluation: 7 images" in done.output, (
        done.output
    )
    best = f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'best.pt'}"

    def metrics(folder: str, *options: str) -> dict[str, dict[str, float]]:
        done = run("evaluate.py", best, *options, *ON_CPU, "data.batch_size=4", f"run_dir={tmp_path / folder}")
        assert done.code == 0, done.output
        return json.loads((tmp_path / folder / "evaluation" / "metrics.json").read_text())

    trained = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert trained["per_class"].keys() == {"circle", "square", "triangle"}
    assert metrics("stored") == metrics("given", *own) == trained
    found = json.loads((tmp_path / "given" / "evaluation" / "detections.json").read_text())
    done = run("tools/convert_data.py", *own, f"output={tmp_path / 'coco'}")
    assert done.code == 0, done.output
    judged = evaluate_coco(tmp_path / "coco" / "instances_val.json", found, backend="pycocotools")
    assert judged == pytest.approx(trained["bbox"], abs=1e-9)
