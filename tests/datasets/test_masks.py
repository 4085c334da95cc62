"""Masks of data sets, judged by pycocotools, and by pixels that were painted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from datasets import DetectionDataset, TrainLoader, transforms
from datasets.formats.base import Annotations, ImageRecord
from datasets.formats.coco import read_coco
from datasets.mixing import Chain, CopyBlend, Mixing, Mixup, Mosaic, Sample
from datasets.records import Records
from datasets.schedule import Transforms
from datasets.shapes import generate
from detr.boxes import cxcywh_to_xyxy
from detr.errors import UserError
from detr.masks import Masks
from detr.types import Category, Target
from tests.helpers.commands import run

SIZE = (60, 90)  # of painted images


@pytest.mark.parametrize("part", ["train", "val"])
def test_masks_of_photographs_are_those_of_pycocotools(
    shared: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "data" / "coco_sample"
    path = folder / f"instances_{part}.json"
    coco = pycocotools.coco.COCO(path)
    capsys.readouterr()
    annotations = read_coco(images=folder / "images" / part, annotations=path, masks=True)
    crowds = 0
    for record in Records(annotations.records):
        rows = coco.loadAnns(coco.getAnnIds(record.id))
        assert record.masks is not None and len(record.masks) == len(rows)
        for row, mask in zip(rows, record.masks.decode(), strict=True):
            assert np.array_equal(mask.numpy(), coco.annToMask(row).astype(bool))
            crowds += row["iscrowd"]
    assert crowds > 0 or part == "val"


def coco_file(folder: Path, *segmentations: Any, size: tuple[int, int] = (20, 30)) -> Path:
    """One image with an object of each segmentation."""
    height, width = size
    rows = [
        {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "bbox": [2.0, 2.0, 9.0, 9.0],
            "area": 50.0,
            "iscrowd": 0,
            **({} if one is None else {"segmentation": one}),
        }
        for number, one in enumerate(segmentations, start=1)
    ]
    Image.new("RGB", (width, height)).save(folder / "a.png")
    path = folder / "instances.json"
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "annotations": rows,
        "categories": [{"id": 1, "name": "thing"}],
    }
    path.write_text(json.dumps(content))
    return path


def read(path: Path) -> ImageRecord:
    return read_coco(images=path.parent, annotations=path, masks=True).records[0]


SQUARE = [[2.0, 3.0, 12.0, 3.0, 12.0, 9.0, 2.0, 9.0]]
RUNS = [43, 5, 552]


def test_all_forms_of_masks_are_read(tmp_path: Path) -> None:
    compressed = pycocotools.mask.frPyObjects({"size": [20, 30], "counts": RUNS}, 20, 30)["counts"].decode()
    record = read(
        coco_file(tmp_path, SQUARE, {"size": [20, 30], "counts": RUNS}, {"size": [20, 30], "counts": compressed})
    )
    assert record.masks is not None
    square, runs, text = record.masks.decode()
    assert square.sum() == 60 and bool(square[3:9, 2:12].all())
    assert torch.equal(runs, text) and runs.sum() == 5 and bool(runs[3:8, 2].all())


def test_masks_that_are_none_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few, empty = [[1.0, 2.0, 3.0, 4.0]], {"size": [20, 30], "counts": [600]}
    record = read(coco_file(tmp_path, few, SQUARE, None, [], [*few, *SQUARE], empty))
    assert record.masks is not None and len(record.masks) == len(record.boxes) == 2
    assert "2 polygons of fewer than three points, which are left out" in caplog.text
    assert "2 objects without a mask, which are left out" in caplog.text
    assert "2 objects whose masks have no pixel, which are left out" in caplog.text


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], "wanted polygons of at least three points"),
        ([[1.0, 2.0, 3.0, 4.0, "x", 6.0]], r"wanted polygons in pixels of the image 30 x 20, got \[1.0"),
        ([[1.0, 2.0, 3.0, 4.0, float("nan"), 6.0]], "wanted polygons in pixels"),
        ([[1.0, 2.0, 3.0, 4.0, 1e30, 6.0]], "wanted polygons in pixels of the image 30 x 20"),
        ([[1.0, 2.0, 3.0, 4.0, 10**400, "x"]], "wanted polygons in pixels of the image 30 x 20"),
        ("mask.png", "wanted polygons or a run-length encoding, got 'mask.png'"),
        ({"size": [30, 20], "counts": RUNS}, r"wanted the size \[20, 30\] of the image, got \[30, 20\]"),
        ({"size": [20, 30], "counts": [1, 2]}, "wanted counts of 600 pixels, got damaged ones"),
        ({"size": [20, 30], "counts": [700, -100]}, "wanted counts of 600 pixels"),
        ({"size": [20, 30], "counts": "\N{DEGREE SIGN}1"}, "wanted counts as a list or as text"),
        ({"size": [20, 30], "counts": "oooooooooooooo"}, "wanted compressed counts"),
        ({"size": [20, 30]}, "wanted counts as a list or as text, got None"),
    ],
)
def test_damaged_masks_are_named(tmp_path: Path, segmentation: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"instances\.json: annotation 1 has a damaged segmentation: {message}"):
        read(coco_file(tmp_path, segmentation))


def test_any_damage_of_an_encoding_is_seen(tmp_path: Path) -> None:
    """Random texts are either refused, or what pycocotools makes of them has all pixels."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(chr(48 + number) for number in rng.integers(0, 64, rng.integers(1, 9)))
        try:
            record = read(coco_file(tmp_path, SQUARE, {"size": [20, 30], "counts": text}))
        except UserError:
            continue
        assert record.masks is not None and record.masks.decode().shape[1:] == (20, 30)


