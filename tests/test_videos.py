"""Videos: frames in order and upright, times, damage, and what is written again."""

import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr.errors import UserError
from detr.videos import VideoWriter, is_video, read_video
from tests.helpers.videos import frames, make_video, properties

av = pytest.importorskip("av")


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "avi", "webm"])
def test_frames_come_in_order_with_their_times(tmp_path: Path, ending: str) -> None:
    codec = "libvpx" if ending == "webm" else "libx264"
    made = make_video(tmp_path / f"a.{ending}", frames(8), rate=8, codec=codec)
    read = list(read_video(made))
    assert is_video(made) and [frame.index for frame in read] == list(range(8))
    assert [float(frame.time) for frame in read] == pytest.approx([index / 8 for index in range(8)], abs=2e-3)
    for index, frame in enumerate(read):
        assert frame.image.shape == (3, 48, 64) and float(frame.rate) == pytest.approx(8, abs=0.01)
        assert int(frame.image.float().mean((0, 1)).argmax()) // 8 == index
    every_third = list(read_video(made, 3))
    assert [(frame.index, frame.rate * 3) for frame in every_third] == [(index, read[0].rate) for index in (0, 3, 6)]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_videos_are_upright(tmp_path: Path, rotation: int) -> None:
    """The red upper half goes where a player shows it: rotation turns it against the clock."""
    made = make_video(tmp_path / "a.mp4", frames(8), rotation=rotation)
    image = next(read_video(made)).image[:, 3:-3, 3:-3].float()
    assert image.shape[1:] == ((42, 58) if rotation == 180 else (58, 42))
    where = {90: image[0, :, :10], 180: image[0, -10:], -90: image[0, :, -10:]}[rotation]
    assert float(where.median()) > 60 and float(image[2].median()) < 30
    opposite = {90: image[0, :, -10:], 180: image[0, :10], -90: image[0, :, :10]}[rotation]
    assert float(opposite.median()) < 30


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), Fraction(50, 3), 60])
def test_what_is_written_has_the_rate_and_the_times_of_what_was_read(tmp_path: Path, rate: Fraction | int) -> None:
    made = make_video(tmp_path / "a.mp4", frames(9), rate=rate)
    with (tmp_path / "b.mp4").open("wb") as file, VideoWriter(file, next(read_video(made)).rate) as writer:
        for frame in read_video(made):
            writer.add(Image.fromarray(frame.image.permute(1, 2, 0).numpy()), frame.time)
    before, after = properties(made), properties(tmp_path / "b.mp4")
    assert after["rate"] == before["rate"] == rate and after["times"] == before["times"]
    assert (after["codec"], after["pixels"]) == ("h264", "yuv420p")
    for old, new in zip(read_video(made), read_video(tmp_path / "b.mp4"), strict=True):
        assert (old.image.float() - new.image.float()).abs().mean() < 4


def test_threads_that_decode_never_call_python(tmp_path: Path) -> None:
    next(read_video(make_video(tmp_path / "a.mp4", frames(2))))
    assert av.logging.get_level() is None


def test_frames_at_uneven_times_keep_them(tmp_path: Path) -> None:
    times = [0, 40, 80, 500, 540, 1500]
    made = make_video(tmp_path / "a.mkv", frames(6), times=times)
    with (tmp_path / "b.mp4").open("wb") as file, VideoWriter(file, next(read_video(made)).rate) as writer:
        for frame in read_video(made):
            writer.add(Image.fromarray(frame.image.permute(1, 2, 0).numpy()), frame.time)
    written = [float(time) * 1000 for time in properties(tmp_path / "b.mp4")["times"]]
    assert written == pytest.approx(times, abs=1)


def test_odd_sizes_and_changes_of_size_are_written(tmp_path: Path) -> None:
    with (tmp_path / "a.mp4").open("wb") as file, VideoWriter(file, Fraction(10)) as writer:
        for index, size in enumerate([(37, 23), (37, 23), (80, 90)]):
            writer.add(Image.new("RGB", size, "green"), Fraction(index, 10))
    found = properties(tmp_path / "a.mp4")
    assert found["size"] == (24, 38) and len(found["times"]) == 3
    assert next(read_video(tmp_path / "a.mp4")).image[1].min() > 100, "no black edge"


@pytest.mark.parametrize("ending", ["avi", "mkv", "mp4"])
def test_a_truncated_video_gives_its_frames_and_says_so(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    made = make_video(tmp_path / f"a.{ending}", list(noise), **options)
    whole = made.read_bytes()
    assert len(list(read_video(made))) == 60
    made.write_bytes(whole[: len(whole) // 2])
    read = read_video(made)
    found = []
    with pytest.raises(UserError, match=r"is cut short: it ends after [23]\d frames, 1\.\d s"):
        for frame in read:
            found.append(frame)
    assert 20 <= len(found) < 40 and [frame.index for frame in found] == list(range(len(found)))


def test_a_damaged_part_is_left_out_and_told(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    made = make_video(tmp_path / "a.avi", list(noise), codec="libx264")
    content = bytearray(made.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    made.write_bytes(content)
    found = []
    with pytest.raises(UserError, match=r"is damaged: \d+ of its frames"):
        for frame in read_video(made):
            found.append(frame)
    assert len(found) >= 20


@pytest.mark.parametrize(
    "content",
    [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n", b"ffconcat version 1.0\nfile other.mp4\n"],
)
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    """Lists of other files among it, which FFmpeg would follow."""
    make_video(tmp_path / "other.mp4", frames(4))
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read: .* Replace it"):
        list(read_video(tmp_path / "a.mp4"))
    with pytest.raises(UserError, match="cannot be read: no such file"):
        list(read_video(tmp_path / "none.mp4"))


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """Of 150 frames of 330 kB each, 50 MB in all, a few are there at a time."""
    made = make_video(tmp_path / "a.mp4", [frame for _ in range(25) for frame in frames(6, height=288, width=384)])
    tracemalloc.start()
    with (tmp_path / "b.mp4").open("wb") as file, VideoWriter(file, Fraction(25)) as writer:
        for frame in read_video(made):
            writer.add(Image.fromarray(frame.image.permute(1, 2, 0).numpy()), frame.time)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
