"""Detections drawn on their image."""

import colorsys

from PIL import Image, ImageDraw, ImageFont

from detr.types import Detections

_GOLDEN_RATIO = 0.618034
_LEAST_SIZE = 300  # pixels of the long side, for text to leave room for what it names


def draw_detections(image: Image.Image, detections: Detections) -> Image.Image:
    """A copy of an RGB image with boxes, names and scores, the best score on top.

    Every class has a colour of its own. A dark rim around the boxes, and a background behind the text, keep both
    readable on light and on dark images; images too small for text are enlarged, by a whole factor.
    """
    factor = -(-_LEAST_SIZE // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    width = max(round(max(image.size) / 400), 1)
    font = ImageFont.load_default(size=max(max(image.size) / 50, 10))
    boxes = detections.boxes * factor
    found = list(zip(boxes.tolist(), detections.scores.tolist(), detections.names, strict=True))
    labels = detections.labels.tolist()
    for (box, score, name), label in reversed(list(zip(found, labels, strict=True))):
        colour = _colour(label)
        left, top, right, bottom = box
        left, right = (float(min(max(x, 0), image.width - 1)) for x in (left, right))
        top, bottom = (float(min(max(y, 0), image.height - 1)) for y in (top, bottom))
        draw.rectangle((left - width, top - width, right + width, bottom + width), outline="black", width=3 * width)
        draw.rectangle((left, top, right, bottom), outline=colour, width=width)
        _draw_text(draw, f"{name} {score:.2f}", left, top, colour, font, image.size)
    return image


def _draw_text(
    draw: ImageDraw.ImageDraw,
    text: str,
    left: float,
    top: float,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Above the box where there is room, else inside it; never beyond the edge of the image."""
    _, _, text_width, text_height = draw.textbbox((0, 0), text, font=font)
    x = max(min(left, size[0] - text_width - 4), 0)
    y = top - text_height - 5 if top > text_height + 5 else top
    draw.rectangle((x, y, x + text_width + 4, y + text_height + 4), fill=colour, outline="black")
    brightness = (299 * colour[0] + 587 * colour[1] + 114 * colour[2]) / 1000
    draw.text((x + 2, y + 1), text, fill="black" if brightness > 128 else "white", font=font)


def _colour(label: int) -> tuple[int, int, int]:
    """Neighbouring labels get hues far apart."""
    red, green, blue = colorsys.hsv_to_rgb((label * _GOLDEN_RATIO + 0.33) % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
