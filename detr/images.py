"""From image files to a padded batch: reading, resizing to a short side, padding."""

import base64
import glob
import io
import itertools
import math
import re
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath

import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detr.depth import Depth, colors_to_8_bits, depth_of, to_8_bits
from detr.errors import UserError
from detr.files import open_regular
from detr.text import printable
from detr.types import ImageBatch

# Raster images alone: for others Pillow starts programs (EPS), or follows what they embed.
FORMATS = frozenset(
    {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"}
)
_EXIF_ORIENTATION, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 0x0112, 322, 323
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises for damaged files, in one version or another.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    MemoryError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)
# Where Pillow refuses an image; one of this size takes 2 to 3 GB to read. It warns of half of that already.
MAX_PIXELS = 178_956_970
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_WANTED = "Give an image file, a folder of images, or a quoted pattern such as 'photos/*.jpg'."


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> UInt8[Tensor, "3 height width"]:
    """Read a raster image, one of FORMATS, as 8-bit RGB, channels-last in memory, which resizes fastest.

    Grayscale, palette, CMYK and 16-bit images are converted, transparency is dropped; of several frames the first one
    is read. size: (height, width) that the annotations were made for. It decides whether the orientation stored in the
    file's EXIF data is meant; where it cannot decide, and without it, the image is turned upright, as viewers and
    annotation tools show it.

    Raises UserError where the file is missing, empty or damaged, has neither of the two sizes, or more than MAX_PIXELS.
    """
    with _opened(path) as file:
        depth = depth_of(file)
        return _to_tensor(_turned(file, size, path), depth, path)


def check_image(path: str | Path, size: tuple[int, int] | None = None) -> bool:
    """Whether the EXIF data turn an image without that `size` could tell whether this is meant.

    Raises the UserErrors of `read_image` that the file's header shows, without reading its pixels.
    """
    with _opened(path) as file:
        if size != (file.height, file.width):
            _orientation_for(file, size, path)
            return False
        # Pillow would read all of a PNG file for EXIF data that may stand at its end.
        known = file.format != "PNG" or "exif" in file.info
        return known and _orientation_for(file, size, path) in _UPRIGHT


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file turned upright, as annotation tools show it, from its header alone.

    Raises the UserErrors of `read_image` that the header shows.
    """
    with _opened(path) as file:
        return (file.width, file.height) if _orientation(file) in (5, 6, 7, 8) else (file.height, file.width)


def read_gray(path: str | Path, least: int) -> Image.Image:
    """An image in shades of gray, as stored: a JPEG scaled down, which is quick, to sides of at least so many pixels.

    Raises the UserErrors of `read_image`.
    """
    with _opened(path) as file:
        file.draft("L", (least, least))
        return file.convert("L")


def upright_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """A Pillow image as `read_image` reads a file: 8-bit RGB, turned upright as its EXIF data say."""
    name = getattr(image, "filename", "") or "An image"
    return _to_tensor(_turned(image, None, name), depth_of(image), name)


def _to_tensor(image: Image.Image, depth: Depth, name: str | Path) -> UInt8[Tensor, "3 height width"]:
    """Of any mode, not turned. Values of more than 8 bits are scaled, where Pillow alone clips them."""
    gray = image.mode.startswith("I") or image.mode == "F"
    if gray:
        image = to_8_bits(image, depth, name)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if depth.bits == 16 and not gray:
        image = colors_to_8_bits(image, depth, name)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file, of which only the header is read yet; its damages, also those found inside, as a UserError."""
    Image.init()
    try:
        with open_regular(path) as stream, Image.open(stream, formats=sorted(FORMATS & Image.OPEN.keys())) as image:
            check_pixels(image)
            yield image
    except FileNotFoundError:
        raise UserError(f"Image file {path} does not exist.") from None
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"Image file {path} is refused: it would decompress to more than {MAX_PIXELS} pixels. Scale it down or cut "
            "it into pieces, and annotate those; or remove it from the annotations."
        ) from None
    except DAMAGE as error:
        raise UserError(
            f"Image file {path} cannot be read: {_reason(error)}. Replace it, or remove it from the annotations."
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty or no image"
    system = error.strerror if isinstance(error, OSError) else None  # without number and path
    return system or str(error).rstrip(".") or type(error).__name__


def check_pixels(image: Image.Image, most: int = MAX_PIXELS) -> None:
    """Before anything is decoded. A tile of a TIFF file is decoded whole, even where it is larger than the image.

    Raises Image.DecompressionBombError where there are more than `most` pixels.
    """
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 0) for tag in (_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH)]
    if not all(isinstance(extent, int) for extent in tile):
        raise ValueError("the size of its tiles is no number")
    if max(image.width * image.height, math.prod(tile)) > most:
        raise Image.DecompressionBombError


