"""Masks from the command line: training, evaluation, prediction."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

from detr import Detector
from detr.segments import colors_of_ids, ids_of_colors
from tests.helpers.commands import figures, predict, run, save_untrained

HEADS = ("detr", "dot_product")


@pytest.mark.parametrize("head", HEADS)
def test_masks_are_learned_evaluated_and_predicted(
    head: str, tiny_options: list[str], shapes_root: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "run"
    wide = ("model.encoder.d_model=128",)  # enough for the head of DETR
    done = run(
        "train.py", *tiny_options, *wide, f"model/masks={head}", "trainer.max_steps=2", f"run_dir={trained}",
        "trainer.monitor=mask_AP",
    )  # fmt: skip
    assert done.code == 0, done.output
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_mask", "loss_dice"} <= lines[0].keys()
    assert lines[-1]["group"] == "val" and "mask_AP50" in lines[-1]

    best, evaluated = trained / "checkpoints" / "best.pt", tmp_path / "evaluated"
    options = (f"checkpoint={best}", "device=cpu", f"run_dir={evaluated}", "data.workers=0")
    assert run("evaluate.py", *options).code == 0
    assert figures(evaluated) == figures(trained)
    assert set(figures(evaluated)["segm"]) == set(figures(evaluated)["bbox"])
    again = tmp_path / "again"
    found = evaluated / "evaluation" / "detections.json"
    data = ("data=shapes", f"data.root={shapes_root}", "data.prepare=null")
    assert run("evaluate.py", f"results={found}", *data, f"run_dir={again}").code == 0
    assert figures(again)["segm"] == pytest.approx(figures(evaluated)["segm"])

    output = tmp_path / "found"
    assert predict(best, shapes_root / "val", output).code == 0
    rows = json.loads((output / "results.json").read_text())
    pixels = [pycocotools.mask.decode(row["segmentation"]) for row in rows]
    assert pixels and all(mask.shape == (48, 48) for mask in pixels)
    photograph = shapes_root / "val" / rows[0]["file_name"]
    (detections,) = Detector.from_checkpoint(best).predict(photograph, threshold=0.0)
    own = [mask for mask, row in zip(pixels, rows, strict=True) if row["file_name"] == rows[0]["file_name"]]
    assert detections.masks is not None
    assert np.array_equal(np.stack(own).astype(bool), detections.masks.decode().numpy())
    detections.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())[0]["segmentation"] == detections.masks.rows()[0]


def panoptic_of(shapes_root: Path, root: Path) -> Path:
    """The shapes as things before a ground, which is stuff, in COCO's panoptic format."""
    for split in ("train", "val"):
        content = json.loads((shapes_root / f"instances_{split}.json").read_text())
        folder = root / "annotations" / f"panoptic_{split}2017"
        folder.mkdir(parents=True)
        rows = []
        for image in content["images"]:
            ids = np.full((48, 48), 9)
            infos = []
            own = [row for row in content["annotations"] if row["image_id"] == image["id"]]
            for key, row in enumerate(own, start=70_000):
                ids[pycocotools.mask.decode(row["segmentation"]).astype(bool)] = key
                infos.append({"id": key, **{n: row[n] for n in ("category_id", "bbox", "area", "iscrowd")}})
            area = int((ids == 9).sum())
            infos.append({"id": 9, "category_id": 4, "bbox": [0, 0, 48, 48], "area": area, "iscrowd": 0})
            name = Path(image["file_name"]).with_suffix(".png").name
            Image.fromarray(colors_of_ids(ids)).save(folder / name)
            rows.append({"image_id": image["id"], "file_name": name, "segments_info": infos})
        categories = [{**row, "isthing": 1} for row in content["categories"]]
        categories.append({"id": 4, "name": "ground", "isthing": 0})
        path = root / "annotations" / f"panoptic_{split}2017.json"
        path.write_text(json.dumps({"images": content["images"], "annotations": rows, "categories": categories}))
        (root / f"{split}2017").symlink_to(shapes_root / split)
    return root


