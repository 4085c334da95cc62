"""Pages of HTML that need nothing else: their frame (templates/page.html.j2), their charts, their numbers."""

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

WIDTHS = {"wide": 1110, "narrow": 340}  # pixels of a chart, by the kind of screen
MINUS = "\N{MINUS SIGN}"
# Stand-ins that matplotlib takes for colors, and what the page knows instead.
INK, MUTED, SHADE, HIGHER, LOWER = (f"#01010{number}" for number in range(1, 6))
STANDINS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    SHADE: "var(--shade)",
    HIGHER: "var(--higher)",
    LOWER: "var(--lower)",
}
_TEMPLATES = Path(__file__).parent / "templates"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compare",  # the same names inside each time
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a label may hold a $
    **dict.fromkeys(("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad"), 0.08),  # inches
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
}


def page_template(name: str, folder: Path = _TEMPLATES) -> jinja2.Template:
    """A template that extends "page.html.j2", whose variable `charts` maps the names of charts to `drawn` ones.

    Everything in it is escaped, since labels and folders are free text; only the charts are not.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "significant": significant, "svg": Markup}
    return environment.get_template(name)


def number(value: float | int | None, form: str = ".3f") -> str:
    """A number as text; a dash where there is none."""
    return "\N{EN DASH}" if value is None else format(value, form).replace("-", MINUS)


def significant(value: float | int) -> str:
    """Three figures of a positive number."""
    return f"{value:,.{max(2 - math.floor(math.log10(value)), 0)}f}"


def blank_figure(width: int, height: int) -> Figure:
    """A figure of so many pixels."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")  # matplotlib's SVG has 72 units an inch


def drawn(draw: Callable[[int], Figure], name: str) -> dict[str, str]:
    """A chart as SVG for each kind of screen, since text must not shrink with it.

    draw: draws for a width in pixels, in the colors above, for which the SVG has those of the page.
    name: part of the names inside, which are unique on the page.
    """
    with mpl.rc_context(_STYLE):
        return {screen: _svg(draw(width), f"{name}-{screen}") for screen, width in WIDTHS.items()}


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _svg(figure: Figure, name: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True)
    content = stream.getvalue().partition("<svg")[2].partition(">")[2].rpartition("</svg>")[0]
    content = re.sub(r"<(metadata|style).*?</\1>", "", content, flags=re.DOTALL)
    content = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", content.replace("xlink:href", "href"))
    content = re.sub("|".join(STANDINS), lambda match: STANDINS[match[0]], content)
    width, height = figure.get_size_inches() * 72
    return f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}">{content}</svg>'
