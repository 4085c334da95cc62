"""The charts of a data set, as SVG that takes its colors and its font from the page."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detr.reporting.pages import HIGHER, INK, MUTED, blank_figure, drawn
from tools.data_check.facts import CELL, Part

_HEIGHT = 220
_DASHES = (0, (4, 3))


def objects_chart(part: Part, queries: int) -> dict[str, str]:
    """How many images have how many objects."""
    counts = part.dataset.objects_per_image()
    most = int(counts.max(initial=1))
    edges = np.arange(0, most + 2, max(-(-(most + 1) // 50), 1)) - 0.5
    if edges[-1] < most + 0.5:
        edges = np.append(edges, 2 * edges[-1] - edges[-2])

    def draw(width: int) -> Figure:
        figure = blank_figure(width, _HEIGHT)
        axes = figure.subplots()
        axes.hist(counts, bins=edges.tolist(), color=HIGHER)
        axes.set_xlabel("objects in an image")
        axes.set_ylabel("images")
        if queries <= 2 * most:
            _mark(axes, queries, f"{queries} queries")
        return figure

    return drawn(draw, "objects")


def sides_chart(part: Part, size: int) -> dict[str, str]:
    """Short sides of boxes after resizing."""
    sides = part.resized.clip(1, None)
    edges = 2 ** np.arange(0, np.log2(max(sides.max(initial=2), 64)) + 0.5, 0.5)

    def draw(width: int) -> Figure:
        figure = blank_figure(width, _HEIGHT)
        axes = figure.subplots()
        axes.hist(sides, bins=edges.tolist(), color=HIGHER)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256, 512][: int(np.log2(edges[-1])) + 1])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.set_xlabel(f"short side in pixels at data.size={size}")
        axes.set_ylabel("boxes")
        _mark(axes, CELL, "1")
        _mark(axes, 2 * CELL, "2 cells")
        return figure

    return drawn(draw, "sides")


def _mark(axes: Axes, value: float, text: str) -> None:
    axes.axvline(value, color=MUTED, linewidth=1, linestyle=_DASHES)
    axes.annotate(
        text, (value, 1), (3, -2), xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="top", color=INK
    )
