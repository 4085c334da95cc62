"""The generated set: the same for the same options, repaired where it is damaged, and never in place of other files."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datasets import shapes
from detr.boxes import cxcywh_to_xyxy
from detr.errors import UserError
from tests.helpers.commands import REPOSITORY
from tests.helpers.data import coco_set

SMALL = {"train_images": 3, "val_images": 2, "image_size": 32}


def read(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def with_former_manifest(root: Path) -> None:
    """As sets were generated before their manifest named its format and the files."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    options = json.loads((root / "manifest.json").read_text())["options"]
    (root / "manifest.json").write_text(json.dumps({"options": options, "sha256": digest.hexdigest()}, indent=2))


def test_the_set_is_deterministic_and_repaired(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for root in (first, second):
        shapes.generate(root, train_images=5, val_images=3, image_size=64, seed=2)
    assert read(first) == read(second)
    before, damaged = read(first), first / "train" / "000001.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (first / "val" / "000002.jpg").unlink()
    shapes.generate(first, train_images=5, val_images=3, image_size=64, seed=2)
    assert read(first) == before
    shapes.generate(first, train_images=5, val_images=3, image_size=64, seed=3)
    assert read(first) != before
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b", "a.lock", "b.lock"}, "no rest of the work is left"


def test_the_same_options_give_the_images_that_they_always_gave(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "set", **SMALL, seed=11)
    content = json.loads((tmp_path / "set" / "instances_train.json").read_text())
    for row in content["annotations"]:
        del row["segmentation"]  # which they did not always have
    annotations = json.dumps(content).encode()
    assert hashlib.sha256(annotations).hexdigest() == "78d12c8eede52bcf7639e57d8869e0a40ba97098a9f98b153a48b60a1cbff822"


def foreign_manifest(root: Path) -> None:
    (root / "manifest.json").write_text('{"name": "my web application"}')


def foreign_manifest_of_the_same_keys(root: Path) -> None:
    (root / "manifest.json").write_text('{"options": {}, "sha256": "0"}')


def own_set_with_another_file(root: Path) -> None:
    shapes.generate(root / "set", **SMALL)
    for path in (root / "set").iterdir():
        path.rename(root / path.name)
    (root / "set").rmdir()


def former_set_with_another_file(root: Path) -> None:
    own_set_with_another_file(root)
    with_former_manifest(root)


def own_set_whose_folder_is_a_link(root: Path) -> None:
    own_set_with_another_file(root)
    (root / "thesis" / "chapter.txt").rename(root.parent / "chapter.txt")
    (root / "thesis").rmdir()
    (root / "train").rename(root.parent / "photographs")
    (root / "train").symlink_to(root.parent / "photographs")


@pytest.mark.parametrize(
    "prepare",
    [
        lambda root: None,
        foreign_manifest,
        foreign_manifest_of_the_same_keys,
        own_set_with_another_file,
        former_set_with_another_file,
        own_set_whose_folder_is_a_link,
    ],
)
def test_other_files_are_never_touched(prepare: Callable[[Path], None], tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "thesis").mkdir(parents=True)
    (root / "thesis" / "chapter.txt").write_text("precious")
    prepare(root)
    before = read(tmp_path)
    with pytest.raises(UserError, match=r"project holds something else.*Nothing in it was changed.*data\.root"):
        shapes.generate(root, **SMALL, seed=5)
    (tmp_path / "project.lock").unlink(missing_ok=True)
    assert read(tmp_path) == before and b"precious" in before.values()


def test_a_file_is_no_folder_for_the_set(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        shapes.generate(tmp_path / "notes", **SMALL)
    assert (tmp_path / "notes").read_text() == "precious"


def test_a_file_beside_a_complete_set_does_not_matter(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "set", **SMALL)
    (tmp_path / "set" / ".DS_Store").write_text("precious")
    before = read(tmp_path / "set")
    shapes.generate(tmp_path / "set", **SMALL)
    assert read(tmp_path / "set") == before


def test_sets_of_former_versions_are_still_known(tmp_path: Path) -> None:
    root = tmp_path / "set"
    shapes.generate(root, **SMALL)
    made = read(root)
    with_former_manifest(root)
    before = read(root)
    shapes.generate(root, **SMALL)
    assert read(root) == before, "it is complete and stays as it is"
    shapes.generate(root, **SMALL, seed=4)
    shapes.generate(root, **SMALL)
    assert read(root) == made, "it may be replaced"
    with_former_manifest(root)
    (root / "train" / "000001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds something else"):
        shapes.generate(root, **SMALL)


@pytest.mark.slow
def test_jobs_that_start_at_once_share_one_set(tmp_path: Path) -> None:
    root = tmp_path / "set"
    code = (
        "import sys, time; from pathlib import Path; from datasets import shapes\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "shapes.generate(sys.argv[1], train_images=60, val_images=20, image_size=64)\n"
        "print(Path(sys.argv[1]).stat().st_ino)\n"
    )
    command = [sys.executable, "-c", code, str(root), str(time.time() + 6)]
    jobs = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {job.communicate(timeout=120)[0].strip() for job in jobs}
    assert all(job.returncode == 0 for job in jobs) and len(folders) == 1, "nobody replaces what another one has made"
    assert len(list((root / "train").iterdir())) == 60 and len(list((root / "val").iterdir())) == 20


def test_boxes_are_tight(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "s", train_images=30, val_images=1, image_size=96, min_objects=1, max_objects=1)
    dataset = coco_set(tmp_path / "s" / "train", tmp_path / "s" / "instances_train.json")
    for image, target in (dataset[index] for index in range(10)):
        x1, y1, x2, y2 = (cxcywh_to_xyxy(target.boxes)[0] * 96).tolist()
        pixels = image.float()
        inside = pixels[:, round(y1 + y2) // 2, round(x1 + x2) // 2]
        close = (pixels - inside[:, None, None]).abs().amax(0) < 12
        ys, xs = torch.nonzero(
            close[max(int(y1) - 3, 0) : int(y2) + 4, max(int(x1) - 3, 0) : int(x2) + 4], as_tuple=True
        )
        assert xs.max() - xs.min() <= x2 - x1 + 3 and ys.max() - ys.min() <= y2 - y1 + 3
