"""COCO's format: one JSON file (Lin et al., ECCV 2014; https://cocodataset.org/#format-data)."""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.formats.base import Annotations, ImageRecord, brief
from detr.errors import UserError
from detr.types import Category


def read_coco(*, images: str | Path, annotations: str | Path) -> Annotations:
    """A data set in COCO's format. Objects without an area have that of their box.

    images: the folder that file names are relative to. annotations: the JSON file.
    Raises UserError where the file is missing, damaged, or not in this format.
    """
    path = Path(annotations)
    content = _read_json(path)
    categories = _categories(content, path)
    return Annotations(
        source=path, images=Path(images), categories=categories, records=_records(content, categories, path)
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_repeated_keys)
    except FileNotFoundError:
        raise UserError(
            f"Annotation file {path} does not exist. Set data.root, or data.train.annotations and data.val.annotations."
        ) from None
    except IsADirectoryError:
        raise UserError(f"Annotation file {path} is a folder, wanted a JSON file in COCO format.") from None
    except RecursionError:
        raise UserError(
            f"Annotation file {path} is nested too deeply for COCO format. Export the data set as COCO detection."
        ) from None
    except ValueError as error:
        raise UserError(
            f"Annotation file {path} is no valid JSON: {str(error).partition('; ')[0]}. It may be cut short; copy or "
            "export it again."
        ) from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"Annotation file {path} is not in COCO format: wanted an object with the lists 'images', "
                f"'annotations' and 'categories', but '{key}' is missing. Export the data set as COCO detection."
            )
    return content


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, of which Python alone would silently take the last value of a key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {brief(key)} occurs twice in one object")
    return content


def _categories(content: dict[str, Any], path: Path) -> list[Category]:
    entries = content["categories"]
    _check_ids(entries, "categories", path)
    if not entries:
        raise UserError(f"Annotation file {path} lists no categories, so there is nothing to detect.")
    return sorted((Category(entry["id"], str(entry.get("name", entry["id"]))) for entry in entries), key=lambda c: c.id)


def _records(content: dict[str, Any], categories: Sequence[Category], path: Path) -> list[ImageRecord]:
    _check_ids(content["images"], "images", path)
    _check_ids(content["annotations"], "annotations", path)
    rank_of = {category.id: rank for rank, category in enumerate(categories)}
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    images = {entry["id"] for entry in content["images"]}
    for entry in content["annotations"]:
        _check_object(entry, images, rank_of, path)
        objects[entry["image_id"]].append(entry)
    return [_record(entry, objects[entry["id"]], rank_of, path) for entry in content["images"]]


def _record(
    image: dict[str, Any], objects: Sequence[dict[str, Any]], rank_of: Mapping[int, int], path: Path
) -> ImageRecord:
    boxes = np.array([[_float(value) for value in entry["bbox"]] for entry in objects], dtype=np.float64).reshape(-1, 4)
    areas = [entry.get("area", width * height) for entry, (_, _, width, height) in zip(objects, boxes, strict=True)]
    return ImageRecord(
        id=image["id"],
        file_name=_file_name(image, path),
        size=_size(image, path),
        boxes=boxes,
        labels=np.array([rank_of[entry["category_id"]] for entry in objects], dtype=np.int64),
        crowds=np.array([bool(entry.get("iscrowd", 0)) for entry in objects], dtype=bool),
        areas=np.array(areas, dtype=np.float64),
    )


def _check_object(entry: dict[str, Any], images: Collection[int], categories: Collection[int], path: Path) -> None:
    image, category, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
    if not isinstance(image, int) or image not in images:
        raise UserError(
            f"{path}: annotation {entry['id']} belongs to image {brief(image)}, which 'images' does not list. Add it "
            "there, or remove the annotation."
        )
    if not isinstance(category, int) or category not in categories:
        raise UserError(
            f"{path}: annotation {entry['id']} has the category {brief(category)}, which is not among the "
            f"{len(categories)} known ones ({', '.join(map(str, list(categories)[:10]))}). Add it to 'categories', "
            "or correct the annotation."
        )
    if not _is_finite(entry.get("area", 0)):
        raise UserError(
            f"{path}: annotation {entry['id']} has the area {brief(entry['area'])}, wanted a number of pixels. Correct "
            "it, or leave it out."
        )
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise UserError(
            f"{path}: annotation {entry['id']} has the bbox {brief(box)}, wanted [x, y, width, height] in pixels."
        )


def _is_finite(value: Any) -> bool:
    """Whether it is a number, and also as a float finite: JSON has whole numbers of any length."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _float(value: int | float) -> float:
    return float(value) if _is_finite(value) else math.nan


def _size(entry: dict[str, Any], path: Path) -> tuple[int, int]:
    height, width = entry.get("height"), entry.get("width")
    if not (isinstance(height, int) and isinstance(width, int) and 0 < height < 2**31 and 0 < width < 2**31):
        raise UserError(
            f"{path}: image {entry['id']} has width {brief(width)} and height {brief(height)}, wanted two "
            "positive whole numbers."
        )
    return height, width


def _file_name(entry: dict[str, Any], path: Path) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: image {entry['id']} has no 'file_name'.")
    return name


def _check_ids(entries: Iterable[Any], kind: str, path: Path) -> None:
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        identity = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(identity, int) or isinstance(identity, bool) or not -(2**63) <= identity < 2**63:
            raise UserError(
                f"{path}: entry {position} of '{kind}' has the id {brief(identity)}, wanted a whole number."
            )
        if identity in seen:
            raise UserError(f"{path}: the id {identity} occurs twice in '{kind}'. Ids must be unique.")
        seen.add(identity)
