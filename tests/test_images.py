"""Reading of every kind of image file, sizes, padding."""

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin

from detr.errors import UserError
from detr.images import check_image, find_images, pad_to_batch, read_image, short_side_size, upright_tensor
from detr.models.backbones.base import IMAGENET_MEAN, IMAGENET_STD

HEIGHT, WIDTH = 11, 17


@pytest.fixture
def gradient() -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 15, y * 23, (x + y) * 9], axis=-1).astype(np.uint8)


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def test_rgb_png_is_exact(tmp_path: Path, gradient: np.ndarray) -> None:
    Image.fromarray(gradient).save(tmp_path / "a.png")
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "a.png")), gradient)


def test_jpeg_has_the_same_pixels_as_pillow(tmp_path: Path, gradient: np.ndarray) -> None:
    for mode in ("RGB", "L"):
        Image.fromarray(gradient).convert(mode).save(tmp_path / "a.jpg")
        expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
        np.testing.assert_array_equal(as_array(read_image(tmp_path / "a.jpg")), expected)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "tif"), ("1", "png")]
)
def test_other_modes_look_as_in_pillow(tmp_path: Path, gradient: np.ndarray, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient).convert(mode).save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(as_array(read_image(path)), expected)


def test_cmyk_jpeg(tmp_path: Path, gradient: np.ndarray) -> None:
    Image.fromarray(gradient).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    difference = as_array(read_image(tmp_path / "a.jpg")).astype(int) - gradient
    assert np.abs(difference).mean() < 8


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "a.png"))[..., 1], expected)


# Which value of a deep image is white


def saved(path: Path, values: np.ndarray, **tags: int | float) -> Path:
    """A TIFF or PNG file. tags: by their names in the standard of TIFF; `sbit` for PNG."""
    image = Image.fromarray(values)
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        for bits in tags.values():
            info.add(b"sBIT", bytes([int(bits)]))
        image.save(path, pnginfo=info)
        return path
    kinds = {"MaxSampleValue": (281, 3), "SMinSampleValue": (340, 12), "SMaxSampleValue": (341, 12)}
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        number, ifd.tagtype[kinds[name][0]] = kinds[name]
        ifd[number] = value
    image.save(path, tiffinfo=ifd)
    return path


def levels(most: float, kind: Any = np.uint16) -> np.ndarray:
    return np.linspace(0, most, 4096).reshape(64, 64).astype(kind)