@pytest.mark.parametrize("model", ["detr", "conditional_detr"])  # softmax and sigmoid scores
def test_panoptic_data_give_segments(model: str, tiny_options: list[str], shapes_root: Path, tmp_path: Path) -> None:
    root, trained, evaluated = panoptic_of(shapes_root, tmp_path / "set"), tmp_path / "run", tmp_path / "evaluated"
    least = "panoptic_threshold=0.01"
    done = run(
        "train.py", *tiny_options, f"model={model}", "data=coco_panoptic", f"data.root={root}",
        "model/masks=dot_product", "trainer.max_steps=2", "trainer.monitor=PQ", f"evaluation.{least}",
        f"run_dir={trained}",
    )  # fmt: skip
    assert done.code == 0, done.output
    best = trained / "checkpoints" / "best.pt"
    options = (f"checkpoint={best}", "device=cpu", f"run_dir={evaluated}", "data.workers=0", f"evaluation.{least}")
    done = run("evaluate.py", *options)
    assert done.code == 0 and "Panoptic: PQ" in done.output
    assert figures(evaluated) == figures(trained)
    found = figures(evaluated)["panoptic"]
    assert set(found["per_class"]) == {"circle", "square", "triangle", "ground"} and "PQ_st" in found

    output = tmp_path / "found"
    assert predict(best, shapes_root / "val", output, "formats=[json,panoptic]", least).code == 0
    content = json.loads((output / "panoptic.json").read_text())
    assert [row["isthing"] for row in content["categories"]] == [1, 1, 1, 0]
    assert len(content["annotations"]) == 7
    (first,) = Detector.from_checkpoint(best).panoptic(shapes_root / "val" / "000000.jpg", threshold=0.01)
    for row in content["annotations"]:
        ids = ids_of_colors(np.array(Image.open(output / "panoptic" / row["file_name"])))
        listed = {info["id"]: info["area"] for info in row["segments_info"]}
        assert {key: int((ids == key).sum()) for key in np.unique(ids) if key} == listed
        if row["image"] == "000000.jpg":
            assert len(first.segments) == len(listed)
            pairs = set(zip(first.ids.ravel().tolist(), ids.ravel().tolist(), strict=True))
            assert len(pairs) == len(dict(pairs)) == len({key for _, key in pairs}), "one number for each segment"


def test_segments_need_a_model_with_masks(tiny_options: list[str], shapes_root: Path, tmp_path: Path) -> None:
    path = save_untrained(tmp_path / "boxes.pt", tiny_options, ["circle", "square", "triangle"])
    done = predict(path, shapes_root / "val", tmp_path / "found", "formats=[panoptic]")
    assert done.code == 2 and "panoptic needs a model with masks" in done.message


def test_a_head_of_masks_starts_on_a_detector(tiny_options: list[str], tmp_path: Path) -> None:
    detector, masks = tmp_path / "detector", tmp_path / "masks"
    assert run("train.py", *tiny_options, "trainer.max_steps=1", f"run_dir={detector}").code == 0
    last = detector / "checkpoints" / "last.pt"
    frozen = "trainer.freeze={backbone:null,neck:null,encoder:null,queries:null,decoder:null,heads:null}"
    options = (f"weights={last}", frozen, "model/masks=dot_product", "trainer.max_steps=2", f"run_dir={masks}")
    done = run("train.py", *tiny_options, *options)
    assert done.code == 0, done.output
    before, after = (
        torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"] for folder in (detector, masks)
    )
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(name.startswith("mask_head.") for name in after)


def test_data_without_masks_are_refused_before_the_training(
    tiny_options: list[str], shapes_root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "instances.json"
    content = json.loads((shapes_root / "instances_train.json").read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    path.write_text(json.dumps(content))
    options = ("model/masks=dot_product", f"data.train.annotations={path}", f"run_dir={tmp_path / 'run'}")
    done = run("train.py", *tiny_options, *options)
    assert done.code == 2
    assert "has a mask, which model.masks is to learn" in done.message


def test_a_format_without_masks_is_named(tmp_path: Path) -> None:
    paths = (f"data.train.images={tmp_path}", f"data.train.annotations={tmp_path / 'boxes.csv'}")
    done = run("train.py", "model=small", "model/masks=dot_product", "data=csv", "data.split=0.5", *paths)
    assert done.code == 2
    assert done.message.startswith("data.train: datasets.formats.csv.read_csv reads no masks, which model.masks is to")
