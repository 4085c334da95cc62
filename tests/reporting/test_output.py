"""Folders of results: what the program wrote is replaced on request, everything else stays as it is."""

import json
import os
import re
import resource
from pathlib import Path

import pytest

from detr.errors import UserError
from detr.files import read_regular
from detr.reporting import OutputFolder, RowFile

NAMES = ["a.jpg", "deep/b.jpg"]
RECORD = ".written.jsonl"


def write(folder: Path, content: bytes = b"drawn", names: list[str] = NAMES) -> None:
    output = OutputFolder(folder, names, overwrite=True)
    for name in names:
        output.write(name, content + name.encode())


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(folder: Path, named: Path) -> None:
    """With the file named, and nothing changed anywhere."""
    before = everything(folder)
    with pytest.raises(UserError) as caught:
        write(folder, b"new")
    assert str(caught.value).startswith(f"{named} exists already") and "output=DIR" in str(caught.value)
    assert everything(folder) == before


def test_what_it_wrote_itself_is_replaced(tmp_path: Path) -> None:
    for content in (b"first", b"second", b"second", b"third"):
        write(tmp_path / "out", content)
        found = everything(tmp_path / "out")
        assert {name: found[name] for name in NAMES} == {
            "a.jpg": content + b"a.jpg",
            "deep/b.jpg": content + b"deep/b.jpg",
        }
        assert found.keys() == {*NAMES, RECORD}


@pytest.mark.parametrize("name", NAMES)
def test_results_of_an_earlier_run_stay_unless_asked_for(tmp_path: Path, name: str) -> None:
    write(tmp_path, names=[name])
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r"earlier run\. Choose another folder with output=DIR.*overwrite=true"):
        OutputFolder(tmp_path, NAMES)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("below", ["", "deep/er"])
@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "closed"])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path, kind: str, below: str) -> None:
    place = tmp_path / "out"
    if kind == "a file":
        place.touch()
    elif kind == "a link to nothing":
        place.symlink_to("nowhere")
    else:
        place.mkdir(mode=0o500)
        if os.access(place, os.W_OK):
            pytest.skip("needs a user who may not write everywhere")
    with pytest.raises(UserError, match=rf"{place} is no folder.*output=DIR|may not write to {place}"):
        OutputFolder(place / below, NAMES)


def test_what_it_wrote_is_known(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "c.jpg").touch()
    (tmp_path / "a.jpg").write_bytes((tmp_path / "out" / "a.jpg").read_bytes())
    output = OutputFolder(tmp_path / "out", ())
    known = [path for path in tmp_path.rglob("*.jpg") if output.wrote(path)]
    assert sorted(known) == [tmp_path / "out" / name for name in NAMES]
    (tmp_path / "out" / "a.jpg").write_bytes(b"drawn over")
    assert not output.wrote(tmp_path / "out" / "a.jpg")


def test_a_list_of_rows_is_whole_after_each(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path, ["rows.json", "more.json"])
    rows, more = RowFile(output, "rows.json"), RowFile(output, "more.json", before='{"n": [', after="]}")
    wanted: list[dict[str, object]] = []
    for count in (0, 2, 0, 1, 3):
        new = [{"number": len(wanted) + index, "text": "]\n狗\ud800"} for index in range(count)]
        wanted += new
        rows.add(new)
        more.add(new)
        assert json.loads((tmp_path / "rows.json").read_bytes()) == wanted
        assert json.loads((tmp_path / "more.json").read_bytes()) == {"n": wanted}
        OutputFolder(tmp_path, ["rows.json"], overwrite=True)  # it knows the file again in each of its states