DEEP: dict[str, tuple[str, np.ndarray, dict[str, int | float]]] = {
    # name: ending, values, what the file says
    "16 bits": ("tif", levels(65535), {}),
    "12 bits in 16, said": ("tif", levels(4095), {"MaxSampleValue": 4095}),
    "10 bits in 16, said": ("tif", levels(1023), {"MaxSampleValue": 1023}),
    "14 bits in 16, said": ("tif", levels(16383), {"SMaxSampleValue": 16383}),
    "12 bits in a PNG, said": ("png", levels(4095), {"sbit": 12}),
    "10 bits in a PNG, said": ("png", levels(1023), {"sbit": 10}),
    "12 bits on top in a PNG, as specified": ("png", levels(4095) * 16, {"sbit": 12}),
    "a wrong maximum": ("tif", levels(65535), {"MaxSampleValue": 255}),
    "32 bits, as 16": ("tif", levels(65535, np.int32), {}),
    "32 bits, as 8": ("tif", levels(255, np.int32), {}),
    "float to 1": ("tif", levels(1, np.float32), {}),
    "float to 1, a little above from resizing": ("tif", levels(1.003, np.float32), {}),
    "float to 255": ("tif", levels(255, np.float32), {}),
    "float to 65535": ("tif", levels(65535, np.float32), {}),
    "float to 1000, said": ("tif", levels(1000, np.float32), {"SMaxSampleValue": 1000.0}),
    "float from -1 to 1, said": (
        "tif", levels(2, np.float32) - 1, {"SMinSampleValue": -1.0, "SMaxSampleValue": 1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_have_all_gray_levels(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ending, values, tags = DEEP[name]
    pixels = as_array(read_image(saved(tmp_path / f"a.{ending}", values, **tags)))[..., 0].ravel().astype(int)
    assert (np.abs(pixels - np.linspace(0, 255, 4096)) < 1.6).all()
    assert len(set(pixels.tolist())) == 256 and not caplog.records


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_little_of_the_range_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str, bits: int
) -> None:
    for name in ("a", "b"):
        read_image(saved(tmp_path / f"{name}.{ending}", levels(2**bits - 1)))
    (record,) = caplog.records
    assert f"a.{ending}: its values reach only {2**bits - 1} of 65535" in record.getMessage()
    assert "MaxSampleValue" in record.getMessage() and "Further images of this folder" in record.getMessage()


def test_little_of_the_range_of_colors_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """12 of 16 bits a color, written by hand: Pillow keeps the upper 8."""
    rows = np.repeat(levels(4095)[..., None], 3, axis=2).astype("<u2")
    tags = [(256, 64), (257, 64), (259, 1), (262, 2), (273, 200), (277, 3), (278, 64), (279, rows.nbytes)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries.insert(2, struct.pack("<HHII", 258, 3, 3, 190))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4)
    (tmp_path / "a.tif").write_bytes(head.ljust(190, b"\0") + struct.pack("<3H", 16, 16, 16).ljust(10) + rows.tobytes())
    assert read_image(tmp_path / "a.tif").max() == 15
    assert "a.tif: its values reach only 15 of 255" in caplog.text


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_pixels_that_are_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture, white: float) -> None:
    values = levels(white, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    pixels = as_array(read_image(saved(tmp_path / "a.tif", values)))[..., 0]
    assert pixels[0, :3].tolist() == [0, 255, 0] and len(np.unique(pixels)) == 256
    assert "a.tif has 3 pixels that are NaN or infinite" in caplog.text


def test_values_below_black_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_image(saved(tmp_path / "a.tif", levels(2, np.float32) - 1)).max() == 255
    assert "a.tif has values below 0, which are read as black" in caplog.text


@pytest.mark.parametrize("filler", [1e20, 3.4e38])
def test_one_enormous_value_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture, filler: float) -> None:
    values = levels(255, np.float32)
    values[0, 0] = filler
    read_image(saved(tmp_path / "a.tif", values))
    assert f"a.tif: its greatest value, {filler:g}, is read as white" in caplog.text


def test_deep_images_from_memory() -> None:
    pixels = as_array(upright_tensor(Image.fromarray(levels(65535))))[..., 0]
    assert (pixels.min(), pixels.max()) == (0, 255)


# Orientation and sizes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_annotated_size_decides_about_rotation(tmp_path: Path, gradient: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient).save(tmp_path / "a.png", exif=exif)
    sideways = orientation >= 5
    shown = (WIDTH, HEIGHT) if sideways else (HEIGHT, WIDTH)
    assert read_image(tmp_path / "a.png", shown).shape[1:] == shown
    assert read_image(tmp_path / "a.png").shape[1:] == shown
    if sideways:
        np.testing.assert_array_equal(as_array(read_image(tmp_path / "a.png", (HEIGHT, WIDTH))), gradient)
    upright = as_array(read_image(tmp_path / "a.png"))
    undone = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    np.testing.assert_array_equal(undone, gradient)


def test_neither_orientation_fits(tmp_path: Path, gradient: np.ndarray) -> None:
    Image.fromarray(gradient).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"{WIDTH}x{HEIGHT} pixels, but its annotations are for 5x3"):
        read_image(tmp_path / "a.png", (3, 5))


def test_a_header_shows_a_wrong_size(tmp_path: Path, gradient: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient).save(tmp_path / "a.jpg", exif=exif)
    for size in ((HEIGHT, WIDTH), (WIDTH, HEIGHT), None):
        check_image(tmp_path / "a.jpg", size)
    with pytest.raises(UserError, match=r"17x11 \(or 11x17 turned upright\) pixels, but .* for 5x3"):
        check_image(tmp_path / "a.jpg", (3, 5))


@pytest.mark.parametrize("damage", [b"\xff", b"MM", b"\0\0\0\7"])
def test_damaged_orientation_leaves_the_image_as_it_is_stored(
    tmp_path: Path, gradient: np.ndarray, damage: bytes
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = exif.tobytes()
    for ending in ("jpg", "png", "webp"):
        for place in range(0, len(stored), 3):
            path = tmp_path / f"{place}.{ending}"
            damaged = (stored[:place] + damage + stored[place + len(damage) :]) if place else damage
            Image.fromarray(gradient).save(path, exif=b"Exif\0\0" + damaged.removeprefix(b"Exif\0\0"))
            assert sorted(read_image(path).shape) == [3, HEIGHT, WIDTH]


# Files that are no images


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_files_are_named(tmp_path: Path, gradient: np.ndarray, content: bytes | None) -> None:
    path = tmp_path / "a.jpg"
    if content is None:
        Image.fromarray(gradient).save(path)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg cannot be read.*Replace it"):
        read_image(path)


VECTORS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(marker) (w) file\nshowpage\n%%EOF\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(40),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "grib": b"GRIB" + bytes(40),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_raster_images_alone_are_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_: pytest.fail("starts a program"))
    (tmp_path / "a.jpg").write_bytes(VECTORS[kind])
    with pytest.raises(UserError, match=r"a\.jpg cannot be read: it is empty or no image"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / f"a.{kind}").write_bytes(VECTORS[kind])
    assert find_images(str(tmp_path)) == (tmp_path, [Path("a.jpg")])


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")  # whose length is limited
        os.close(folder)


STRANGE: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": make_socket,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", STRANGE)
def test_files_alone_are_images(tmp_path: Path, gradient: np.ndarray, kind: str) -> None:
    STRANGE[kind](tmp_path / "x.jpg")
    with pytest.raises(UserError, match=r"x\.jpg (cannot be read|is a device or a pipe|does not exist)"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="names no image"):
        find_images(str(tmp_path))
    with pytest.raises(UserError, match="names no image"):
        find_images(str(tmp_path / "*.jpg"))
    Image.fromarray(gradient).save(tmp_path / "a.jpg")
    assert find_images(str(tmp_path)) == (tmp_path, [Path("a.jpg")])


