"""Which format files are in, so that the message about a wrong choice names the right one."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from detr.errors import UserError
from detr.files import open_regular

ROBOFLOW = "_annotations.coco.json"
_LABEL = re.compile(rb"\s*\d+(\s+-?\d*\.?\d+(e-?\d+)?){4,}\s*", re.I)  # class, center x, center y, width, height, ...
_NAMES = re.compile(rb"^\s*(names|nc|train|val)\s*:", re.M)
_ENDINGS = (".json", ".yaml", ".yml", ".xml", ".csv", ".txt")  # those that tell most first
_LOOKED_AT, _LISTED = 50, 20_000  # files of a folder that are opened, and that are listed
_HEAD = 4096  # bytes of a file
_EDGES = 4  # of a box, which a table has beside the file
# Keys that COCO does not have, each with the program whose format has it.
_JSON = {"shapes": "LabelMe", "_via_img_metadata": "VGG Image Annotator", "datumaro": "Datumaro", "taskId": "CVAT"}


class _Format(NamedTuple):
    title: str
    options: str


_FILES = "data.train.images=DIR data.train.annotations={file}"
FORMATS = {
    "custom": _Format("COCO's format", f"data=custom {_FILES}"),
    "roboflow": _Format("Roboflow's COCO export", "data=roboflow data.root={root}"),
    "yolo": _Format("YOLO's format", "data=yolo data.root={root}"),
    "voc": _Format("Pascal VOC's format", "data=voc data.root={root}"),
    "cvat": _Format("the format CVAT for images", f"data=cvat {_FILES}"),
    "csv": _Format("a CSV table of boxes", f"data=csv {_FILES}"),
}
_OF_FILES = ("custom", "cvat", "csv")  # formats of single files; the others are of folders
# Folders between the root of a data set and its files.
_INNER = re.compile(r"(annotations|images|labels|jpegimages|train|training|val|valid|validation|test)$", re.I)


def advice(path: Path, choice: str, *, folders_only: bool = False) -> str:
    """What to choose where a folder or file is in another format than `choice`, as a sentence; else nothing.

    folders_only: name no format of single files, which may lie beside any data.
    """
    for file in _candidates([path] if path.is_file() else _listed(path)):
        found = _format_of(file)
        if found is not None and found != choice and not (folders_only and found in _OF_FILES):
            title, options = FORMATS[found]
            root = next(folder for folder in file.parents if not _INNER.match(folder.name))
            return f" {path} looks like {title}: set {options.format(root=root, file=file)}."
    return ""


def refuse_other_json(path: Path, content: Any) -> None:
    """Raise UserError for the JSON files of other programs, and for results of a detector."""
    if isinstance(content, list) and content and isinstance(content[0], dict) and "score" in content[0]:
        raise UserError(f"{path} holds detections, which have scores, and no annotations. Name the annotation file.")
    for key in _JSON.keys() & content.keys() if isinstance(content, dict) else ():
        raise UserError(
            f"{path} is in the format of {_JSON[key]}, wanted COCO format. Export the data set as COCO detection."
        )


def _listed(folder: Path) -> Iterator[Path]:
    return islice(folder.rglob("*"), _LISTED) if folder.is_dir() else iter(())


def _candidates(files: Iterable[Path]) -> list[Path]:
    """A few files that may hold annotations, those that tell most first."""
    found = islice((path for path in files if path.suffix.lower() in _ENDINGS), _LOOKED_AT)
    return sorted(found, key=lambda path: (path.name != ROBOFLOW, _ENDINGS.index(path.suffix.lower()), path))


def _format_of(path: Path) -> str | None:
    """One of FORMATS, by the name of a file and its first bytes."""
    if path.name == ROBOFLOW or not path.is_file():
        return "roboflow" if path.is_file() else None
    with open_regular(path) as file:
        head = file.read(_HEAD)
    first = head.partition(b"\n")[0]
    signs: dict[str, dict[str, Any]] = {
        ".json": {"custom": re.search(rb'"(images|annotations|categories)"\s*:\s*\[', head)},
        ".xml": {"cvat": b"<annotations" in head, "voc": b"<annotation>" in head},
        ".yaml": {"yolo": _NAMES.search(head)},
        ".yml": {"yolo": _NAMES.search(head)},
        ".csv": {"csv": max(first.count(mark) for mark in b",;\t") >= _EDGES},
        ".txt": {"yolo": _LABEL.fullmatch(first)},
    }
    return next((name for name, there in signs[path.suffix.lower()].items() if there), None)
