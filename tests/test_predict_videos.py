"""predict.py on videos, and the files of detections that it writes, as other tools read them."""

import csv
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.formats.csv import read_csv
from detr import Detector
from detr.config import compose
from detr.detector import Outputs
from detr.errors import UserError
from detr.images import find_images
from tests.helpers.commands import TINY_MODEL, predict, save_untrained
from tests.helpers.videos import frames, make_video, properties

NAMES = ("circle", "square: #1", "狗")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """Of an untrained model for three classes."""
    overrides = [*TINY_MODEL, f"data.root={shapes_root}", "data.size=48", "data.max_size=64"]
    return save_untrained(tmp_path_factory.mktemp("checkpoint") / "best.pt", overrides, NAMES, first=5)


def rows_of(folder: Path, name: str) -> list[dict[str, object]]:
    content = json.loads((folder / name).read_text())
    return content if isinstance(content, list) else content["images"]


@pytest.fixture
def mixed(tmp_path: Path, shapes_root: Path) -> Path:
    """Photographs and videos, among them names that differ in their endings alone, and frames of a video."""
    pytest.importorskip("av")
    folder = tmp_path / "mixed"
    shutil.copytree(shapes_root / "val", folder)
    make_video(folder / "clip.mp4", frames(7), rate=7, rotation=90)
    make_video(folder / "walk.avi", frames(5))
    Image.open(folder / "000000.jpg").save(folder / "clip_3.jpg")
    Image.open(folder / "000000.jpg").save(folder / "walk.png")
    (folder / "broken.mkv").write_bytes(b"no video")
    return folder


def test_photographs_and_videos_of_one_folder(checkpoint: Path, mixed: Path, tmp_path: Path) -> None:
    done = predict(checkpoint, mixed, tmp_path / "found", "batch_size=3", "formats=[json,yolo,csv]")
    assert done.code == 0 and "Traceback" not in done.output, done.output
    assert "21 images and frames of 12 files" in done.output
    assert "1 of 12 files could not be read" in done.output and "broken.mkv cannot be read" in done.output
    images = rows_of(tmp_path / "found", "images.json")
    of_clip = [row for row in images if row["file_name"] == "clip.mp4"]
    assert [(row["id"], row["frame"], row["time"]) for row in of_clip] == [
        (f"clip.mp4#{index}", index, pytest.approx(index / 7, abs=1e-4)) for index in range(7)
    ]
    assert {(row["width"], row["height"], row["picture"]) for row in of_clip} == {(48, 64, "clip_mp4.mp4")}
    assert len({row["id"] for row in images}) == len(images) == 21
    rows = rows_of(tmp_path / "found", "results.json")
    assert {row["image_id"] for row in rows} == {row["id"] for row in images}
    assert all(row["frame"] == int(str(row["image_id"]).partition("#")[2]) for row in rows if "frame" in row)
    written = {path.relative_to(tmp_path / "found").as_posix() for path in (tmp_path / "found").rglob("*.*")}
    assert {"clip_mp4.mp4", "walk_avi.mp4", "walk_png.jpg", "clip_3.jpg", "labels/clip_3.txt"} <= written
    assert {f"labels/clip_mp4_{index}.txt" for index in range(7)} <= written and "labels/clip_mp4_7.txt" not in written
    assert not [name for name in written if name.endswith(".part")]
    drawn = properties(tmp_path / "found" / "clip_mp4.mp4")
    assert drawn["rate"] == 7 and drawn["size"] == (64, 48) and len(drawn["times"]) == 7


def test_a_frame_gives_what_its_image_gives(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from detr.videos import read_video

    made = make_video(tmp_path / "a.mp4", frames(9), rate=9)
    assert predict(checkpoint, made, tmp_path / "found", "video_stride=4", "batch_size=2").code == 0
    rows = rows_of(tmp_path / "found", "results.json")
    assert {row["frame"] for row in rows} == {0, 4, 8}
    detector = Detector.from_checkpoint(checkpoint)
    for frame in read_video(made, 4):
        found = detector.predict(frame.image, threshold=0.0)[0]
        own = [row for row in rows if row["frame"] == frame.index]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in own)]
        torch.testing.assert_close(torch.tensor(corners), found.boxes, atol=1e-3, rtol=1e-4)
        assert [row["category_name"] for row in own] == found.names
    drawn = properties(tmp_path / "found" / "a.mp4")
    assert [float(time) for time in drawn["times"]] == pytest.approx([0, 4 / 9, 8 / 9], abs=2e-3)


