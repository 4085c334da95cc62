"""What predict.py and evaluate.py write: ids, names, files that cannot be read, ends before the end."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr import Detector, UserError
from detr.config import compose
from detr.evaluation import ListedImage, ListedImages
from detr.images import find_images
from detr.types import Category
from tests.helpers.commands import REPOSITORY, TINY_MODEL, Outcome, predict, run, save_untrained

NAMES = ("circle", "square", "triangle")
SIGMOID = [option for option in TINY_MODEL if "backbone=" not in option]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """Of an untrained model with sigmoid scores for the shapes."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt", shapes_root)


def make_checkpoint(path: Path, root: Path, names: tuple[str, ...] = NAMES) -> Path:
    overrides = ["model=small", *SIGMOID, f"data.root={root}", "data.size=48", "data.max_size=64"]
    return save_untrained(path, overrides, names)


def evaluate(checkpoint: Path, folder: Path, *more: str) -> Outcome:
    options = [f"checkpoint={checkpoint}", "data.workers=0", "device=cpu", f"run_dir={folder}"]
    return run("evaluate.py", *options, *more)


def rows_of(folder: Path, name: str = "results.json") -> list[dict[str, object]]:
    content = json.loads((folder / name).read_text())
    return content if isinstance(content, list) else content["images"]


