"""Saving that survives anything, reading that trusts nothing."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.errors import UserError
from detr.types import Category
from detr.weights import Checkpoint, Published, Weights, newest, read_checkpoint, read_weights, save
from detr.weights.reading import FORMAT

OTHER_PARTS = {"config": {"data": {}, "model": {}}, "categories": [], "training": {}}


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    save(path, {**OTHER_PARTS, "model": {"a": torch.ones(3)}})

    def fail(content: Any, file: Any) -> None:
        file.write(b"half of a checkpoint")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"Cannot write .*last\.pt: .*No space left.*What was saved before is whole"):
        save(path, {"model": {"a": torch.zeros(3)}})
    assert [found.name for found in path.parent.iterdir()] == ["last.pt"]
    assert torch.equal(read_checkpoint(path).state["a"], torch.ones(3))


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_loading_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"format": FORMAT, "model": Hostile(marker)}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match=r"hostile\.pt is refused.*could run code"):
        read_checkpoint(tmp_path / "hostile.pt")
    assert not marker.exists()


@pytest.mark.parametrize("length", [0, 1, 100, 2000])
def test_damaged_files_are_refused(tmp_path: Path, length: int) -> None:
    save(tmp_path / "whole.pt", {"model": {"a": torch.ones(1000)}})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:length])
    with pytest.raises(UserError, match=r"cut\.pt is (refused|cut short)"):
        read_checkpoint(tmp_path / "cut.pt")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    torch.save({"model": {"class_embed.weight": torch.ones(1)}}, tmp_path / "published.pth")
    with pytest.raises(UserError, match=r"is of DETR, from its authors.*weights=PATH.*model=detr\."):
        read_checkpoint(tmp_path / "published.pth")


@pytest.mark.parametrize("missing", ["model", "config", "categories", "training"])
def test_incomplete_checkpoints_are_refused(tmp_path: Path, missing: str) -> None:
    parts = {**OTHER_PARTS, "model": {"a": torch.ones(3)}}
    save(tmp_path / "last.pt", {name: part for name, part in parts.items() if name != missing})
    with pytest.raises(UserError, match=rf"last\.pt lacks {missing}.*incomplete"):
        read_weights(tmp_path / "last.pt")


@pytest.mark.parametrize("broken", [{"categories": [{"id": 1}]}, {"categories": [3]}, {"model": {"a": 3}}])
def test_damaged_parts_are_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    save(tmp_path / "last.pt", {**OTHER_PARTS, "model": {"a": torch.ones(3)}, **broken})
    with pytest.raises(UserError, match=r"last\.pt .*incomplete"):
        read_weights(tmp_path / "last.pt")


def test_every_kind_of_file_is_recognized(tmp_path: Path) -> None:
    state = {"a": torch.ones(3)}
    save(tmp_path / "ours.pt", {**OTHER_PARTS, "categories": [{"id": 4, "name": "cat"}], "model": state})
    torch.save({**OTHER_PARTS, "model": state, "format": "detr-checkpoint-1"}, tmp_path / "before.pt")
    torch.save({"class_embed.weight": torch.ones(3, 2)}, tmp_path / "published.pth")
    torch.save({"model": state}, tmp_path / "alone.pt")
    ours, before, published, alone = (
        read_weights(tmp_path / name) for name in ("ours.pt", "before.pt", "published.pth", "alone.pt")
    )
    assert isinstance(ours, Checkpoint) and ours.categories == [Category(4, "cat")] and ours.training == {}
    assert isinstance(before, Checkpoint) and before.training is None
    assert isinstance(published, Published) and list(published.state) == ["heads.0.class_head.weight"]
    assert type(alone) is Weights and alone.state.keys() == state.keys()
    with pytest.raises(UserError, match=r"alone\.pt is another program's file or holds weights alone.*weights=PATH\.$"):
        read_checkpoint(tmp_path / "alone.pt")


def test_classes_of_stuff_are_kept(tmp_path: Path) -> None:
    rows = [{"id": 4, "name": "cat"}, {"id": 5, "name": "sky", "is_thing": False}]
    save(tmp_path / "a.pt", {**OTHER_PARTS, "categories": rows, "model": {"a": torch.ones(3)}})
    assert read_checkpoint(tmp_path / "a.pt").categories == [Category(4, "cat"), Category(5, "sky", is_thing=False)]
    save(tmp_path / "b.pt", {**OTHER_PARTS, "categories": [{**rows[0], "is_thing": 1}], "model": {"a": torch.ones(3)}})
    with pytest.raises(UserError, match=r"categories\[0\]\.is_thing"):
        read_checkpoint(tmp_path / "b.pt")


def test_checkpoints_of_later_versions_are_refused(tmp_path: Path) -> None:
    torch.save({**OTHER_PARTS, "model": {}, "format": "detr-checkpoint-9"}, tmp_path / "later.pt")
    with pytest.raises(UserError, match=r"later\.pt is of format detr-checkpoint-9, wanted detr-checkpoint-3"):
        read_weights(tmp_path / "later.pt")


def test_the_newest_is_one_that_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    assert newest(path) is None
    for value in range(12):
        save(path, {**OTHER_PARTS, "model": {"a": torch.full((3,), value)}}, keep=11)
    for name in ("last-backup.pt", "last--1.pt", "last-2-old.pt", "last-\N{SUPERSCRIPT TWO}.pt", "best.pt", "last-.pt"):
        (tmp_path / name).write_bytes(b"")
    for age in range(11):
        found = newest(path)
        assert found is not None and found.state["a"].tolist() == [11 - age] * 3
        found.path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last-10\.pt"):
        newest(path)