def _turned(image: Image.Image, size: tuple[int, int] | None, path: str | Path) -> Image.Image:
    orientation = _orientation_for(image, size, path)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation_for(image: Image.Image, size: tuple[int, int] | None, path: str | Path) -> int:
    """How to turn an image to the size of its annotations, as EXIF counts orientations; 1 leaves it as it is stored."""
    stored = (image.height, image.width)
    orientation = _orientation(image)
    sideways = orientation in (5, 6, 7, 8)
    shown = stored[::-1] if sideways else stored
    if size is None or size == shown:
        return orientation
    if size == stored:
        return 1
    fits = f"{stored[1]}x{stored[0]}" + (f" (or {shown[1]}x{shown[0]} turned upright)" if sideways else "")
    raise UserError(
        f"Image file {path} is {fits} pixels, but its annotations are for {size[1]}x{size[0]}. "
        "Use the images that were annotated, or correct width and height in the annotation file."
    )


def _orientation(image: Image.Image) -> int:
    """As the EXIF data have it; 1 where they are damaged, as viewers show such an image."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except DAMAGE:
        return 1


def find_images(source: str, more: Collection[str] = (), *, option: str = "source") -> tuple[Path, list[Path]]:
    """The images that a file name, a folder or a pattern names: a folder, and their sorted paths relative to it.

    A path that exists is no pattern, whatever characters it has. Of a folder's or a pattern's files those count whose
    ending is that of a raster image, or among `more`, in small letters. option: the name of `source`, for messages.
    Raises UserError where there is none, and for a URL.
    """
    path, endings = Path(source).expanduser(), image_endings().union(more)
    if _URL.match(source):
        raise UserError(
            f"{option}={printable(source)} is a URL, and nothing is downloaded. Save the file, and give its path."
        )
    if path.is_file():
        return path.parent, [Path(path.name)]
    if path.is_dir():
        folder, pattern = path, "*"
    else:
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        folder, pattern = Path(*fixed), str(Path(*path.parts[len(fixed) :]))
    found = _matching(folder, pattern, f"{option}={printable(source)}") if glob.has_magic(pattern) else ()
    images = sorted(path.relative_to(folder) for path in found if path.suffix.lower() in endings and path.is_file())
    if not images:
        raise UserError(f"{option}={printable(source)} names no image{_hint(path, endings)}. {_WANTED}")
    return folder, images


def _matching(folder: Path, pattern: str, source: str) -> Iterator[Path]:
    """As a shell finds them: no hidden files, and ** follows no links, which may lead in a circle."""
    pattern = pattern + "/*" if PurePath(pattern).name == "**" else pattern
    try:
        for path in folder.glob(pattern):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not hidden or "/." in f"/{pattern}":
                yield path
    except ValueError as error:
        raise UserError(f"{source} is no pattern: {error}. {_WANTED}") from None


@cache
def image_endings() -> set[str]:
    """Of the names of raster images, such as .jpg, in small letters."""
    return {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}


def jpeg(image: Image.Image, quality: int, *, optimize: bool = False) -> bytes:
    """The content of a JPEG file. quality: 1 to 95. optimize: smaller, without a loss, but slower."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=optimize)
    return stream.getvalue()


def embedded(image: Image.Image, quality: int) -> str:
    """An image as the address of an HTML page that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image, quality, optimize=True)).decode()


def _hint(path: Path, endings: Collection[str]) -> str:
    """Why a source may name none."""
    if path.is_dir():
        deeper = any(file.suffix.lower() in endings for file in path.rglob("*"))
        return f"; the folders in it do: write '{path / '**' / '*'}'" if deeper else ": the folder holds none"
    return "" if glob.has_magic(str(path)) else ": there is no such file or folder"


def short_side_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) with the short side at `size`, but the long side at most `max_size`, rounded as DETR does.

    A side has at least one pixel, also of images that are much longer than wide; the other one then has `max_size`.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
        if size < 1:
            return (1, max_size) if height < width else (max_size, 1)
    if height < width:
        return size, max(int(size * width / height), 1)
    return max(int(size * height / width), 1), size


def model_size(height: int, width: int, size: int, max_size: int | None, *, square: bool) -> tuple[int, int]:
    """(height, width) of an image for the model: `size` both where `square`, else those of `short_side_size`."""
    return (size, size) if square else short_side_size(height, width, size, max_size)


def resize(image: UInt8[Tensor, "3 _ _"], size: tuple[int, int]) -> UInt8[Tensor, "3 _ _"]:
    """Bilinear with antialiasing on 8-bit values."""
    if size == (1, 1):  # where torch fails unless channels are last in memory
        image = image[None].contiguous(memory_format=torch.channels_last)[0]
    return image if image.shape[1:] == size else F.resize_image(image, list(size), antialias=True)


def pad_to_batch(images: Sequence[UInt8[Tensor, "3 _ _"]], multiple: int = 1) -> ImageBatch:
    """Images of any sizes, padded with 0 at the right and bottom to the largest height and width among them.

    multiple: of so many pixels the height and width are made, which bounds the number of shapes for compilers.
    """
    height, width = (-(-max(image.shape[dim] for image in images) // multiple) * multiple for dim in (1, 2))
    batch = torch.zeros((len(images), 3, height, width), dtype=torch.uint8).to(memory_format=torch.channels_last)
    mask = torch.ones((len(images), height, width), dtype=torch.bool)
    for i, image in enumerate(images):
        _, h, w = image.shape
        batch[i, :, :h, :w] = image
        mask[i, :h, :w] = False
    return ImageBatch(images=batch, mask=mask, padded=any(image.shape[1:] != (height, width) for image in images))
