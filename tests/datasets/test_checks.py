"""What is said of data before a training: one line a kind, with a count and an example; and what ends it."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets import DetectionDataset, TrainLoader, before_training, evaluation_loader
from datasets.formats.checks import annotation_findings
from datasets.formats.coco import read_coco
from datasets.records import Records
from detr.errors import UserError
from tests.helpers.data import coco_set, shapes_set

Content = dict[str, Any]
WIDTH, HEIGHT = 640, 480


def objects(count: int = 60, images: int = 12, seed: int = 0) -> Content:
    """Sound annotations: boxes anywhere in the image."""
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(count):
        left, right = np.sort(rng.uniform(0, WIDTH, 2)).round(1).tolist()
        top, bottom = np.sort(rng.uniform(0, HEIGHT, 2)).round(1).tolist()
        boxes.append([left, top, right - left + 2, bottom - top + 2])
    return {
        "images": [
            {"id": key, "file_name": f"{key}.png", "width": WIDTH, "height": HEIGHT} for key in range(1, images + 1)
        ],
        "annotations": [
            {"id": number, "image_id": 1 + number % images, "category_id": 1 + number % 2, "bbox": box, "iscrowd": 0}
            for number, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def corners(content: Content) -> None:
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, min(x + w, WIDTH), min(y + h, HEIGHT)]


def centers(content: Content) -> None:
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x + w / 2, y + h / 2, w, h]


def scaled(x: float, y: float) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for entry in content["annotations"]:
            entry["bbox"] = [value * factor for value, factor in zip(entry["bbox"], (x, y, x, y), strict=True)]

    return change


def doubled(content: Content) -> None:
    content["annotations"] += [{**entry, "id": 1000 + entry["id"]} for entry in content["annotations"]]


def doubled_and_rounded(content: Content) -> None:
    content["annotations"] += [
        {**entry, "id": 1000 + entry["id"], "bbox": [round(value) for value in entry["bbox"]]}
        for entry in content["annotations"]
    ]


def corners_inside(content: Content) -> None:
    for entry in content["annotations"]:
        x, y, w, h = (value / 2 for value in entry["bbox"])
        entry.update(bbox=[x, y, x + w, y + h], area=w * h)


def some_relative(content: Content) -> None:
    for entry in content["annotations"][:9]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


def under_two_classes(content: Content) -> None:
    extra = [{**e, "id": 1000 + e["id"], "category_id": 3 - e["category_id"]} for e in content["annotations"][:5]]
    content["annotations"] += extra


def listed_twice(content: Content) -> None:
    content["images"].append({**content["images"][0], "id": 99})
    content["images"].append({**content["images"][0], "id": 98, "file_name": "./1.png"})


def far_out(content: Content) -> None:
    for entry in content["annotations"][:3]:
        entry["bbox"] = [WIDTH - 10, 5, 100, 50]


ODD: dict[str, tuple[Callable[[Content], Any], str]] = {
    "corners": (corners, r"the boxes look like \[left, top, right, bottom\]: .* \d+ of 60 reach out of .*, such as \["),
    "centers": (centers, r"the boxes look like \[center x, center y, width, height\]: .* \d+ of 60 .* half of width"),
    "boxes in [0, 1]": (scaled(1 / WIDTH, 1 / HEIGHT), r"60 of 60 boxes are in \[0, 1\], such as .*640x480.*multiply"),
    "corners inside of the image": (corners_inside, r"\d+ of 60 boxes look like \[left, top, right, bottom\].*areas"),
    "some boxes in [0, 1]": (some_relative, r"9 of 60 boxes are in \[0, 1\], such as"),
    "boxes in percent": (scaled(100 / WIDTH, 100 / HEIGHT), "60 of 60 boxes are in the upper left quarter.*percent"),
    "boxes of a smaller image": (scaled(0.4, 0.4), "boxes are in the upper left quarter .* of smaller images"),
    "every box twice": (doubled, r"60 of 120 objects are copies of another one, .* such as \[.* in image 1 "),
    "every box twice, once rounded": (doubled_and_rounded, "(5[5-9]|60) of 120 objects are copies of another one"),
    "boxes under two classes": (under_two_classes, "5 of 65 boxes are there under several classes"),
    "a file twice": (listed_twice, r"1 files are listed as several images, such as '1\.png'"),
    "two categories of one name": (
        lambda c: c["categories"].append({"id": 9, "name": " Cat"}), "1 names belong to several .*1 'cat' and 9 ' Cat'"
    ),
    "boxes far out": (far_out, r"3 of 60 boxes reach far out of their image, .*such as \[630, 5, 100, 50\]"),
    "areas of another unit": (
        lambda c: [e.update(area=e["bbox"][2] * e["bbox"][3] / 1e5) for e in c["annotations"]], "areas do not fit"
    ),
}  # fmt: skip


def warned(content: Content, folder: Path) -> list[str]:
    (folder / "a.json").write_text(json.dumps(content))
    annotations = read_coco(images=folder, annotations=folder / "a.json")
    return [str(finding) for finding in annotation_findings(Records(annotations.records), annotations.categories)]


@pytest.mark.parametrize("name", ODD)
def test_what_looks_wrong_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    change, message = ODD[name]
    content = objects()
    change(content)
    (text,) = warned(content, tmp_path)
    assert re.search(message, text) and "\n" not in text


@pytest.mark.parametrize("count", [0, 1, 2, 5, 60, 300])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_said_of_sound_annotations(seed: int, count: int, tmp_path: Path) -> None:
    assert not warned(objects(count, seed=seed), tmp_path)


def test_nothing_is_said_of_large_objects(tmp_path: Path) -> None:
    content = objects(1)
    content["annotations"][0]["bbox"] = [1, 1, WIDTH - 1, HEIGHT - 1]
    assert not warned(content, tmp_path)
    content["annotations"] *= 0
    for number in range(30):
        entry = {"id": number, "image_id": 1 + number % 12, "category_id": 1, "bbox": [9, 8, 500 + number, 400]}
        content["annotations"].append(entry)
    assert not warned(content, tmp_path)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_few_wrong_boxes_do_not_hide_a_wrong_unit(bad: int, tmp_path: Path) -> None:
    for change, message in (ODD["corners"], ODD["boxes in [0, 1]"]):
        content = objects()
        change(content)
        content["annotations"][5]["bbox"] = [float("nan"), 5, 600, 7] if bad else [600, 400, 10, 10]
        assert re.search(message.replace("60 of 60", "59 of 60"), " ".join(warned(content, tmp_path)))


def test_nothing_is_said_of_coco(shared: Path) -> None:
    folder = shared / "data" / "coco_sample"
    for split in ("train", "val"):
        annotations = read_coco(images=folder, annotations=folder / f"instances_{split}.json")
        assert not annotation_findings(Records(annotations.records), annotations.categories)


# Before a training


@pytest.fixture
def root(shapes_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(shapes_root, tmp_path / "set")
    return tmp_path / "set"


def change(root: Path, split: str, changed: Callable[[Content], Any]) -> None:
    path = root / f"instances_{split}.json"
    content = json.loads(path.read_text())
    changed(content)
    path.write_text(json.dumps(content))


def check(root: Path, unreadable: str = "stop", **options: Any) -> DetectionDataset:
    train, val = shapes_set(root, "train", unreadable=unreadable), shapes_set(root, "val")
    before_training(train, val, **options)
    return train


def test_nothing_is_said_of_sound_data(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for images in ("headers", "pixels", "nothing"):
        check(root, images=images, num_queries=3)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_more_objects_than_queries(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = [len(record.labels) for record in check(root).records]
    check(root, num_queries=2)
    more = sum(count > 2 for count in counts)
    assert f"{more} of 24 images have more objects than queries" in caplog.text
    assert "with 3, while model.num_queries is 2" in caplog.text


def test_crowds_take_no_queries(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(root, "train", lambda c: [entry.update(iscrowd=1) for entry in c["annotations"][1:]])
    check(root, num_queries=1)
    assert "model.num_queries" not in caplog.text


def test_a_category_that_is_never_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        change(root, split, lambda c: c["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"}))
    check(root)
    (record,) = caplog.records
    assert "instances_train.json: 1 of 4 categories have no object, such as 0 'shapes'" in record.getMessage()


def test_images_that_are_trained_and_evaluated_on(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = shapes_set(root, "train")
    change(root, "train", lambda c: c.update(images=c["images"][:5], annotations=[]))
    part = shapes_set(root, "train")
    (root / "instances_train.json").rename(root / "other.json")
    before_training(whole, coco_set(root / "train", root / "other.json"))
    assert "other.json: 5 of 5 images are trained on too, such as '000000.jpg'" in caplog.text
    caplog.clear()
    before_training(whole, whole)
    before_training(whole, part)
    assert not caplog.records, "the same annotations are meant to be the same"


@pytest.mark.parametrize("kind", ["crowds", "none", "no annotations"])
def test_there_must_be_something_to_learn(root: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def without(content: Content) -> None:
        if kind == "crowds":
            for entry in content["annotations"]:
                entry["iscrowd"] = 1
        else:
            content["annotations"] = []

    for split in ("train", "val"):
        change(root, split, without)
    with pytest.raises(UserError, match=r"instances_train\.json has no object to train on in its 24 images"):
        TrainLoader(shapes_set(root, "train"), batch_size=2, workers=0, seed=0)
    assert not caplog.records
    evaluation_loader(shapes_set(root, "val"), batch_size=2, workers=0)
    assert "instances_val.json has no object to be found in its 7 images" in caplog.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def enlarge(path: Path) -> None:
    Image.new("RGB", (50, 48)).save(path)


HEADERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read: it is empty"),
    "of another size": (enlarge, "is 50x48 pixels, but its annotations are for 48x48"),
    "no image": (lambda path: path.write_bytes(b"%PDF-1.4"), "cannot be read"),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("images", ["headers", "pixels"])
def test_headers_are_read_before_training(name: str, images: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil, message = HEADERS[name]
    for number in (5, 7, 23):
        spoil(root / "train" / f"{number:06d}.jpg")
    whole = rf"3 of 24 images in \S*train cannot be used. The first: .*000005\.jpg {message}"
    with pytest.raises(UserError, match=whole + r".* Or set data\.unreadable=skip"):
        check(root, images=images)
    check(root, images="nothing")
    caplog.clear()
    check(root, unreadable="skip", images=images)
    assert re.search(whole + ".* Training skips them", caplog.text)


def test_all_pixels_are_read_on_request(root: Path) -> None:
    cut(root / "train" / "000011.jpg")
    check(root)
    with pytest.raises(UserError, match=r"1 of 24 images .*000011\.jpg cannot be read: .*data\.unreadable=skip"):
        check(root, images="pixels")


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_images_to_evaluate_on_must_be_readable(root: Path, unreadable: str) -> None:
    enlarge(root / "val" / "000003.jpg")
    with pytest.raises(UserError, match=r"1 of 7 images in \S*val cannot be used.*000003\.jpg") as refused:
        check(root, unreadable=unreadable)
    assert "unreadable" not in str(refused.value), "evaluation skips none"


def test_each_process_reads_its_part(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import image_checks as checks

    monkeypatch.setattr(checks.distributed, "rank", lambda: 1)
    monkeypatch.setattr(checks.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(checks.distributed, "gather_objects", lambda value: [["of process 0"], value])
    monkeypatch.setattr(checks.distributed, "from_first", lambda value: value)
    for number in (4, 5):
        enlarge(root / "train" / f"{number:06d}.jpg")
    found = checks.image_files(shapes_set(root, "train"))
    assert found[0] == "of process 0" and len(found) == 13
    assert [file.name for file in found[1:] if file.problem is not None] == ["000005.jpg"]


@pytest.mark.parametrize(
    ("size", "unreadable"), [((2000, 5), "stop"), ((300, 1), "stop"), ((1, 300), "skip"), ((1, 1), "stop")]
)
def test_images_much_longer_than_wide(size: tuple[int, int], unreadable: str, tmp_path: Path) -> None:
    from datasets import transforms

    Image.new("RGB", size).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, size[0] / 2, size[1]]}],
        "categories": [{"id": 1, "name": "line"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    recipes = (
        transforms.train(sizes=[96], max_size=128, crop_from=[40], crop_min=20, crop_max=50),
        transforms.train(sizes=[480], max_size=600),
        transforms.evaluation(size=96, max_size=128),
    )
    for recipe in recipes:
        dataset = coco_set(tmp_path, tmp_path / "a.json", recipe, unreadable=unreadable)
        for epoch in range(4):
            image, target = dataset[epoch, 0]
            assert min(image.shape) >= 1 and (target.boxes[:, 2:] > 0).all()


@pytest.mark.parametrize(("num_queries", "mixed_images"), [(7, 4), (9, 4), (100, 16), (2, 1), (None, 4)])
def test_more_objects_than_queries_in_mixed_samples(root: Path, num_queries: int | None, mixed_images: int) -> None:
    from datasets import checks

    dataset = shapes_set(root, "train")
    share = np.bincount(dataset.objects_per_image()) / len(dataset)
    total = np.ones(1)
    for _ in range(mixed_images):
        total = np.convolve(total, share)  # how likely each number of objects is in so many images
    expected = total[1 + (num_queries or 0) :].sum() if mixed_images > 1 and num_queries else 0.0
    texts = map(str, checks.training_findings(dataset, num_queries, mixed_images))
    found = [text for text in texts if "data.mixing" in text]
    assert len(found) == (expected > 0.01)
    for text in found:
        told = re.search(r"samples of up to 4 images\. About (\d+)% of these have more objects than queries", text)
        assert told is not None and float(told[1]) == pytest.approx(100 * expected, abs=4)
