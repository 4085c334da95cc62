"""Reading of every kind of image file, sizes, padding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr.errors import UserError
from detr.images import pad_to_batch, read_image, short_side_size
from detr.types import IMAGE_MEAN, IMAGE_STD

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


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_files_are_named(tmp_path: Path, gradient: np.ndarray, content: bytes | None) -> None:
    path = tmp_path / "a.jpg"
    if content is None:
        Image.fromarray(gradient).save(path)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg cannot be read.*Replace it"):
        read_image(path)


def test_short_side_sizes_are_those_of_the_published_recipe() -> None:
    # (height, width) -> as computed by hand: the long side is truncated, a limited short side is rounded.
    assert short_side_size(480, 640, 800, 1333) == (800, 1066)
    assert short_side_size(640, 427, 800, 1333) == (1199, 800)
    assert short_side_size(375, 500, 800, 1333) == (800, 1066)
    assert short_side_size(200, 640, 800, 1333) == (417, 1334)  # 1333 * 200 / 640 = 416.6
    assert short_side_size(500, 500, 480, None) == (480, 480)


def test_padding_and_normalizing() -> None:
    images = [torch.full((3, 5, 7), 255, dtype=torch.uint8), torch.zeros(3, 7, 3, dtype=torch.uint8)]
    batch = pad_to_batch(images)
    assert batch.images.shape == (2, 3, 7, 7) and batch.padded
    assert batch.mask[0, 5:].all() and not batch.mask[0, :5].any()
    assert batch.mask[1, :, 3:].all() and not batch.mask[1, :, :3].any()
    floats = batch.normalized().images
    for channel in range(3):
        white, black = (1 - IMAGE_MEAN[channel]) / IMAGE_STD[channel], -IMAGE_MEAN[channel] / IMAGE_STD[channel]
        torch.testing.assert_close(floats[0, channel, :5], torch.full((5, 7), white))
        torch.testing.assert_close(floats[1, channel, :, :3], torch.full((7, 3), black))
    assert floats[batch.mask.unsqueeze(1).expand(-1, 3, -1, -1)].abs().max() == 0
    assert not pad_to_batch([images[0], images[0]]).padded
