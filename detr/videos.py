"""Videos, frame by frame: read upright, and written. PyAV, of the extra `video`, is imported where it is needed."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from detr.errors import UserError
from detr.images import MAX_PIXELS

VIDEO_ENDINGS = frozenset(
    (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv")
)
# Containers of pictures alone: FFmpeg also knows lists of other files and of addresses, whatever their names end in.
_READ_ONLY = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,ogg,asf",
}
# Rates of containers that know none, and what a video may end before its stated end without being cut short: a part of
# its length, and frames, which edit lists and sound that goes on after the pictures explain.
_RATE, _SHARE, _FRAMES = Fraction(25), Fraction(1, 50), 3
_CODECS = {"libx264": {"crf": "20", "preset": "veryfast"}, "mpeg4": {"qscale": "3"}}  # the first one that is there
_MOST_TICKS = 65535  # a second, which MPEG-4 can count


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    image: RGB, upright. index: its number in the video, from 0. time: seconds from the first frame.
    rate: frames a second, of those that are read.
    """

    image: UInt8[Tensor, "3 height width"]
    index: int
    time: Fraction
    rate: Fraction


def is_video(path: Path) -> bool:
    """Whether a file's name ends as that of a video."""
    return path.suffix.lower() in VIDEO_ENDINGS


def read_video(path: str | Path, stride: int = 1) -> Iterator[Frame]:
    """Every `stride`-th frame of a video, one at a time: no more than a few are in memory.

    Frames that cannot be decoded are left out. Raises UserError where PyAV is missing, where nothing can be read, and,
    after the last frame, where the video is cut short or parts of it are damaged.
    """
    path, av = Path(path), _pyav()
    index, last, damaged, missing = -1, Fraction(0), 0, False
    first: Fraction | None = None
    try:
        with av.open(f"file:{path.absolute()}", options=_READ_ONLY) as container:
            stream = _pictures(container, path)
            rate = stream.average_rate or stream.guessed_rate or _RATE
            for decoded in _decoded(container, stream, av):
                if decoded is None:
                    damaged += 1
                    continue
                index += 1
                damaged += decoded.is_corrupt
                if decoded.pts is None:
                    last += 1 / rate if index else 0
                else:
                    shown = decoded.pts * Fraction(decoded.time_base)
                    first = shown if first is None else first
                    last = shown - first
                if index % stride == 0:
                    yield Frame(_upright(decoded), index, last, rate / stride)
            missing = _cut_short(stream, container, index + 1, last + 1 / rate, rate)
    except UserError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if index < 0:
            raise UserError(f"Video {path} cannot be read: {_reason(error)}. Replace it.") from None
        missing = True
    if index < 0:
        raise UserError(f"Video {path} cannot be read: no frame of it is whole. Replace it.")
    if missing:
        raise UserError(f"Video {path} is cut short: it ends after {index + 1} frames, {float(last):.1f} s.")
    if damaged:
        raise UserError(f"Video {path} is damaged: {damaged} of its frames are missing or wrong.")


class VideoWriter:
    """An MP4 file of drawn frames, H.264 where PyAV has it. A context manager.

    file: open for writing. rate: frames a second. The first frame decides about the size; a side of an odd number of
    pixels gets another pixel, because players know no other. Frames keep their times.
    """

    def __init__(self, file: BinaryIO, rate: Fraction) -> None:
        av = _pyav()
        self._av = av
        self._container = av.open(file, "w", format="mp4")
        self._stream: Any = None
        self._rate, self._last = rate.limit_denominator(1001), -1
        ticks = rate.numerator * -(-1000 // rate.numerator)  # of at most a millisecond, and a whole number of a frame
        self._tick = Fraction(1, min(ticks, _MOST_TICKS))

    def add(self, picture: Image.Image, time: Fraction) -> None:
        """The next frame. time: seconds from the start, larger than before."""
        if self._stream is None:
            self._stream = self._opened(picture)
        size = self._stream.width, self._stream.height
        if not all(0 <= side - own <= 1 for side, own in zip(size, picture.size, strict=True)):
            picture = picture.resize(size)  # the video changes its size on the way
        pixels = np.asarray(picture)
        more = [(0, size[1] - pixels.shape[0]), (0, size[0] - pixels.shape[1]), (0, 0)]
        frame = self._av.VideoFrame.from_ndarray(np.pad(pixels, more, mode="edge"), format="rgb24")
        self._last = max(round(time / self._tick), self._last + 1)
        frame.pts, frame.time_base = self._last, self._tick
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _opened(self, picture: Image.Image) -> Any:
        codec = next(name for name in _CODECS if name in self._av.codecs_available)
        stream = self._container.add_stream(codec, rate=self._rate, options=_CODECS[codec])
        stream.width, stream.height = (side + side % 2 for side in picture.size)
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", self._tick
        return stream


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("Videos need the package av. Install it with pip install 'detr-framework[video]'.") from None
    # What matters becomes a message of ours. Any other level calls Python from the threads that decode: they wait for
    # the interpreter's lock while the thread that has it closes the video and waits for them, for ever.
    av.logging.set_level(None)
    return av


def _pictures(container: Any, path: Path) -> Any:
    """The video stream, of which no frame is read yet."""
    if not container.streams.video:
        raise ValueError("it has sound alone")
    stream = container.streams.video[0]
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise UserError(f"Video {path} is refused: its frames have more than {MAX_PIXELS} pixels. Scale it down.")
    stream.thread_type = "AUTO"
    return stream


def _decoded(container: Any, stream: Any, av: Any) -> Iterator[Any]:
    """The frames of a stream, None for a part that cannot be decoded."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            yield None
            continue
        yield from frames


def _upright(frame: Any) -> UInt8[Tensor, "3 height width"]:
    """A frame as players show it: turned as its display matrix says, in quarters of a turn against the clock."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _cut_short(stream: Any, container: Any, count: int, seconds: Fraction, rate: Fraction) -> bool:
    """Whether a video that was read to its end has clearly less than it says of itself."""
    if stream.frames:
        return count < stream.frames * (1 - _SHARE) - _FRAMES
    stated = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 1_000_000)
    return seconds < stated * (1 - _SHARE) - max(_FRAMES / rate, Fraction(1))


def _reason(error: Exception) -> str:
    system = getattr(error, "strerror", None)
    return str(system or error).rstrip(".").lower()
