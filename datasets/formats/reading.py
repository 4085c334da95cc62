"""What readers of several formats share: text, XML, the parts of a data set, and sizes of images."""

import codecs
import logging
import math
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from datasets.files import with_files
from datasets.formats.base import UNKNOWN, ImageRecord
from detr.errors import UserError, brief
from detr.files import open_regular
from detr.images import image_endings, image_size

logger = logging.getLogger(__name__)
Part = Literal["train", "val", "test"]
# What exports call the parts of a data set.
PARTS: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_READERS = 4  # files that are read at a time


class _Placed(Element):
    """An element of an XML file that knows its line."""

    line = 0


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark. Raises UserError for any other encoding."""
    with open_regular(path) as file:
        content = file.read()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: this is no text in UTF-8, because of the byte {content[error.start]:#04x}. Save the "
            "file as UTF-8."
        ) from None


def read_xml(path: Path) -> Element:
    """The root of an XML file. Raises UserError where it is broken, or declares entities, which can make it endless."""
    parser = expat.ParserCreate()
    builder = TreeBuilder(element_factory=_Placed)

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = builder.start(tag, attributes)
        assert isinstance(element, _Placed)
        element.line = parser.CurrentLineNumber

    def refuse(*declaration: object) -> None:
        raise ValueError("it declares an entity, which annotations do not need")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.EntityDeclHandler = builder.data, refuse
    try:
        with open_regular(path) as file:
            parser.ParseFile(file)
        return builder.close()
    except UserError:
        raise
    except (expat.ExpatError, ValueError) as error:
        reason = expat.ErrorString(error.code) if isinstance(error, expat.ExpatError) else str(error)
        raise UserError(
            f"{path}, line {parser.ErrorLineNumber}: this is no valid XML: {reason}. The file may be cut short; copy "
            "or export it again."
        ) from None


def line_of(element: Element) -> int:
    """The line at which an element of `read_xml` begins."""
    return getattr(element, "line", 0)


def size_of(height: str | None, width: str | None) -> tuple[int, int]:
    """(height, width) of an image as a file writes it; UNKNOWN where that is no size."""
    sides = [int(side) for side in map(number, (height, width)) if side is not None and side >= 1 and side.is_integer()]
    return (sides[0], sides[1]) if len(sides) == 2 else UNKNOWN


def number(text: str | None) -> float | None:
    """A finite number; None where a text is none."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def check_corners(corners: Sequence[float], place: str) -> None:
    """Raise UserError for a box (left, top, right, bottom) that is turned round. place: file and line."""
    left, top, right, bottom = corners
    if right < left or bottom < top:
        raise UserError(
            f"{place}: the box reaches from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), wanted left below right "
            "and top below bottom. Correct it, or exchange the corners."
        )


def part_of(root: Path, part: Part) -> Path | None:
    """The folder of a part of a data set under one of its usual names, in any capitals; None where there is none."""
    folders = {path.name.casefold(): path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}
    return next((folders[name] for name in PARTS[part] if name in folders), None)


def no_part(source: Path, part: Part, wanted: str) -> UserError:
    """The error that a data set has no such part. wanted: what there should be, such as a folder."""
    remedy = {
        "train": "Add it.",
        "val": "Add it, or set data.split=0.2 to hold out a fifth of the images of training.",
        "test": "Add it, or evaluate on data.val.part=val.",
    }
    return UserError(f"{source} has no part '{part}': there is no {wanted}. {remedy[part]}")


def images_in(folder: Path) -> list[Path]:
    """The image files right in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if is_image(path)) if folder.is_dir() else []


def is_image(path: Path) -> bool:
    """Whether a file has the ending of a raster image, and is not hidden."""
    return path.suffix.lower() in image_endings() and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The name of a file without its ending, by which annotations belong to an image; accents in one form."""
    return unicodedata.normalize("NFC", path.stem)


def completed(records: Sequence[ImageRecord], folder: Path, source: Path) -> list[ImageRecord]:
    """The records with ids 1, 2, ..., and with the sizes that are UNKNOWN, from the headers of their files."""
    records = with_files(records, folder, source)
    unknown = [folder / record.file_name for record in records if record.size == UNKNOWN]
    with ThreadPoolExecutor(_READERS) as readers:
        found = iter(list(readers.map(image_size, unknown)))
    return [
        replace(record, id=place, size=next(found) if record.size == UNKNOWN else record.size)
        for place, record in enumerate(records, start=1)
    ]


def warn(source: Path, names: Sequence[object], text: str) -> None:
    """Report things of one kind with their count and the first one. text: what is the matter, with {} for these."""
    if names:
        logger.warning("%s: %s", source, text.format(f"{len(names)}", brief(str(names[0]))))
