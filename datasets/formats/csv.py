"""A plain table: one line an object, with a file, a class, and the corners of a box in pixels."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from datasets.formats.base import Annotations, ImageRecord, numbered
from datasets.formats.reading import check_corners, completed, number, read_text
from datasets.formats.recognition import advice
from detr.errors import UserError, brief

# What tables call their columns, in small letters and without spaces, hyphens and underscores.
_COLUMNS = {
    "file": ("filename", "file", "image", "img", "path", "filepath", "imagepath", "imagename", "imagefile", "imageid"),
    "class": ("class", "label", "name", "category", "classname", "labelname", "categoryname"),
    "x1": ("x1", "xmin", "left", "minx", "xtl", "bboxx1", "bboxxmin"),
    "y1": ("y1", "ymin", "top", "miny", "ytl", "bboxy1", "bboxymin"),
    "x2": ("x2", "xmax", "right", "maxx", "xbr", "bboxx2", "bboxxmax"),
    "y2": ("y2", "ymax", "bottom", "maxy", "ybr", "bboxy2", "bboxymax"),
}
_EDGES = ("x1", "y1", "x2", "y2")
_EXTENTS = ("width", "w", "bboxwidth", "bboxw")
_DELIMITERS = ",;\t"


class _Table:
    """The rows of a file. Each has its line and the texts of its columns; a missing one is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = read_text(path)
        head = text.lstrip("\r\n").partition("\n")[0]
        self._delimiter = max(_DELIMITERS, key=head.count)
        self._reader = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True)
        self._columns = self._find([_plain(name) for name in next(self._rows(), (0, []))[1]])

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, str]]]:
        for line, row in self._rows():
            yield line, {name: row[place] if place < len(row) else "" for name, place in self._columns.items()}

    def number(self, text: str) -> float | None:
        """Programs that separate columns by semicolons may write decimal commas."""
        return number(text.replace(",", ".") if self._delimiter == ";" else text)

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Those that are not empty, with their lines."""
        try:
            for row in self._reader:
                if any(cell.strip() for cell in row):
                    yield self._reader.line_num, [cell.strip() for cell in row]
        except csv.Error as error:
            raise UserError(
                f"{self.path}, line {self._reader.line_num}: this is no valid CSV: {error}. Correct the line."
            ) from None

    def _find(self, names: Sequence[str]) -> dict[str, int]:
        places = {
            column: [names.index(name) for name in spellings if name in names] for column, spellings in _COLUMNS.items()
        }
        if missing := [column for column, found in places.items() if not found]:
            hint = (
                "These look like boxes of x, y, width, height: write the corners."
                if any(name in names for name in _EXTENTS) and "x2" in missing
                else "Write a header such as file,class,x1,y1,x2,y2, with corners in pixels."
            )
            raise UserError(
                f"{self.path}, line 1: the header has no column for {', '.join(missing)}, only {brief(list(names))}. "
                f"{hint}"
            )
        return {column: found[0] for column, found in places.items()}


def read_csv(*, images: str | Path, annotations: str | Path) -> Annotations:
    """A table of boxes. Categories are sorted by name, with ids from 1.

    images: the folder that file names are relative to. annotations: the table, with a header that names the columns,
    separated by commas, semicolons or tabs. Images have the order of their first lines.

    A line without a box marks an image; where it has no other line, it has no objects. Images that are in the folder
    alone do not count. Raises UserError where the table is missing or damaged, or a box is none.
    """
    path = Path(annotations).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        hint = advice(path, "csv") or " Set data.train.annotations and data.val.annotations."
        raise UserError(f"Annotation file {path} {problem}, wanted a CSV file.{hint}")
    if path.suffix.lower() != ".csv" and (hint := advice(path, "csv")):
        raise UserError(f"Annotation file {path} is no CSV file.{hint}")
    objects: dict[str, list[tuple[str, list[float]]]] = {}
    table = _Table(path)
    for line, row in table:
        place = f"{path}, line {line}"
        if not row["file"]:
            raise UserError(f"{place}: there is no file name. Add it, or remove the line.")
        found = objects.setdefault(row["file"], [])
        if any(row[edge] for edge in _EDGES):
            found.append(_object(row, [table.number(row[edge]) for edge in _EDGES], place))
    names = sorted({name for found in objects.values() for name, _ in found})
    if not names:
        raise UserError(
            f"{path}: there is no line with a box, so there is nothing to detect. See whether it is the right file."
        )
    rank_of = {name: rank for rank, name in enumerate(names)}
    records = [
        ImageRecord.of(file, [corners for _, corners in found], [rank_of[name] for name, _ in found])
        for file, found in objects.items()
    ]
    folder = Path(images).expanduser()
    records = completed(records, folder, path)
    return Annotations(source=path, images=folder, categories=numbered(names, path), records=records, named=True)


def _object(row: Mapping[str, str], corners: Sequence[float | None], place: str) -> tuple[str, list[float]]:
    known = [edge for edge in corners if edge is not None]
    if len(known) < len(_EDGES):
        raise UserError(
            f"{place}: the box is {brief([row[edge] for edge in _EDGES])}, wanted four numbers of pixels, left, top, "
            "right, bottom, or none of them for an image without objects. Correct the line."
        )
    if not row["class"]:
        raise UserError(f"{place}: the box has no class. Add it, or remove the line.")
    check_corners(known, place)
    return row["class"], known


def _plain(name: str) -> str:
    return "".join(letter for letter in name.strip().casefold() if letter.isalnum())
