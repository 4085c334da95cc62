"""Files that are damaged anywhere, or that are no files: none loads silently, fills the memory or waits for ever."""

import errno
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.errors import UserError
from detr.files import read_tensors, write_tensors
from detr.weights import newest, read_checkpoint, save

PARTS = {"config": {"data": {}, "model": {}}, "categories": [], "training": {}}


def content(value: float = 1.0) -> dict[str, Any]:
    return {**PARTS, "model": {f"layer{n}.weight": torch.full((7, 5), value) for n in range(5)}}


def step_of(path: Path) -> float:
    return float(read_checkpoint(path).state["layer0.weight"][0, 0])


@pytest.mark.parametrize("chosen", ["anywhere", "at the end"])
def test_a_single_bit_never_flips_silently(tmp_path: Path, chosen: str) -> None:
    """In the tensors, the pickle, or zip's own tables, of which the file is half."""
    whole, spoilt = tmp_path / "whole.pt", tmp_path / "spoilt.pt"
    save(whole, content())
    data = whole.read_bytes()
    places = torch.randint(8 * len(data), (300,), generator=torch.Generator().manual_seed(1)).tolist()
    for place in places if chosen == "anywhere" else range(8 * (len(data) - 40), 8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        spoilt.write_bytes(flipped)
        with pytest.raises(UserError, match=r"spoilt\.pt is (refused: it is damaged|cut short or damaged)"):
            read_checkpoint(spoilt)


@pytest.mark.parametrize("sealed", [True, False], ids=["ours", "of torch.save alone"])
def test_zeros_in_the_weights_are_found(tmp_path: Path, sealed: bool) -> None:
    path, weights = tmp_path / "a.pt", {**PARTS, "model": {"a": torch.rand(100_000)}, "format": "detr-checkpoint-2"}
    write_tensors(path, weights) if sealed else torch.save(weights, path)
    assert read_checkpoint(path).state["a"].equal(weights["model"]["a"])
    data = bytearray(path.read_bytes())
    data[100_000:165_536] = bytes(65_536)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.pt is cut short or damaged \(BadZipFile: .*checksum"):
        read_checkpoint(path)


def test_the_one_before_a_damaged_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0):
        save(path, content(value), keep=2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    found = newest(path)
    assert found is not None and found.path.name == "last-1.pt" and "The one before it is taken" in caplog.text


def test_a_save_never_drops_the_only_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the newest is damaged, the one before it stays until there is a new one."""
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0):
        save(path, content(value), keep=2)
    path.write_bytes(b"damaged")
    replace = Path.replace

    def watched(source: Path, target: Path) -> Path:
        found = newest(path)
        assert found is not None and found.state["layer0.weight"][0, 0] in (1.0, 3.0)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", watched)
    save(path, content(3.0), keep=2)
    assert step_of(path) == 3.0 and sorted(p.name for p in tmp_path.iterdir()) == ["last-1.pt", "last.pt"]


def test_archives_that_unpack_to_more_than_their_size_are_refused(tmp_path: Path) -> None:
    torch.save({**content(), "model": {"a": torch.zeros(10**6)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    with pytest.raises(UserError, match=r"bomb\.pt .*would unpack to more than its own size"):
        read_tensors(tmp_path / "bomb.pt")


def test_lists_that_hold_themselves_or_double_have_an_end(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    doubled: list[Any] = ["x"]
    for _ in range(45):
        doubled = [doubled, doubled]
    for value in (endless, doubled):
        save(tmp_path / "a.pt", {**content(), "config": {"data": value, "model": {}}})
        with pytest.raises(UserError, match=r"a\.pt holds .* as config, wanted at most"):
            read_checkpoint(tmp_path / "a.pt")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match="is a device or a pipe, wanted a file"):
        read_tensors(tmp_path / f"a{suffix}")


def test_names_of_others_beside_checkpoints_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    (tmp_path / "last-1.pt").mkdir()
    os.mkfifo(tmp_path / "last-2.pt")
    (tmp_path / "last-3.pt").symlink_to(tmp_path / "none")
    (tmp_path / "last-backup.pt").write_bytes(b"")
    assert newest(path) is None
    for value in (1.0, 2.0, 3.0):
        save(path, content(value), keep=2)
        assert (found := newest(path)) is not None and found.path == path
    assert step_of(path) == 3.0 and (tmp_path / "last-1.pt").is_dir()


# Saving where a file system cannot do all that others can.


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


LINKS = [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EACCES]


@pytest.mark.parametrize("number", LINKS, ids=errno.errorcode.get)
@pytest.mark.parametrize("keep", [2, 3])
def test_saving_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, keep: int) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0, 3.0, 4.0):
        save(path, content(value), keep=keep)
    names = ["last.pt", "last-1.pt", "last-2.pt"][:keep]
    assert [step_of(tmp_path / name) for name in names] == [4.0, 3.0, 2.0][:keep]
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("call", ["rename", "second rename"])
def test_killed_without_hard_links_the_newest_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0):
        save(path, content(value), keep=2)
    replace, left = Path.replace, [1 if call == "rename" else 2]

    def killed(source: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, content(3.0), keep=2)
    monkeypatch.setattr(Path, "replace", replace)
    found = newest(path)
    assert found is not None and found.state["layer0.weight"][0, 0] == (2.0 if call == "rename" else 3.0)
    save(path, content(4.0), keep=2)
    assert newest(path).path == path and step_of(path) == 4.0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_folder_that_cannot_be_synchronized_is_no_lost_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    called, of_folders = getattr(os, name), []

    def of_folder(what: Any, *arguments: Any) -> Any:
        if os.fstat(what).st_mode & stat.S_IFDIR if isinstance(what, int) else Path(what).is_dir():
            of_folders.append(what)
            failing(number)()
        return called(what, *arguments)

    monkeypatch.setattr(os, name, of_folder)
    save(tmp_path / "last.pt", content())
    assert len(of_folders) == 1
    monkeypatch.undo()
    assert step_of(tmp_path / "last.pt") == 1.0


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.ENOSPC, "Make room, then go on"),
        (errno.EDQUOT, "Make room, then go on"),
        (errno.EROFS, "See to it that the folder can be written, then go on"),
        (errno.EIO, "See to it that the folder can be written, then go on"),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_room_is_asked_for_on_a_full_disk_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    save(tmp_path / "last.pt", content())
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(UserError, match=rf"Cannot write .*last\.pt: .*{os.strerror(number)}.*whole\. {remedy}"):
        save(tmp_path / "last.pt", content(2.0))
    assert step_of(tmp_path / "last.pt") == 1.0 and not list(tmp_path.glob("*.tmp"))