def ap_by_pycocotools(annotations: Path, results: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def annotate_what_is_found(content: dict[str, Any], checkpoint: Path, images: Path) -> None:
    """The model's best detections, moved a little, as annotations: an untrained one finds no other."""
    found = Detector.from_checkpoint(checkpoint).predict([images / row["file_name"] for row in content["images"]], 0.0)
    rows = [
        {"image_id": row["id"], "category_id": one.label + 1, "bbox": [x + 0.2, y, right - x, bottom - y]}
        for row, detections in zip(content["images"], found, strict=True)
        for one in detections[:3]
        for x, y, right, bottom in [one.box]
    ]
    content["annotations"] = [{"id": number, "iscrowd": 0, "area": 9, **row} for number, row in enumerate(rows, 1)]


def test_results_with_the_ids_of_the_annotations_score_as_in_evaluation(
    checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    content = json.loads((shapes_root / "instances_val.json").read_text())
    for row in content["images"]:
        row["id"] = 1000 - 7 * row["id"]  # in another order than the files
    annotate_what_is_found(content, checkpoint, shapes_root / "val")
    turned = shapes_root / "val" / content["images"][3]["file_name"]
    annotations = tmp_path / "val.json"
    annotations.write_text(json.dumps(content))
    images = tmp_path / "val"
    shutil.copytree(shapes_root / "val", images)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, which annotations of this size do not decide about
    Image.open(turned).save(images / turned.name, exif=exif)

    data = [f"data.val.images={images}", f"data.val.annotations={annotations}"]
    assert evaluate(checkpoint, tmp_path / "evaluated", *data).code == 0
    done = predict(checkpoint, images, tmp_path / "found", f"annotations={annotations}", "batch_size=1")
    assert done.code == 0, done.output
    metrics = json.loads((tmp_path / "evaluated" / "evaluation" / "metrics.json").read_text())["bbox"]
    wanted = [metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")]
    assert metrics["AR100"] > 0
    own = tmp_path / "evaluated" / "evaluation" / "detections.json"
    assert ap_by_pycocotools(annotations, own)[:9] == pytest.approx(wanted, abs=1e-9)
    assert ap_by_pycocotools(annotations, tmp_path / "found" / "results.json")[:9] == pytest.approx(wanted, abs=1e-3)
    ids = {row["file_name"]: row["id"] for row in content["images"]}
    assert all(row["image_id"] == ids[row["file_name"]] for row in rows_of(tmp_path / "found"))
    assert {row["file_name"]: row["id"] for row in rows_of(tmp_path / "found", "images.json")} == ids


def test_classes_of_the_same_name_are_evaluated_under_other_ids(
    checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    """As the same detections are under the ids that the model knows; a class of the data alone counts as missed."""
    content = json.loads((shapes_root / "instances_val.json").read_text())
    annotate_what_is_found(content, checkpoint, shapes_root / "val")
    annotations, judged = tmp_path / "val.json", tmp_path / "judged.json"
    annotations.write_text(json.dumps(content))
    data = [f"data.val.images={shapes_root / 'val'}", f"data.val.annotations={annotations}"]
    assert evaluate(checkpoint, tmp_path / "same", *data).code == 0
    found = rows_of(tmp_path / "same" / "evaluation", "detections.json")

    most = Counter(row["category_id"] for row in content["annotations"]).most_common()
    known, unknown = most[0][0], 3 if most[0][0] != 3 else 1
    content["categories"] = [{"id": 70, "name": NAMES[known - 1].title()}, {"id": 71, "name": "star"}]
    ids = {known: 70, unknown: 71}
    content["annotations"] = [
        row | {"category_id": ids[row["category_id"]]} for row in content["annotations"] if row["category_id"] in ids
    ]
    content["annotations"].append({**content["annotations"][0], "id": 99, "category_id": 71})
    annotations.write_text(json.dumps(content))
    wanted = [row | {"category_id": 70} for row in found if row["category_id"] == known]
    judged.write_text(json.dumps(wanted))
    done = evaluate(checkpoint, tmp_path / "other", *data)
    assert done.code == 0, done.output
    assert rows_of(tmp_path / "other" / "evaluation", "detections.json") == wanted
    metrics = json.loads((tmp_path / "other" / "evaluation" / "metrics.json").read_text())
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
    assert [metrics["bbox"][name] for name in names] == pytest.approx(
        ap_by_pycocotools(annotations, judged)[:9], abs=1e-9
    )
    assert metrics["bbox"]["AR100"] > 0 and metrics["per_class"]["star"]["AP"] == 0
    assert "1 of 2 categories that the model does not know; their objects count as missed: 71 'star'" in done.output
    assert "2 of the model's 3 classes, whose detections are left out" in done.output
    assert (
        f"Taken for the same classes, of {annotations} and of the model: {NAMES[known - 1].title()} and" in done.output
    )

    done = predict(checkpoint, shapes_root / "val", tmp_path / "found", f"annotations={annotations}")
    assert done.code == 0 and "do not know" not in done.output, done.output
    rows = rows_of(tmp_path / "found")
    assert len(rows) == len(wanted) and {(row["category_id"], row["category_name"]) for row in rows} == {
        (70, NAMES[known - 1].title())
    }
    assert json.loads((tmp_path / "found" / "images.json").read_text())["categories"] == content["categories"][:1]


def test_results_without_annotations_have_no_ids_that_look_like_them(
    checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    assert predict(checkpoint, shapes_root / "val", tmp_path / "found", "threshold=1").code == 0
    assert rows_of(tmp_path / "found") == []
    images = rows_of(tmp_path / "found", "images.json")
    assert len(images) == 7 and all(row["detections"] == 0 and row["id"] == row["file_name"] for row in images)
    assert predict(checkpoint, shapes_root / "val", tmp_path / "found", "overwrite=true", "max_dets=4").code == 0
    rows = rows_of(tmp_path / "found")
    assert len(rows) == 7 * 4 and {(row["category_id"], row["category_name"]) for row in rows} <= set(
        enumerate(NAMES, 1)
    )
    with pytest.raises(AssertionError, match="Results do not correspond to current coco set"):
        ap_by_pycocotools(shapes_root / "instances_val.json", tmp_path / "found" / "results.json")


def listing(tmp_path: Path, images: dict[str, int], **more: object) -> Path:
    rows = [{"id": number, "file_name": name} for name, number in images.items()]
    (tmp_path / "listing.json").write_text(json.dumps({"images": rows, **more}))
    return tmp_path / "listing.json"


def test_images_are_found_by_name_with_or_without_folders(tmp_path: Path) -> None:
    names = {"0001.jpg": 5, "train/0002.jpg": 6, "cam 1\\0003.jpg": 7, "Caf\u00e9.jpg": 8}
    images = ListedImages(listing(tmp_path, names), [Category(1, "a")])
    for path, number in {
        "/x/val/0001.jpg": 5,
        "/x/train/0002.jpg": 6,
        "/x/val/0002.jpg": None,
        "/x/cam 1/0003.jpg": 7,
        "/x/Cafe\u0301.jpg": 8,
    }.items():
        found = images.of(Path(path))
        assert (None if found is None else found.id) == number


def test_ids_and_sizes_that_are_written_otherwise(tmp_path: Path) -> None:
    rows = [{"id": 3.0, "file_name": "a.jpg", "width": "30.0", "height": 20.0}, {"id": "007", "file_name": "b.jpg"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": rows, "categories": [{"id": "1", "name": "a"}]}))
    images = ListedImages(tmp_path / "a.json", [Category(1, "a")])
    assert images.of(Path("a.jpg")) == ListedImage(3, (20, 30)), "as training reads them"
    assert images.of(Path("b.jpg")) == ListedImage("007"), "as evaluation with this file knows it"


def test_an_image_that_is_listed_twice_has_no_id(tmp_path: Path) -> None:
    images = ListedImages(listing(tmp_path, {"a.jpg": 3, "b\\a.jpg": 4, "b/a.jpg": 5}), [Category(1, "a")])
    assert images.of(Path("/x/a.jpg")) == ListedImage(3) and len(images) == 3
    with pytest.raises(UserError, match=r"lists 'b/a\.jpg' 2 times, with the ids 4, 5: .* List it once"):
        images.of(Path("/x/b/a.jpg"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "words"),
    [(os.mkfifo, "is a device or a pipe"), (Path.mkdir, "it is a folder"), (Path.absolute, "does not exist")],
)
def test_annotations_that_are_no_file_are_refused(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(UserError, match=words):
        ListedImages(tmp_path / "a.json", [Category(1, "a")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "not in COCO format"),
        ("{}", "'images'"),
        ('{"images": [{"id": 1}]}', "file_name"),
        ('{"images": {}}', "'images' is missing or no list of objects"),
        ('{"images": ["a.jpg"]}', "'images' is missing or no list of objects"),
        ('{"images": [], "categories": null}', "'categories' is missing or no list of objects"),
        ('{"images": [], "categories": ["a"]}', "'categories' is missing or no list of objects"),
        (
            '{"images": [], "categories": [{"id": [], "name": "a"}]}',
            "the category 'a' has the id .., wanted a whole number",
        ),
        ('{"images": [{"id": null, "file_name": "a"}]}', "an image has the id None and the file_name 'a'"),
        ('{"images": [{"id": 1.5, "file_name": "a"}]}', "an image has the id 1.5"),
        ('{"images": [{"id": [1], "file_name": "a"}]}', "an image has the id .1"),
        ('{"images": [{"id": 1, "file_name": 7}]}', "an image has the id 1 and the file_name 7"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "b"}]}',
            "no category that the model knows: it has 1 'b', .* trained on 1 'a'",
        ),
    ],
)
def test_annotations_that_cannot_give_ids_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=words):
        ListedImages(tmp_path / "a.json", [Category(1, "a")])


def test_images_that_are_not_listed_are_left_out(checkpoint: Path, shapes_root: Path, tmp_path: Path) -> None:
    file = listing(tmp_path, {"000002.jpg": 31, "000004.jpg": 17, "other.jpg": 3})
    done = predict(checkpoint, shapes_root / "val", tmp_path / "found", f"annotations={file}")
    assert (
        done.code == 0
        and "5 images are left out" in done.output
        and "lists 3 images, of which source has 2" in done.output
    )
    assert [row["id"] for row in rows_of(tmp_path / "found", "images.json")] == [31, 17]
    file = listing(tmp_path, {"other.jpg": 3})
    done = predict(checkpoint, shapes_root / "val", tmp_path / "none", f"annotations={file}")
    assert done.code == 2 and "lists none of the 7 images" in done.message


def make_photographs(folder: Path, shapes_root: Path) -> None:
    shutil.copytree(shapes_root / "val", folder)
    whole = (folder / "000002.jpg").read_bytes()
    (folder / "000002.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    (folder / "notes.txt").write_text("notes")
    (folder / "figure.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")


def test_where_nothing_is_sure_enough_the_highest_score_is_told(
    checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    done = predict(checkpoint, shapes_root / "val", tmp_path / "all")
    highest = max(row["score"] for row in rows_of(tmp_path / "all"))  # type: ignore[type-var]
    assert done.code == 0 and "No score" not in done.output and "Everything goes to" not in done.output
    done = predict(checkpoint, shapes_root / "val", tmp_path / "none", "threshold=1")
    assert done.message == f"No score reaches threshold=1; the highest is {highest:.3f}. A lower threshold shows more."


@pytest.mark.timeout(120)
def test_what_cannot_be_read_is_left_out_and_counted(checkpoint: Path, shapes_root: Path, tmp_path: Path) -> None:
    make_photographs(tmp_path / "photographs", shapes_root)
    done = predict(checkpoint, tmp_path / "photographs", tmp_path / "found", "batch_size=2")
    assert done.code == 0 and "Traceback" not in done.output, done.output
    assert "3 of 9 files could not be read and were left out" in done.output
    for name in ("000002.jpg", "empty.png", "text.jpg"):
        assert f"{name} cannot be read" in done.output
    names = {f"00000{number}.jpg" for number in (0, 1, 3, 4, 5, 6)}
    assert {row["file_name"] for row in rows_of(tmp_path / "found", "images.json")} == names
    assert {row["file_name"] for row in rows_of(tmp_path / "found")} == names
    assert {path.name for path in (tmp_path / "found").glob("*.jpg")} == names


def test_where_nothing_can_be_read_it_ends_with_a_message(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.jpg").write_text("no image")
    done = predict(checkpoint, tmp_path / "photographs", tmp_path / "found")
    assert (
        done.code == 2 and "names no image that can be read" in done.message and "a.jpg cannot be read" in done.message
    )
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("ours"), 1), (MemoryError(), 2)])
def test_an_end_before_the_last_image_keeps_what_was_found(
    error: BaseException, code: int, checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    found, calls = Detector.outputs, []

    def fail(self: Detector, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 2:
            raise error
        return found(self, *arguments)

    with mock.patch.object(Detector, "outputs", fail):
        done = predict(checkpoint, shapes_root / "val", tmp_path / "found", "batch_size=2")
    assert done.code == code and "Read 4 of 7 images." in done.output, done.output
    assert (
        len(rows_of(tmp_path / "found", "images.json"))
        == 4
        == len({r["file_name"] for r in rows_of(tmp_path / "found")})
    )
    assert ("Out of memory: " in done.message) == isinstance(error, MemoryError)


def test_results_of_an_evaluation_are_replaced_on_request_only(checkpoint: Path, tmp_path: Path) -> None:
    assert evaluate(checkpoint, tmp_path / "run").code == 0
    assert "device: cpu" in (tmp_path / "run" / "evaluate.yaml").read_text()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.[jy]*")}
    done = evaluate(checkpoint, tmp_path / "run", "data.size=32")
    assert done.code == 2 and "run_dir=PATH" in done.message and "overwrite=true" in done.message
    assert before == {path: path.read_bytes() for path in before}
    assert evaluate(checkpoint, tmp_path / "run", "data.size=32", "overwrite=true").code == 0
    assert all(before[path] != path.read_bytes() for path in before if path.name == "evaluate.yaml")
    (tmp_path / "run" / "evaluation" / "metrics.json").write_text("of someone else")
    done = evaluate(checkpoint, tmp_path / "run", "overwrite=true")
    assert done.code == 2 and "metrics.json exists already" in done.message and "did not write it" in done.message


def test_weights_that_give_nan_are_an_error(shapes_root: Path, tmp_path: Path, checkpoint: Path) -> None:
    model = Detector.from_checkpoint(checkpoint).model
    model.register_forward_hook(lambda model, given, found: found.map(lambda tensor: tensor * float("nan")))
    detector = Detector(
        model=model, categories=[Category(n, name) for n, name in enumerate(NAMES)], size=48, max_size=64
    )
    with pytest.raises(UserError, match=r"became NaN or infinite for 1 of 1 images.*Use another checkpoint"):
        detector.predict(shapes_root / "val" / "000000.jpg")


@pytest.mark.parametrize(
    ("option", "wanted"),
    [(f"threshold={value}", "threshold: wanted at least 0 and at most 1") for value in ("2", "nan", "-1", "inf")]
    + [(f"max_dets={value}", "max_dets: wanted at least 1 and at most 10000") for value in ("0", "-3", "1000000000")],
)
def test_limits_of_predict(option: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        compose(["checkpoint=x", "source=x", option], "predict")


def test_limits_of_evaluate() -> None:
    with pytest.raises(UserError, match=r"evaluation\.max_dets: wanted at least 11 and at most 10000, got 1000000000"):
        compose(["checkpoint=x", "data=coco", "data.root=x", "evaluation.max_dets=1000000000"], "evaluate")


PHOTOS = ("photo 1.jpg", "photo [1].jpg")


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = (
        "photo [1].jpg",
        "photo 1.jpg",
        "Größe?.png",
        "a/0001.jpg",
        "b/0001.jpg",
        "b/*.jpg",
        "c.JPG",
        "x.jpg/y.jpg",
        ".hidden/y.jpg",
        "a/.hidden.jpg",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{}/photo [1].jpg", ["photo [1].jpg"]),
        ("{}/Größe?.png", ["Größe?.png"]),
        ("{}/b/*.jpg", ["*.jpg"]),
        ("{}/a/*.jpg", ["0001.jpg"]),
        ("{}/photo *", ["photo 1.jpg", "photo [1].jpg"]),
        ("{}/?/0001.jpg", ["a/0001.jpg", "b/0001.jpg"]),
        ("{}/**/0001.jpg", ["a/0001.jpg", "b/0001.jpg"]),
        ("{}", ["Größe?.png", "c.JPG", "photo 1.jpg", "photo [1].jpg"]),
        ("{}/x.jpg", ["y.jpg"]),
        ("{}/**", ["Größe?.png", "a/0001.jpg", "b/*.jpg", "b/0001.jpg", "c.JPG", *PHOTOS, "x.jpg/y.jpg"]),
        ("{}/.hidden/*", ["y.jpg"]),
        ("~/a", ["0001.jpg"]),
        ("~/?/0001.jpg", ["a/0001.jpg", "b/0001.jpg"]),
    ],
)
def test_sources(photographs: Path, source: str, names: list[str]) -> None:
    folder, found = find_images(source.format(photographs))
    assert [path.as_posix() for path in found] == names and all((folder / path).is_file() for path in found)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{}/none.jpg", "none.jpg names no image: there is no such file or folder. Give an image file"),
        ("{}/none/*.jpg", r"none/\*.jpg names no image. Give an image file, a folder of images, or a quoted pattern"),
        ("{}/deep", r"deep names no image; the folders in it do: write '.*deep/\*\*/\*'"),
        ("{}/a**b", "is no pattern: Invalid pattern: .* Give an image file"),
        ("{}/void", "void names no image: the folder holds none"),
    ],
)
def test_sources_without_images(photographs: Path, source: str, words: str) -> None:
    (photographs / "void").mkdir()
    (photographs / "deep").mkdir()
    (photographs / "a").rename(photographs / "deep" / "a")
    with pytest.raises(UserError, match=words):
        find_images(source.format(photographs))


@pytest.mark.timeout(20)
def test_links_that_lead_back_give_no_image_twice(photographs: Path) -> None:
    _, before = find_images(f"{photographs}/**/*")
    (photographs / "a" / "again").symlink_to(photographs)
    (photographs / "AGAIN").symlink_to(photographs / "a")
    assert find_images(f"{photographs}/**/*")[1] == before


def test_pictures_of_an_earlier_run_are_no_images(checkpoint: Path, shapes_root: Path, tmp_path: Path) -> None:
    Image.open(shapes_root / "val" / "000000.jpg").save(tmp_path / "a.png")
    assert predict(checkpoint, tmp_path, tmp_path).code == 0
    before = sorted(path.name for path in tmp_path.glob("*.*"))
    done = predict(checkpoint, tmp_path, tmp_path, "overwrite=true")
    assert done.code == 0 and "1 pictures of an earlier run" in done.output
    assert sorted(path.name for path in tmp_path.glob("*.*")) == before and "a.jpg" in before
    done = predict(checkpoint, tmp_path / "*.jpg", tmp_path, "overwrite=true")
    assert done.code == 2 and "were drawn by this program" in done.message


HOSTILE = ("\x1b[31mred", "狗\nline", "Größe")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> tuple[Path, list[str]]:
    """A checkpoint and options of an evaluation whose class names a terminal cannot or must not show."""
    folder = tmp_path_factory.mktemp("hostile")
    content = json.loads((shapes_root / "instances_val.json").read_text())
    for row, name in zip(content["categories"], HOSTILE, strict=True):
        row["name"] = name
    (folder / "val.json").write_text(json.dumps(content))
    return make_checkpoint(folder / "best.pt", shapes_root, HOSTILE), [f"data.val.annotations={folder / 'val.json'}"]


def test_names_are_shown_without_control_characters(hostile: tuple[Path, list[str]], tmp_path: Path) -> None:
    checkpoint, options = hostile
    done = evaluate(checkpoint, tmp_path / "run", *options)
    assert done.code == 0 and "\x1b" not in done.output and r"\x1b[31mred" in done.output and r"狗\nline" in done.output
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert set(metrics["per_class"]) == set(HOSTILE), "files have the names as they are"


def test_metrics_are_saved_whatever_becomes_of_the_output(hostile: tuple[Path, list[str]], tmp_path: Path) -> None:
    """An encoding that lacks the names, and a pipe that is closed."""
    checkpoint, options = hostile
    command = [sys.executable, "evaluate.py", f"checkpoint={checkpoint}", *options, f"run_dir={tmp_path}/run"]
    shell = f"PYTHONIOENCODING=ascii {' '.join(command)} data.workers=0 device=cpu | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())["bbox"]["AP"] >= 0