def test_a_disk_that_is_full_leaves_the_rows_before(tmp_path: Path) -> None:
    rows, count = RowFile(OutputFolder(tmp_path, []), "rows.json"), 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the next write beyond it is cut short
    try:
        with pytest.raises(UserError, match=r"Cannot write .*large\.jpg: "):
            OutputFolder(tmp_path, []).write("large.jpg", bytes(30_000))
        with pytest.raises(UserError, match=r"Cannot write .*rows\.json: (No space left|File too large)"):
            for count in range(99):  # noqa: B007 - how far it came is looked at below
                rows.add([{"text": "x" * 999}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(json.loads((tmp_path / "rows.json").read_bytes())) == count > 9
    OutputFolder(tmp_path, ["rows.json"], overwrite=True)  # it is known again
    assert not (tmp_path / "large.jpg").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("known", [False, True], ids=["in a new folder", "in a folder that was written to"])
def test_what_others_wrote_stays(tmp_path: Path, name: str, known: bool) -> None:
    if known:
        write(tmp_path, names=["c.jpg"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"photograph")
    assert_refused(tmp_path, tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"drawna.jp", b"drawna.jpg\n", b"drawndeep/b.jpg"])
def test_what_was_changed_since_stays(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "a.jpg").write_bytes(content)
    assert_refused(tmp_path, tmp_path / "a.jpg")


def test_what_was_removed_is_written_again(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "a.jpg").unlink()
    write(tmp_path, b"new")
    assert (tmp_path / "a.jpg").read_bytes() == b"newa.jpg"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link(tmp_path: Path, link: object) -> None:
    photograph, folder = tmp_path / "photograph", tmp_path / "out"
    write(folder)
    photograph.write_bytes((folder / "a.jpg").read_bytes())  # which even the record does not make the program's own
    (folder / "a.jpg").unlink()
    link(photograph, folder / "a.jpg")  # type: ignore[operator]
    if link is os.symlink:
        assert_refused(folder, folder / "a.jpg")
    else:
        write(folder, b"new")
    assert photograph.read_bytes() == b"drawna.jpg"


def test_links_that_lead_nowhere_and_to_folders(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.jpg").symlink_to(tmp_path / "nowhere")
    assert_refused(folder, folder / "a.jpg")
    assert not (tmp_path / "nowhere").exists()
    (folder / "a.jpg").unlink()
    write(folder)
    (folder / "deep").rename(tmp_path / "elsewhere")
    (folder / "deep").symlink_to(tmp_path / "elsewhere")
    assert_refused(folder, folder / "deep" / "b.jpg")
    assert (tmp_path / "elsewhere" / "b.jpg").read_bytes() == b"drawndeep/b.jpg"


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "nothing"])
@pytest.mark.parametrize("meanwhile", [True, False])
def test_nothing_is_created_through_a_link(tmp_path: Path, there: bool, meanwhile: bool) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    if there:
        elsewhere.mkdir()
    output = OutputFolder(folder, NAMES)
    (folder / "deep").symlink_to(elsewhere)
    message = re.escape(f"{folder / 'deep/b.jpg'} would be written to {elsewhere}, because a link leads there. Remove")
    with pytest.raises(UserError, match=message):
        output.write("deep/b.jpg", b"drawn") if meanwhile else OutputFolder(folder, NAMES)
    assert elsewhere.exists() == there and not list(elsewhere.glob("*"))


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    for content in (b"first", b"second"):
        write(tmp_path / "out", content)
    assert (tmp_path / "real" / "deep" / "b.jpg").read_bytes() == b"seconddeep/b.jpg"


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_a_record_with_half_a_line_is_gone_on_with(tmp_path: Path, cut: int) -> None:
    """The line is written before its file, which is not there yet."""
    write(tmp_path)
    whole = (tmp_path / RECORD).read_bytes()
    (tmp_path / RECORD).write_bytes(whole[:-cut])
    (tmp_path / "deep" / "b.jpg").unlink()
    for content in (b"second", b"third"):
        write(tmp_path, content)
        assert (tmp_path / "deep" / "b.jpg").read_bytes() == content + b"deep/b.jpg"
    lines = (tmp_path / RECORD).read_text().splitlines()
    assert len(lines) == 6 and all(map(json.loads, lines))


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path, NAMES)
    (tmp_path / "a.jpg").write_bytes(b"photograph")
    with pytest.raises(UserError, match=r"a\.jpg exists already"):
        output.write("a.jpg", b"drawn")
    assert (tmp_path / "a.jpg").read_bytes() == b"photograph"


@pytest.mark.parametrize("content", [b"", b"mine\n", b'{"format": "detr-written-1"}\n[1]\n', b"[" * 10**5])
def test_a_record_of_someone_else_stays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    assert_refused(tmp_path, tmp_path / RECORD)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_record_that_is_a_link_is_not_written_through(tmp_path: Path, link: object) -> None:
    write(tmp_path / "other")
    (tmp_path / "out").mkdir()
    link(tmp_path / "other" / RECORD, tmp_path / "out" / RECORD)  # type: ignore[operator]
    assert_refused(tmp_path / "out", tmp_path / "out" / RECORD)


@pytest.mark.timeout(20)
def test_only_regular_files_of_a_limited_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(13))
    assert read_regular(path, 13) == bytes(13)
    with pytest.raises(UserError, match=r"file has 13 bytes, wanted at most 12\. Replace or remove it\."):
        read_regular(path, 12)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="is a device or a pipe, wanted a file"):
            read_regular(special, 99)
