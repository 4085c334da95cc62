"""Where a model looks, drawn on the image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detr.drawing import draw_detections, legible
from detr.models.attention.views import Gates, SoftMask, Transform, View, Weights
from detr.models.attention_maps import AttentionMaps, token_at
from detr.text import printable

_SIDE, _COLUMNS, _GAP, _CAPTION = 640, 3, 22, 66  # pixels; three columns, as one picture and eight detections make nine
_LEAST_WIDTH = 560  # for captions to have room
_MOST = 8  # detections, the best
_COLORS = matplotlib.colormaps["inferno"]  # of all heat maps


@dataclass(frozen=True)
class Panel:
    """A picture of the sheet. span: lowest and highest value in its colors."""

    picture: Image.Image
    title: str
    text: str
    span: tuple[float, float] | None = None


def draw_attention(image: Image.Image, maps: AttentionMaps) -> Image.Image:
    """A sheet of pictures: the detections, where the query of each of the best looks, and what other attention does."""
    factor = _SIDE / max(image.size)
    size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
    found = replace(maps.detections, boxes=maps.detections.boxes * factor)
    return _sheet(list(_panels(image.resize(size, Image.Resampling.LANCZOS), replace(maps, detections=found))))


def _panels(image: Image.Image, maps: AttentionMaps) -> Iterator[Panel]:
    found = maps.detections
    shown = min(len(found), _MOST)
    beside = f", the best {shown} of them beside and below" if shown < len(found) else ""
    number = f"{len(found)} detection{'' if len(found) == 1 else 's'}"
    yield Panel(draw_detections(image, found), number, f"the usual picture{beside}")
    for index in range(shown):
        one = found.select(torch.tensor([index]))
        heat = overlay(image, maps.decoder[index])
        title = f"{index + 1}. {one.names[0]} {float(one.scores):.2f}"
        text = "decoder, last layer: its query's weights"
        yield Panel(draw_detections(heat, one), title, text, _span(maps.decoder[index]))
    if maps.encoder is not None:
        title = f"Point ({maps.point[0]:.2f}, {maps.point[1]:.2f})"
        text = "encoder, last layer: the marked cell's weights"
        yield Panel(_from_point(image, maps.encoder, maps.point), title, text, _span(maps.encoder))
    for name, view in maps.blocks.items():
        yield _block(image, name, view, maps.point)


def _block(image: Image.Image, name: str, view: View, point: tuple[float, float]) -> Panel:
    if isinstance(view, Weights):
        picture = _from_point(image, view.values[0], point)
        return Panel(picture, name, "the marked cell's weights", _span(view.values[0]))
    if isinstance(view, SoftMask):
        return Panel(overlay(image, view.values[0]), name, "soft mask", _span(view.values[0]))
    if isinstance(view, Gates):
        gates = view.values[0].tolist()
        text = f"gates of {len(gates)} channels, {min(gates):.4g} to {max(gates):.4g}"
        return Panel(_bars(gates, image.size), name, text)
    return Panel(_grid(image, view), name, "the transformed map's grid, where it is read")


def overlay(image: Image.Image, values: Float[Tensor, "height width"]) -> Image.Image:
    """An RGB image, gray and dimmed, under the values of a map in colors. Higher values cover more of the image.

    The colors run from the map's lowest to its highest value.
    """
    low, high = float(values.min()), float(values.max())
    share = (values.float().cpu() - low) / max(high - low, 1e-12)
    heat = np.asarray(Image.fromarray(share.numpy()).resize(image.size, Image.Resampling.BILINEAR))
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.7
    alpha = 0.85 * heat[..., None] ** 0.5
    mixed = (1 - alpha) * gray + alpha * 255 * _COLORS(heat)[..., :3]
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _span(values: Tensor) -> tuple[float, float]:
    """Lowest and highest value; a lowest value that is next to nothing counts as 0."""
    low, high = float(values.min()), float(values.max())
    return (0.0 if abs(low) < 1e-3 * abs(high) else low), high


def _from_point(image: Image.Image, values: Tensor, point: tuple[float, float]) -> Image.Image:
    """The overlay with a ring around the center of the cell that a point (x, y) in [0, 1] lies in."""
    picture = overlay(image, values)
    draw = ImageDraw.Draw(picture)
    row, column = divmod(int(token_at(point, *values.shape)), values.shape[1])
    x, y = (column + 0.5) * picture.width / values.shape[1], (row + 0.5) * picture.height / values.shape[0]
    for radius, color, width in ((10, "black", 5), (9, "white", 3)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
    return picture


def _bars(values: Sequence[float], size: tuple[int, int]) -> Image.Image:
    """A bar for each value, up or down from 1."""
    picture = Image.new("RGB", size, "#f4f4f4")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=17)
    most = max(*(abs(value - 1) for value in values), 0.01)
    left, middle = 70, size[1] / 2
    unit, step = 0.9 * middle / most, max(size[0] - left, 1) / len(values)
    for index, value in enumerate(values):
        x, end = left + index * step, middle - (value - 1) * unit
        color = "#c8642a" if value > 1 else "#3f6ea8"
        draw.rectangle((x, min(middle, end), x + 0.7 * step, max(middle, end)), fill=color)
    for level in (1 - most, 1, 1 + most):
        y = middle - (level - 1) * unit
        draw.line((left, y, size[0], y), fill="#888888")
        draw.text((left - 8, y), f"{level:.4g}", fill="#444444", font=font, anchor="rm")
    return picture


def _grid(image: Image.Image, view: Transform) -> Image.Image:
    """Nine lines each way over the transformed map, at the places of the image that they are read from."""
    theta = view.theta[0].float().cpu()
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    for color, width in (("black", 5), ("#ffd23f", 2)):
        for at in torch.linspace(-1, 1, 9).tolist():
            for ends in (((at, -1), (at, 1)), ((-1, at), (1, at))):
                places = torch.tensor([(*end, 1.0) for end in ends]) @ theta.T
                line = (places + 1) / 2 * torch.tensor(picture.size)
                draw.line(line.flatten().tolist(), fill=color, width=width)
    return picture


def _sheet(panels: Sequence[Panel]) -> Image.Image:
    width, height = max(panels[0].picture.width, _LEAST_WIDTH), panels[0].picture.height
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    step = width + _GAP, height + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _GAP), "white")
    for index, panel in enumerate(panels):
        x, y = (_GAP + at * size for at, size in zip((index % columns, index // columns), step, strict=True))
        sheet.paste(_caption(panel, width), (x, y))
        sheet.paste(panel.picture, (x, y + _CAPTION))
    return sheet


def _caption(panel: Panel, width: int) -> Image.Image:
    """Title and text, and at the right what the colors stand for."""
    caption = Image.new("RGB", (width, _CAPTION), "white")
    draw = ImageDraw.Draw(caption)
    font = ImageFont.load_default(size=17)
    title, large = legible(printable(panel.title), 23.0)
    draw.text((0, 0), title, fill="black", font=large)
    draw.text((0, 34), panel.text, fill="#444444", font=font)
    if panel.span is not None:
        low, high = (f"{value:.3g}" for value in panel.span)
        right = width - draw.textlength(high, font=font)
        colors = (255 * _COLORS(np.linspace(0, 1, 100))[None, :, :3]).astype(np.uint8)
        draw.text((right, 34), high, fill="#444444", font=font)
        caption.paste(Image.fromarray(colors).resize((100, 14)), (round(right) - 107, 39))
        draw.text((right - 114, 34), low, fill="#444444", font=font, anchor="ra")
    return caption
