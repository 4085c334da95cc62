"""Detections drawn on their image: boxes, names and scores. `class_color` chooses the color of each class."""

import colorsys
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from detr.text import printable
from detr.types import Detections

Color = tuple[int, int, int]  # red, green, blue, 0 to 255 each

_LEGIBLE = 300  # pixels of the long side, for text to leave room for what it names
_LONGEST = 30  # characters of a name
_DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Latin, Greek, Cyrillic, Arabic ...


def class_color(label: int) -> Color:
    """The color of a class's boxes and names, bright and saturated.

    Hues go around the color circle in steps of the golden ratio, which keeps those of neighboring labels far apart for
    any number of classes. Label 0 is green.
    """
    hue = (0.33 + 0.618034 * label) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Image.Image, detections: Detections, *, enlarge: bool = False, scores: bool = True
) -> Image.Image:
    """A copy of an RGB image with boxes, names and scores, the best score on top.

    Each class has its `class_color`. A black rim around the boxes and a background behind the text keep both readable
    on light and on dark images.

    enlarge: make an image that is too small for text larger by a whole factor. scores: write them behind the names.
    """
    factor = -(-_LEGIBLE // max(image.size)) if enlarge else 1
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    width = max(round(max(image.size) / 400), 1)
    size = max(max(image.size) / 50, 10.0)
    for found in reversed(list(detections)):
        color = class_color(found.label)
        left, top, right, bottom = (edge * factor for edge in found.box)
        left, right = (float(min(max(x, 0), image.width - 1)) for x in (left, right))
        top, bottom = (float(min(max(y, 0), image.height - 1)) for y in (top, bottom))
        draw.rectangle((left - width, top - width, right + width, bottom + width), outline="black", width=3 * width)
        draw.rectangle((left, top, right, bottom), outline=color, width=width)
        name = printable(found.name)
        name = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
        _draw_name(draw, f"{name} {found.score:.2f}" if scores else name, left, top, color, size)
    return image


def _draw_name(draw: ImageDraw.ImageDraw, text: str, left: float, top: float, color: Color, size: float) -> None:
    """Above the box where there is room, else inside it; never beyond the edge of the image."""
    text, font = legible(text, size)
    _, _, text_width, text_height = draw.textbbox((0, 0), text, font=font)
    x = max(min(left, draw.im.size[0] - text_width - 4), 0)
    y = top - text_height - 5 if top > text_height + 5 else top
    draw.rectangle((x, y, x + text_width + 4, y + text_height + 4), fill=color, outline="black")
    brightness = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 1000
    draw.text((x + 2, y + 1), text, fill="black" if brightness > 128 else "white", font=font)


def legible(text: str, size: float) -> tuple[str, ImageFont.FreeTypeFont]:
    r"""The text, and a font of this size that has its characters. What it lacks becomes an escape, such as \u72d7."""
    path = _font(frozenset(text))
    known = _characters(path)
    shown = "".join(char if char in known else char.encode("unicode_escape").decode() for char in text)
    return shown, ImageFont.truetype(str(path), size)


@cache
def _font(text: frozenset[str]) -> Path:
    """DejaVu where that has all characters, else the font of this system that has the most of them."""
    if text <= _characters(_DEJAVU):
        return _DEJAVU
    from matplotlib import font_manager  # which looks for fonts on import, and takes a second for it

    def rank(entry: font_manager.FontEntry) -> tuple[bool, bool, str]:
        return entry.style != "normal", entry.weight not in (400, "normal", "regular"), entry.fname

    installed = [Path(entry.fname) for entry in sorted(font_manager.fontManager.ttflist, key=rank)]
    return max((_DEJAVU, *installed), key=lambda path: len(text & _characters(path)))


@cache
def _characters(path: Path) -> frozenset[str]:
    """Those that a font has glyphs for; none where it cannot be read, or not be drawn at any size."""
    try:
        font = FT2Font(str(path))
    except (OSError, RuntimeError):
        return frozenset()
    usable = font.scalable and not font.family_name.startswith("Last Resort")  # which has a box for every character
    return frozenset(map(chr, font.get_charmap())) if usable else frozenset()