@pytest.mark.parametrize("ending", ["gif", "png", "tif", "webp"])
def test_the_first_of_several_frames_is_read(tmp_path: Path, gradient: np.ndarray, ending: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("white", "black", "red")]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / f"a.{ending}").shape == (3, HEIGHT, WIDTH)
    assert read_image(tmp_path / f"a.{ending}").min() >= 250


def test_short_side_sizes_are_those_of_the_published_recipe() -> None:
    # (height, width) -> as computed by hand: the long side is truncated, a limited short side is rounded.
    assert short_side_size(480, 640, 800, 1333) == (800, 1066)
    assert short_side_size(640, 427, 800, 1333) == (1199, 800)
    assert short_side_size(375, 500, 800, 1333) == (800, 1066)
    assert short_side_size(200, 640, 800, 1333) == (417, 1334)  # 1333 * 200 / 640 = 416.6
    assert short_side_size(500, 500, 480, None) == (480, 480)


@pytest.mark.parametrize(("height", "width"), [(1, 300), (5, 2000), (1, 1), (1, 5), (3, 100_000)])
@pytest.mark.parametrize("size", [1, 31, 800])
def test_every_side_has_a_pixel(height: int, width: int, size: int) -> None:
    for limit in (size, 2 * size, 128):
        tall, long = short_side_size(height, width, size, limit)
        assert min(tall, long) >= 1 and max(tall, long) <= 1.5 * max(limit, size) + 1  # rounded as published
        assert short_side_size(width, height, size, limit) == (long, tall)


def test_padding_and_normalizing() -> None:
    images = [torch.full((3, 5, 7), 255, dtype=torch.uint8), torch.zeros(3, 7, 3, dtype=torch.uint8)]
    batch = pad_to_batch(images)
    assert batch.images.shape == (2, 3, 7, 7) and batch.padded
    assert batch.mask[0, 5:].all() and not batch.mask[0, :5].any()
    assert batch.mask[1, :, 3:].all() and not batch.mask[1, :, :3].any()
    normalized = batch.normalized(IMAGENET_MEAN, IMAGENET_STD)
    floats = normalized.images
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        white, black = (1 - mean) / std, -mean / std
        torch.testing.assert_close(floats[0, channel, :5], torch.full((5, 7), white))
        torch.testing.assert_close(floats[1, channel, :, :3], torch.full((7, 3), black))
    assert floats[batch.mask.unsqueeze(1).expand(-1, 3, -1, -1)].abs().max() == 0
    even = pad_to_batch([images[0], images[0]])
    assert not even.padded and normalized.normalized([0.5] * 3, [0.5] * 3) is normalized and even.padded_to(1) is even
    more = even.normalized(IMAGENET_MEAN, IMAGENET_STD).padded_to(4)
    assert more.images.shape == (2, 3, 8, 8) and more.padded and more.images[:, :, 5:].abs().max() == 0
    assert more.mask[:, 5:].all() and more.mask[:, :, 7:].all() and not more.mask[:, :5, :7].any()
