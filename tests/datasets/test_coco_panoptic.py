"""COCO's panoptic format: a generated set read back, and files that do not fit."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets import DetectionDataset
from datasets.formats.coco_panoptic import read_coco_panoptic, read_masks, read_segments
from detr.errors import UserError
from detr.segments import colors_of_ids
from detr.types import Category

SIZES = [(37, 53), (41, 29), (31, 31)]


def generate(root: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Three images, with 3, 2 and no segments; the content of the JSON file, and the maps of ids."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "pngs").mkdir()
    images, rows, maps = [], [], []
    for number, (height, width) in enumerate(SIZES):
        ids = np.zeros((height, width), np.int64)
        infos = []
        for place in range((3, 2, 0)[number]):
            key = int(rng.integers(1, 256**3))
            top, left, rows_, columns = 9 * place, 5 * place, 8, 13 + place
            ids[top : top + rows_, left : left + columns] = key
            box = [left, top, columns, rows_]
            category = (18, 200, 18)[place]
            area = rows_ * columns
            infos.append({"id": key, "category_id": category, "iscrowd": int(place == 2), "bbox": box, "area": area})
        name = f"{number:012}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / "images" / f"{name}.jpg")
        Image.fromarray(colors_of_ids(ids)).save(root / "pngs" / f"{name}.png")
        images.append({"id": number + 5, "file_name": f"{name}.jpg", "height": height, "width": width})
        rows.append({"image_id": number + 5, "file_name": f"{name}.png", "segments_info": infos})
        maps.append(ids)
    categories = [{"id": 200, "name": "sky", "isthing": 0}, {"id": 18, "name": "dog", "isthing": 1}]
    content = {"images": images, "annotations": rows[::-1], "categories": categories}
    (root / "panoptic.json").write_text(json.dumps(content))
    return content, maps


def options(root: Path) -> dict[str, Any]:
    paths = {"images": root / "images", "annotations": root / "panoptic.json", "segments": root / "pngs"}
    return {**paths, "masks": True}


def test_segments_are_objects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content, maps = generate(tmp_path)
    read = read_coco_panoptic(**options(tmp_path))
    assert read.categories == [Category(18, "dog"), Category(200, "sky", is_thing=False)]
    assert [record.id for record in read.records] == [5, 6, 7] and read.segments == tmp_path / "pngs"
    for record, entry, ids in zip(read.records, content["annotations"][::-1], maps, strict=True):
        infos = entry["segments_info"]
        assert record.segments.tolist() == [info["id"] for info in infos]
        assert record.boxes.tolist() == [info["bbox"] for info in infos]
        assert record.labels.tolist() == [int(info["category_id"] == 200) for info in infos]
        assert record.crowds.tolist() == [bool(info["iscrowd"]) for info in infos]
        assert (read_segments(tmp_path / "pngs" / entry["file_name"]) == ids).all()
        masks = read_masks(record, read.segments)
        assert masks.shape == (len(infos), *record.size)
        for mask, info in zip(masks, infos, strict=True):
            assert (mask == (ids == info["id"])).all() and mask.sum() == info["area"]
            rows, columns = mask.nonzero()
            left, top, width, height = info["bbox"]
            assert (columns.min(), rows.min()) == (left, top)
            assert (columns.max() + 1, rows.max() + 1) == (left + width, top + height)
    assert not caplog.text


def test_the_data_set_keeps_the_segments_of_its_objects(tmp_path: Path) -> None:
    generate(tmp_path)
    read = read_coco_panoptic(**options(tmp_path))
    dataset = DetectionDataset(read)
    for one, other in zip(dataset.records, read.records, strict=True):
        assert one.segments.tolist() == other.segments.tolist() and one.segments.dtype == np.int64
    assert len(dataset[0][1]) == 2  # without the crowd


def test_pngs_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    generate(tmp_path)
    (tmp_path / "pngs" / "000000000001.png").unlink()
    read = read_coco_panoptic(**options(tmp_path))
    with pytest.raises(UserError, match=r"000000000001\.png"):
        read_masks(read.records[1], read.segments)
    assert len(read_masks(read.records[0], read.segments)) == 3


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def changed(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return changed


FIRST = ("annotations", 2, "segments_info", 0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            change("annotations", 0, to={"id": 3, "image_id": 5, "bbox": [1, 1, 2, 2]}),
            "no list 'segments_info'. Wanted a file such as",
        ),
        (change("annotations", 0, to=3), "entry 0 of 'annotations' has no list 'segments_info'"),
        (change("annotations", 0, "image_id", to=9), "entry 0 of 'annotations' belongs to image 9, which"),
        (change("annotations", 0, "image_id", to=None), "entry 0 of 'annotations' belongs to image None, which"),
        (change("annotations", 0, "image_id", to=6), "image 6 has several entries|are in '000000000002.png'"),
        (
            change("annotations", 2, "file_name", to="b.png"),
            r"image 5, '000000000000\.jpg', are in 'b\.png', wanted '000000000000\.png'",
        ),
        (change("annotations", to=[]), "image 5 has no entry in 'annotations'"),
        (
            change("categories", 0, to={"id": 200, "name": "sky"}),
            "the category 'sky' has isthing None, wanted 1 for things",
        ),
        (change("categories", 0, "isthing", to="yes"), "the category 'sky' has isthing 'yes'"),
        (change(*FIRST, "id", to=0), "a segment of image 5 is .* wanted an object with an id from 1 to 16777215"),
        (change(*FIRST, "id", to=256**3), "a segment of image 5 is"),
        (change(*FIRST, to=[1]), r"a segment of image 5 is \[1\]"),
        (
            change(*FIRST, "category_id", to=3),
            r"annotation \d+ of image 5 has the category 3, which is not among the 2",
        ),
        (change(*FIRST, "bbox", to=[1, 2]), r"annotation \d+ of image 5 has the bbox \[1, 2\]"),
        (
            lambda content: content["annotations"][2]["segments_info"].append(
                content["annotations"][2]["segments_info"][0]
            ),
            r"the id \d+ of image 5 occurs twice",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, spoil: Callable[[Any], None], words: str) -> None:
    content, _ = generate(tmp_path)
    spoilt = copy.deepcopy(content)
    spoil(spoilt)
    (tmp_path / "panoptic.json").write_text(json.dumps(spoilt))
    with pytest.raises(UserError, match=words):
        read_coco_panoptic(**options(tmp_path))


def test_pngs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, maps = generate(tmp_path)
    read = read_coco_panoptic(**options(tmp_path))
    with pytest.raises(UserError, match=r"the folder of its PNGs, .*none, does not exist\. Unpack them"):
        read_coco_panoptic(**{**options(tmp_path), "segments": tmp_path / "none"})
    file = read.segments / "000000000000.png"
    Image.fromarray(colors_of_ids(maps[0][:, :-1])).save(file)
    with pytest.raises(UserError, match=r"000000000000\.png has the height and width \(37, 52\), wanted .* \(37, 53\)"):
        read_masks(read.records[0], read.segments)
    Image.fromarray(colors_of_ids(np.where(maps[0] == read.records[0].segments[1], 0, maps[0]))).save(file)
    with pytest.raises(
        UserError, match=f"no pixel of 1 of the 3 segments of image 5, such as {read.records[0].segments[1]}"
    ):
        read_masks(read.records[0], read.segments)