def test_data_without_any_mask_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not one of its 2 objects has a mask, which model.masks is to learn"):
        read(coco_file(tmp_path, None, None))


def painted(folder: Path, count: int = 6) -> Annotations:
    """Images of up to three rectangles, a red, a green and a blue one."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        pixels = np.zeros((*SIZE, 3), dtype=np.uint8)
        objects = int(rng.integers(1, 4))
        masks = torch.zeros((objects, *SIZE), dtype=torch.bool)
        corners = []
        for index in range(objects):
            left, top = int(rng.integers(0, 60)), int(rng.integers(0, 35))
            right, bottom = left + int(rng.integers(15, 30)), top + int(rng.integers(15, 25))
            pixels[top:bottom, left:right] = 240 * np.eye(3)[index]
            masks[:index, top:bottom, left:right] = False
            masks[index, top:bottom, left:right] = True
            corners.append((left, top, right, bottom))
        Image.fromarray(pixels).save(folder / f"{number}.png")
        record = ImageRecord.of(f"{number}.png", corners, list(range(objects)), id=number, size=SIZE)
        records.append(ImageRecord(**{**vars(record), "masks": Masks.encode(masks)}))
    categories = [Category(id=number, name=str(number)) for number in range(3)]
    return Annotations(source=folder, images=folder, categories=categories, records=records)


def agreement(image: torch.Tensor, target: Target) -> float:
    """IoU of what has the color of an object and of what masks say; the smallest of all objects."""
    assert target.masks is not None and target.masks.shape == (len(target), *image.shape[1:])
    overlaps = [1.0]
    for label in target.labels.unique().tolist():
        mask = target.masks[target.labels == label].any(0)
        color = image[label] > 120
        if mask.sum() > 200:  # of small rests the edges are most
            overlaps.append(float((mask & color).sum() / (mask | color).sum()))
    return min(overlaps)


RECIPES: dict[str, Transforms | None] = {
    "none": None,
    "resize": transforms.evaluation(size=70, max_size=200),
    "square": transforms.evaluation(size=64, max_size=64, square=True),
    "DETR's": transforms.train(sizes=[50, 70], max_size=200, crop_from=[60, 80], crop_min=40, crop_max=60),
    "SSD's": transforms.train(
        sizes=[60], max_size=120, crop=False, zoom_out=1.0, fill=3, iou_crop=1.0, vertical_flip=0.5
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_masks_follow_transforms(tmp_path: Path, name: str) -> None:
    dataset = DetectionDataset(painted(tmp_path), RECIPES[name])
    for epoch in range(8):
        for index in range(len(dataset)):
            image, target = dataset[epoch, index]
            assert agreement(image, target) > 0.7  # masks are resized by nearest pixels, as published
            assert target.masks is not None
            for mask, box in zip(target.masks, cxcywh_to_xyxy(target.boxes), strict=True):
                if mask.any():
                    height, width = image.shape[1:]
                    found = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
                    outer = box * torch.tensor([width, height, width, height])
                    assert (found[:2] >= outer[:2] - 3).all() and (found[2:] <= outer[2:] + 3).all()


MIXINGS: dict[str, Mixing] = {
    "mosaic": Mosaic(size=60, probability=1.0, rotation=0.0),
    "rotated mosaic": Mosaic(size=60, probability=1.0, rotation=30.0, short_side=True, fill=3),
    "pasted": CopyBlend(probability=1.0, weight=(1.0, 1.0), expand=(0.0, 0.0), min_area=1.0),
    "mixup": Mixup(probability=1.0, weight=(0.5, 0.5)),
    "chain": Chain(parts={"mosaic": Mosaic(size=60, probability=1.0), "mixup": Mixup(probability=1.0, whole=True)}),
}


@pytest.mark.parametrize("name", MIXINGS)
def test_masks_follow_mixing(tmp_path: Path, name: str) -> None:
    annotations = painted(tmp_path)
    dataset = DetectionDataset(annotations, mixing=MIXINGS[name])
    plain = DetectionDataset(
        Annotations(**{**vars(annotations), "records": [without(record) for record in annotations.records]}),
        mixing=MIXINGS[name],
    )
    for index in range(len(dataset)):
        image, target = dataset[1, index]
        same, boxes_alone = plain[1, index]
        assert torch.equal(image, same) and torch.equal(target.boxes, boxes_alone.boxes)
        assert boxes_alone.masks is None
        if "mosaic" in name:
            assert agreement(image, target) > 0.7
        assert target.masks is not None
        for mask, box in zip(target.masks, cxcywh_to_xyxy(target.boxes), strict=True):
            height, width = image.shape[1:]
            found = mask.nonzero()
            if len(found):
                low, high = found.amin(0).flip(0), found.amax(0).flip(0) + 1
                outer = box * torch.tensor([width, height, width, height])
                assert (low >= outer[:2] - 2).all() and (high <= outer[2:] + 2).all()


def test_many_masks_move_with_a_mosaic_as_each_one_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(53, 62, 46, generator=generator) < 0.5).byte()

    def sample(chosen: slice) -> Sample:
        count = len(masks[chosen])
        boxes = torch.tensor([[0.0, 0.0, 46.0, 62.0]]).expand(count, 4)
        return tv_tensors.Image(torch.zeros(3, 62, 46, dtype=torch.uint8)), {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(62, 46)),
            "labels": torch.arange(53)[chosen],
            "masks": tv_tensors.Mask(masks[chosen]),
        }

    def moved(chosen: slice) -> torch.Tensor:
        torch.manual_seed(1)
        mosaic = Mosaic(size=62, probability=1.0, rotation=40.0, scaling=[0.8, 1.2])
        _, found = mosaic(*sample(chosen), lambda: sample(slice(0)))
        assert found["labels"].tolist() == list(range(53))[chosen]
        return found["masks"]

    together = moved(slice(None))
    assert together.shape == (53, 124, 124) and together.max() == 1
    assert torch.equal(together, torch.cat([moved(slice(one, one + 1)) for one in range(53)]))
    assert moved(slice(0)).shape == (0, 124, 124)


def without(record: ImageRecord) -> ImageRecord:
    return ImageRecord(**{**vars(record), "masks": None})


def test_a_pasted_object_has_the_pixels_of_its_mask(tmp_path: Path) -> None:
    dataset = DetectionDataset(painted(tmp_path), mixing=MIXINGS["pasted"])
    for index in range(len(dataset)):
        image, target = dataset[2, index]
        assert target.masks is not None
        assert bool((image[target.labels[-1]] == 240)[target.masks[-1]].all())


@pytest.mark.parametrize("workers", [1, 3])
def test_masks_are_the_same_for_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    dataset = DetectionDataset(painted(tmp_path), RECIPES["DETR's"], mixing=MIXINGS["mosaic"])
    alone, others = (
        [
            target
            for _, targets in TrainLoader(dataset, batch_size=2, workers=count, seed=0).epoch(1)
            for target in targets
        ]
        for count in (0, workers)
    )
    for one, other in zip(alone, others, strict=True):
        assert one.masks is not None and other.masks is not None and torch.equal(one.masks, other.masks)


def test_generated_shapes_have_the_masks_that_are_seen(tmp_path: Path) -> None:
    generate(tmp_path / "shapes", train_images=12, val_images=1, image_size=96, max_objects=4)
    path = tmp_path / "shapes" / "instances_train.json"
    annotations = read_coco(images=tmp_path / "shapes" / "train", annotations=path, masks=True)
    dataset = DetectionDataset(annotations)
    for record in dataset.records:
        assert record.masks is not None
        masks = record.masks.decode()
        assert int(masks.sum(0).max()) <= 1  # of overlapping shapes one is seen
        inside = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        boxes = torch.from_numpy(record.boxes)
        assert (inside[:, :2] >= boxes[:, :2] - 1).all()
        assert (inside[:, 2:] <= boxes[:, :2] + boxes[:, 2:] + 1).all()
        image = np.asarray(Image.open(dataset.folder / record.file_name), dtype=float)
        for mask in masks.numpy()[(masks.sum((1, 2)) > 150).numpy()]:  # one color, but for the compression and the edge
            assert np.median(np.abs(image[mask] - np.median(image[mask], axis=0))) < 12
    rows = dataset.ground_truth()["annotations"]
    again = [pycocotools.mask.decode({**row["segmentation"]}) for row in rows]
    expected = [mask for record in dataset.records for mask in record.masks.decode().numpy()]  # type: ignore[union-attr]
    assert all(np.array_equal(one, other) for one, other in zip(again, expected, strict=True))


def test_records_give_the_masks_that_they_were_made_of(tmp_path: Path) -> None:
    records = painted(tmp_path).records
    packed = Records(records)
    for record, again in zip(records, packed, strict=True):
        assert record.masks == again.masks
    chosen = packed.select(packed.labels == 0)
    assert [record.masks.counts for record in chosen] == [  # type: ignore[union-attr]
        tuple(c for c, label in zip(r.masks.counts, r.labels, strict=True) if label == 0)
        for r in records  # type: ignore[union-attr]
    ]


def test_converted_files_have_the_masks(shapes_root: Path, tmp_path: Path) -> None:
    options = ("data=shapes", f"data.root={shapes_root}", "data.prepare=null", f"output={tmp_path}")
    assert run("tools/convert_data.py", *options, "masks=true").code == 0
    for split in ("train", "val"):
        own, written = (
            json.loads((folder / f"instances_{split}.json").read_text())["annotations"]
            for folder in (shapes_root, tmp_path)
        )
        assert [row["segmentation"] for row in written] == [row["segmentation"] for row in own]
    assert run("tools/convert_data.py", *options, "overwrite=true").code == 0
    assert "segmentation" not in (tmp_path / "instances_val.json").read_text()
