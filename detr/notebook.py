"""How detections show themselves in a notebook."""

from html import escape

from detr.drawing import class_color
from detr.errors import UserError
from detr.images import embedded
from detr.text import printable
from detr.types import Detections

_ROWS, _SIDE = 10, 640  # detections in the table; pixels of the picture's long side


def as_html(found: Detections) -> str:
    """The best detections in a table, beside the drawn image where its file is known and can be read."""
    rows = "".join(
        f"<tr><td>{_square(one.label)} {escape(printable(one.name))}</td><td>{one.score:.2f}</td>"
        f"<td>{', '.join(f'{edge:.0f}' for edge in one.box)}</td></tr>"
        for one in found[:_ROWS]
    )
    more = f"<p>and {len(found) - _ROWS} more</p>" if len(found) > _ROWS else ""
    noun = "detection" if len(found) == 1 else "detections"
    place = "" if found.path is None else f" in {escape(printable(found.path))}"
    head = "<tr><th>name</th><th>score</th><th>left, top, right, bottom</th></tr>" if rows else ""
    table = f"<div><p>{len(found)} {noun}{place}</p><table>{head}{rows}</table>{more}</div>"
    return f'<div style="display: flex; gap: 1em; flex-wrap: wrap">{_picture(found)}{table}</div>'


def _square(label: int) -> str:
    red, green, blue = class_color(label)
    return f'<span style="color: rgb({red}, {green}, {blue})">&#9632;</span>'


def _picture(found: Detections) -> str:
    try:
        picture = None if found.path is None else found.draw()
    except UserError:  # the file is gone
        picture = None
    if picture is None:
        return ""
    picture.thumbnail((_SIDE, _SIDE))
    return f'<img alt="drawn detections" src="{embedded(picture, 80)}" />'
