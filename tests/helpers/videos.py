"""Videos to read: small ones, made frame by frame."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def make_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    rate: Fraction | int = 25,
    rotation: int = 0,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """rotation: against the clock, that players are to show it with. times: of frames, in milliseconds."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "5", "bf": "0"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def bright_column(number: int, *, count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """An image whose bright column says which of `count` frames it is; the upper half is red."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = 90
    start = number * width // count
    pixels[:, start : start + width // count] = 255
    return pixels


def frames(count: int, **size: int) -> list[np.ndarray]:
    return [bright_column(number, count=count, **size) for number in range(count)]


def properties(path: Path) -> dict[str, Any]:
    """Of a video's stream, read by PyAV, with the times of its frames."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        return {
            "rate": stream.average_rate,
            "size": (stream.codec_context.height, stream.codec_context.width),
            "codec": stream.codec_context.name,
            "pixels": stream.codec_context.pix_fmt,
            "times": times,
        }
