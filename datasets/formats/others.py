"""Formats that no reader here reads: recognized, so that the message says what converts them."""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from detr.errors import UserError
from detr.files import open_regular

_LABEL = re.compile(rb"\s*\d+(\s+-?\d*\.?\d+(e-?\d+)?){4,}\s*", re.I)  # class, center x, center y, width, height, ...
_NAMES = re.compile(rb"^\s*(names|nc|train|val)\s*:", re.M)
_ENDINGS = (".yaml", ".yml", ".xml", ".txt")
_LOOKED_AT = 50  # files of a folder
_HEAD = 4096  # bytes of a file
_CONVERT = {
    "YOLO": "from_yolo(images_directory_path=..., annotations_directory_path=..., data_yaml_path=...)",
    "Pascal VOC": "from_pascal_voc(images_directory_path=..., annotations_directory_path=...)",
}
# Keys that COCO does not have, each with the program whose format has it.
_JSON = {"shapes": "LabelMe", "_via_img_metadata": "VGG Image Annotator", "datumaro": "Datumaro", "taskId": "CVAT"}


def refuse_other_formats(path: Path) -> None:
    """Raise UserError for YOLO's and Pascal VOC's annotations, in a folder or a file."""
    files = path.rglob("*") if path.is_dir() else [path]
    for kind in map(_format_of, _candidates(files)):
        if kind is not None:
            raise UserError(
                f"{path} holds annotations in the format of {kind}, which has no reader here; wanted a JSON file in "
                "COCO format. Convert it once, such as with Roboflow's package (pip install supervision): "
                f"supervision.DetectionDataset.{_CONVERT[kind]}.as_coco(annotations_path='train.json'). Or write a "
                "reader: CONTRIBUTING.md shows one."
            )


def refuse_other_json(path: Path, content: Any) -> None:
    """Raise UserError for the JSON files of other programs, and for results of a detector."""
    if isinstance(content, list) and content and isinstance(content[0], dict) and "score" in content[0]:
        raise UserError(f"{path} holds detections, which have scores, and no annotations. Name the annotation file.")
    for key in _JSON.keys() & content.keys() if isinstance(content, dict) else ():
        raise UserError(
            f"{path} is in the format of {_JSON[key]}, wanted COCO format. Export the data set as COCO detection."
        )


def _candidates(files: Iterable[Path]) -> list[Path]:
    """A few files that may hold labels, those that tell most first."""
    found = islice((path for path in files if path.suffix.lower() in _ENDINGS), _LOOKED_AT)
    return sorted(found, key=lambda path: (_ENDINGS.index(path.suffix.lower()), path))


def _format_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open_regular(path) as file:
        head = file.read(_HEAD)
    if path.suffix.lower() == ".xml" and b"<annotation" in head:
        return "Pascal VOC"
    if path.suffix.lower() in (".yaml", ".yml") and _NAMES.search(head):
        return "YOLO"
    first = head.partition(b"\n")[0]
    return "YOLO" if path.suffix.lower() == ".txt" and _LABEL.fullmatch(first) else None