def test_a_truncated_video_keeps_what_was_found(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8)
    made = make_video(tmp_path / "a.mp4", list(noise), movflags="faststart")
    made.write_bytes(made.read_bytes()[:-20_000])
    done = predict(checkpoint, made, tmp_path / "found")
    count = len(rows_of(tmp_path / "found", "images.json"))
    assert done.code == 0 and 5 < count < 27
    assert f"a.mp4 is cut short: it ends after {count} frames" in done.output and "before is kept" in done.output
    assert len(properties(tmp_path / "found" / "a.mp4")["times"]) == count


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("ours"), 1)])
def test_an_end_within_a_video_keeps_what_was_found(
    error: BaseException, code: int, checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    made = make_video(tmp_path / "a.mp4", frames(8))
    found, calls = Detector.outputs, []

    def fail(self: Detector, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 2:
            raise error
        return found(self, *arguments)

    with mock.patch.object(Detector, "outputs", fail):
        done = predict(checkpoint, made, tmp_path / "found", "batch_size=3")
    assert done.code == code and "Read 6 images and frames of 1 files." in done.output
    assert len(rows_of(tmp_path / "found", "images.json")) == 6
    assert len(properties(tmp_path / "found" / "a.mp4")["times"]) == 6
    assert predict(checkpoint, made, tmp_path / "found", "overwrite=true").code == 0, "it knows its own files again"
    assert len(properties(tmp_path / "found" / "a.mp4")["times"]) == 8


def test_no_video_of_others_is_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    made = make_video(tmp_path / "a.mp4", frames(4))
    before = made.read_bytes()
    done = predict(checkpoint, made, tmp_path, "overwrite=true")
    assert done.code == 2 and "a.mp4 exists already" in done.message and made.read_bytes() == before
    assert predict(checkpoint, made, tmp_path / "found").code == 0
    done = predict(checkpoint, tmp_path / "found" / "*.mp4", tmp_path / "found", "overwrite=true")
    assert done.code == 2 and "were drawn by this program" in done.message


def test_without_pyav_images_are_detected_on_and_the_extra_is_named(
    checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.mp4").write_bytes(b"video")
    with mock.patch.dict(sys.modules, {"av": None}):
        done = predict(checkpoint, tmp_path / "source", tmp_path / "none")
        assert done.code == 2 and "pip install 'detr-framework[video]'" in done.message
        shutil.copy(shapes_root / "val" / "000000.jpg", tmp_path / "source")
        done = predict(checkpoint, tmp_path / "source", tmp_path / "found")
    assert done.code == 0 and "Skipped: Videos need the package av" in done.output
    assert [row["id"] for row in rows_of(tmp_path / "found", "images.json")] == ["000000.jpg"]


@pytest.mark.parametrize("source", ["https://example.com/a.jpg", "rtsp://camera/1", "S3://bucket/a/*.jpg"])
def test_urls_are_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"is a URL, and nothing is downloaded\. Save the file, and give its path"):
        find_images(source)


def test_attention_and_annotations_are_for_images(checkpoint: Path, mixed: Path, tmp_path: Path) -> None:
    done = predict(checkpoint, mixed, tmp_path / "found", "attention=true")
    assert done.code == 2 and "source has 3 videos, such as broken.mkv" in done.message
    listing = {"images": [{"id": 3, "file_name": "clip_3.jpg"}, {"id": 4, "file_name": "clip.mp4"}]}
    (tmp_path / "listing.json").write_text(json.dumps(listing))
    done = predict(checkpoint, mixed, tmp_path / "found", f"annotations={tmp_path / 'listing.json'}")
    assert done.code == 0 and [row["id"] for row in rows_of(tmp_path / "found", "images.json")] == [3]


@pytest.mark.parametrize("formats", ["[coco]", "[json,json]", "json"])
def test_formats_that_are_none_are_refused(formats: str) -> None:
    with pytest.raises(UserError, match="formats"):
        compose(["checkpoint=x", "source=x", f"formats={formats}"], "predict")


@pytest.fixture(scope="module")
def written(checkpoint: Path, shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything about the validation images, of which those with an even number have no detections."""
    folder, original = tmp_path_factory.mktemp("formats"), Outputs.detections
    calls = iter(range(7))

    def predict_some(self: Outputs, *arguments: object) -> object:
        return [found[:0] if next(calls) % 2 == 0 else found for found in original(self, *arguments)]

    with mock.patch.object(Outputs, "detections", predict_some):
        done = predict(checkpoint, shapes_root / "val", folder / "found", "formats=[csv,json,yolo]")
    assert done.code == 0, done.output
    return folder / "found"


def boxes_in_images(folder: Path) -> dict[str, list[tuple[list[float], int, float]]]:
    """Corners within the image, label and score by file, from results.json."""
    found: dict[str, list[tuple[list[float], int, float]]] = {f"{number:06}.jpg": [] for number in range(7)}
    for row in rows_of(folder, "results.json"):
        x, y, width, height = row["bbox"]  # type: ignore[misc]
        corners = np.array([x, y, x + width, y + height]).clip(0, 48).tolist()
        found[str(row["file_name"])].append((corners, int(row["category_id"]) - 5, float(row["score"])))  # type: ignore[call-overload, arg-type]
    return found


def test_supervision_reads_the_labels_of_yolo(written: Path, shapes_root: Path) -> None:
    sv = pytest.importorskip("supervision")
    read = sv.DetectionDataset.from_yolo(
        images_directory_path=str(shapes_root / "val"),
        annotations_directory_path=str(written / "labels"),
        data_yaml_path=str(written / "data.yaml"),
    )
    assert read.classes == list(NAMES) and len(read) == 7
    wanted = boxes_in_images(written)
    for path, _, objects in read:
        own = wanted[Path(path).name]
        assert len(objects) == len(own) and bool(own) == (int(Path(path).stem) % 2 == 1)
        if own:
            assert objects.class_id.tolist() == [label for _, label, _ in own]
            np.testing.assert_allclose(objects.xyxy, [corners for corners, _, _ in own], atol=1e-3)
    lines = (written / "labels" / "000001.txt").read_text().splitlines()
    assert [float(line.split()[5]) for line in lines] == pytest.approx(
        [score for _, _, score in wanted["000001.jpg"]], abs=1e-6
    )
    assert (written / "labels" / "000000.txt").read_text() == ""


def test_supervision_reads_the_files_of_coco(written: Path, shapes_root: Path, tmp_path: Path) -> None:
    """The two files together are a COCO data set."""
    sv = pytest.importorskip("supervision")
    content = json.loads((written / "images.json").read_text())
    numbers = {row["id"]: number for number, row in enumerate(content["images"])}
    content["images"] = [{**row, "id": numbers[row["id"]]} for row in content["images"]]
    content["annotations"] = [
        {
            **row,
            "image_id": numbers[row["image_id"]],
            "id": number,
            "area": row["bbox"][2] * row["bbox"][3],
            "iscrowd": 0,
        }
        for number, row in enumerate(rows_of(written, "results.json"), 1)
    ]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    read = sv.DetectionDataset.from_coco(str(shapes_root / "val"), str(tmp_path / "coco.json"))
    assert set(read.classes) == set(NAMES) and len(read) == 7
    wanted = boxes_in_images(written)
    for path, _, objects in read:
        assert [read.classes[label] for label in objects.class_id] == [
            NAMES[label] for _, label, _ in wanted[Path(path).name]
        ]


def test_the_table_has_every_detection(written: Path, shapes_root: Path) -> None:
    with (written / "detections.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = rows_of(written, "results.json")
    assert len(table) == len(rows) == 3 * 7
    for line, row in zip(table, rows, strict=True):
        x, y, width, height = row["bbox"]  # type: ignore[misc]
        assert (line["file"], line["class"], line["frame"]) == (row["file_name"], row["category_name"], "")
        assert int(line["category_id"]) == row["category_id"]
        corners = [float(line[name]) for name in ("x1", "y1", "x2", "y2")]
        assert corners == pytest.approx([x, y, x + width, y + height], rel=1e-5, abs=1e-4)
        assert float(line["score"]) == pytest.approx(row["score"], rel=1e-5)
    read = read_csv(images=str(shapes_root / "val"), annotations=str(written / "detections.csv"))
    assert {category.name for category in read.categories} <= set(NAMES), "the reader of training takes it"
