"""Detections drawn on their image: masks, boxes, names and scores. `class_color` chooses the color of each class."""

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from detr.masks import Masks
from detr.text import printable
from detr.types import Detections

Color = tuple[int, int, int]  # red, green, blue, 0 to 255 each

_LEGIBLE = 300  # pixels of the long side, for text to leave room for what it names
_LONGEST = 30  # characters of a name
_FILLING = 0.4  # of the color of a mask, over the image
_MOST_HIDDEN = 0.5  # of a box, by a name
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
    """A copy of an RGB image with masks, boxes, names and scores, the best score on top.

    Each class has its `class_color`. A black rim around the boxes and a background behind the text keep both readable
    on light and on dark images. Masks let what is below show through, each in a shade of its own, and all outlines come
    after all fillings, so that overlapping objects stay apart. Where a name would hide another name, or most of a box,
    it is left out: in a crowd the color tells the class.

    enlarge: make an image that is too small for text larger by a whole factor. scores: write them behind the names.
    """
    factor = -(-_LEGIBLE // max(image.size)) if enlarge else 1
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if detections.masks is not None:
        masks = detections.masks if factor == 1 else detections.masks.resized((image.height, image.width))
        image = Image.fromarray(_with_masks(np.array(image), masks, detections.labels.tolist()))
    draw = ImageDraw.Draw(image)
    width = max(round(max(image.size) / 400), 1)
    boxes = (detections.boxes.detach().cpu().double().numpy() * factor).clip(0, np.tile(image.size, 2) - 1.0)
    for found, box in reversed(list(zip(detections, boxes, strict=True))):
        left, top, right, bottom = box.tolist()
        if detections.masks is None:  # beside whose outlines rims would be too much
            draw.rectangle((left - width, top - width, right + width, bottom + width), outline="black", width=3 * width)
        draw.rectangle((left, top, right, bottom), outline=class_color(found.label), width=width)
    _draw_names(draw, detections, boxes, scores=scores)
    return image


def _with_masks(pixels: np.ndarray, masks: Masks, labels: Sequence[int]) -> np.ndarray:
    """An RGB image with masks of its size, the first on top."""
    width = max(round(max(pixels.shape) / 400), 1)
    shown = pixels.astype(np.float32)
    outlines = []
    for place, label in reversed([*enumerate(labels)]):
        mask = masks.select([place]).decode()[0].numpy()
        if not mask.any():
            continue
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        region = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside, canvas = mask[region], shown[region]
        color = np.array(_shade(label, labels[:place].count(label)), dtype=np.float32)
        canvas[inside] += _FILLING * (color - canvas[inside])
        # Its region alone is looked at, at whose sides the mask ends.
        padded = np.pad(inside, 1)
        outlines.append((canvas, _edge(padded, 2 * width)[1:-1, 1:-1], _edge(padded, width)[1:-1, 1:-1], color))
    for canvas, rim, line, color in outlines:
        canvas[rim] = 0
        canvas[line] = color
    return shown.round().astype(np.uint8)


def _shade(label: int, number: int) -> Color:
    """Of the color of a class, for one of its objects: itself, then lighter and darker ones."""
    share, target = ((0.0, 0), (0.5, 255), (0.45, 0), (0.25, 255), (0.25, 0))[number % 5]
    red, green, blue = (round(part + share * (target - part)) for part in class_color(label))
    return red, green, blue


def _edge(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask that are so near to others, or to the side of the array."""
    inside = mask
    for _ in range(width):
        around = np.pad(inside, 1)
        inside = inside & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inside


def _draw_names(draw: ImageDraw.ImageDraw, detections: Detections, boxes: np.ndarray, *, scores: bool) -> None:
    """Each above its box, else below or inside it, where it hides least; the best scores come first."""
    size = max(max(draw.im.size) / 50, 10.0)
    taken = np.zeros((0, 4))
    for found, box in zip(detections, boxes, strict=True):
        name = printable(found.name)
        name = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
        text, font = legible(f"{name} {found.score:.2f}" if scores else name, size)
        places = _places(box, draw.textbbox((0, 0), text, font=font), draw.im.size)
        free = [place for place in places if _hidden(taken, place) == 0 and _hidden(boxes, place) <= _MOST_HIDDEN]
        if free:
            taken = np.vstack((taken, free[0]))
            _draw_name(draw, text, free[0], class_color(found.label), font)


def _places(box: np.ndarray, text: Sequence[float | int], image: tuple[int, int]) -> list[np.ndarray]:
    """Where a name of this size may stand within the image: left, top, right and bottom, the best place first."""
    left, top, _, bottom = box.tolist()
    width, height = text[2] + 4, text[3] + 4
    x = max(min(left, image[0] - width), 0)
    tops = [y for y in (top - height - 1, bottom + 1) if 0 <= y < image[1] - height]
    return [np.array((x, y, x + width, y + height)) for y in (*tops, top)]


def _hidden(boxes: np.ndarray, place: np.ndarray) -> float:
    """The largest part of a box that this place hides, 0 to 1."""
    low, high = np.maximum(boxes[:, :2], place[:2]), np.minimum(boxes[:, 2:], place[2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float(((high - low).clip(0).prod(1) / area.clip(1)).max(initial=0))


def _draw_name(
    draw: ImageDraw.ImageDraw, text: str, place: np.ndarray, color: Color, font: ImageFont.FreeTypeFont
) -> None:
    left, top, right, bottom = place.tolist()
    draw.rectangle((left, top, right, bottom), fill=color, outline="black")
    brightness = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 1000
    draw.text((left + 2, top + 1), text, fill="black" if brightness > 128 else "white", font=font)


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
