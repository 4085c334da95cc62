"""Detections drawn on their image: boxes, names and scores. `class_color` chooses the color of each class."""

import colorsys

from PIL import Image, ImageDraw, ImageFont

from detr.types import Detections

Color = tuple[int, int, int]  # red, green, blue, 0 to 255 each

_LEAST_SIZE = 300  # pixels of the long side, for text to leave room for what it names


def class_color(label: int) -> Color:
    """The color of a class's boxes and names, bright and saturated.

    Hues go around the color circle in steps of the golden ratio, which keeps those of neighboring labels far apart for
    any number of classes. Label 0 is green.
    """
    hue = (0.33 + 0.618034 * label) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: Image.Image, detections: Detections) -> Image.Image:
    """A copy of an RGB image with boxes, names and scores, the best score on top.

    Each class has its `class_color`. A black rim around the boxes and a background behind the text keep both readable
    on light and on dark images. Images that are too small for text are enlarged by a whole factor.
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
        color = class_color(label)
        left, top, right, bottom = box
        left, right = (float(min(max(x, 0), image.width - 1)) for x in (left, right))
        top, bottom = (float(min(max(y, 0), image.height - 1)) for y in (top, bottom))
        draw.rectangle((left - width, top - width, right + width, bottom + width), outline="black", width=3 * width)
        draw.rectangle((left, top, right, bottom), outline=color, width=width)
        _draw_text(draw, f"{name} {score:.2f}", left, top, color, font, image.size)
    return image


def _draw_text(
    draw: ImageDraw.ImageDraw,
    text: str,
    left: float,
    top: float,
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Above the box where there is room, else inside it; never beyond the edge of the image."""
    _, _, text_width, text_height = draw.textbbox((0, 0), text, font=font)
    x = max(min(left, size[0] - text_width - 4), 0)
    y = top - text_height - 5 if top > text_height + 5 else top
    draw.rectangle((x, y, x + text_width + 4, y + text_height + 4), fill=color, outline="black")
    brightness = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 1000
    draw.text((x + 2, y + 1), text, fill="black" if brightness > 128 else "white", font=font)
