"""COCO's format: one JSON file (Lin et al., ECCV 2014; https://cocodataset.org/#format-data)."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.formats.base import Annotations, ImageRecord
from datasets.formats.recognition import advice, refuse_other_json
from datasets.formats.segmentation import encoded, no_masks
from detr.annotations import COCO_KEYS, AnnotationReader, identity, is_missing
from detr.errors import UserError, brief
from detr.files import open_regular
from detr.masks import Masks
from detr.types import Category


class _Object(NamedTuple):
    label: int
    box: tuple[float, ...]
    area: float
    crowd: bool
    segmentation: Any
    place: str


def read_coco(*, images: str | Path, annotations: str | Path, masks: bool = False) -> Annotations:
    """A data set in COCO's format. Objects without an area, or with an impossible one, have that of their box.

    images: the folder that file names are relative to. annotations: the JSON file.
    masks: read these too. Objects without a mask are left out then, and a warning counts them.
    Numbers as text, missing ids of annotations and the like are accepted, and a warning counts them.
    Raises UserError where the file is missing, damaged, or not in this format.
    """
    path = Path(annotations)
    return from_content(read_json(path), path, images, masks=masks)


def from_content(content: dict[str, Any], path: Path, images: str | Path, *, masks: bool = False) -> Annotations:
    """Likewise from the content of a file."""
    reader = AnnotationReader(path)
    categories = _categories(content, reader)
    records = _records(content, categories, reader, masks=masks)
    reader.report()
    if masks and content["annotations"] and not any(len(record.labels) for record in records):
        raise no_masks(path, len(content["annotations"]))
    return Annotations(source=path, images=Path(images), categories=categories, records=records)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, with its three lists. Raises UserError as `read_coco` does."""
    try:
        if path.suffix.lower() != ".json" and (hint := advice(path, "custom")):
            raise UserError(f"Annotation file {path} is no JSON file in COCO format.{hint}")
        with open_regular(path) as file:
            content = json.load(file, object_pairs_hook=_without_repeated_keys)
    except FileNotFoundError:
        near = next((folder for folder in list(path.parents)[:2] if folder.is_dir()), path)
        hint = advice(near, "custom", folders_only=True)
        raise UserError(
            f"Annotation file {path} does not exist."
            f"{hint or ' Set data.root, or data.train.annotations and data.val.annotations.'}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"Annotation file {path} is a folder, wanted a JSON file in COCO format.") from None
    except RecursionError:
        raise UserError(
            f"Annotation file {path} is nested too deeply for COCO format. Export the data set as COCO detection."
        ) from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"Annotation file {path} is no valid JSON: {str(error).partition('; ')[0]}. It may be cut short, or not "
            "be in UTF-8; copy or export it again."
        ) from None
    refuse_other_json(path, content)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"Annotation file {path} is not in COCO format: wanted an object with the lists 'images', "
                f"'annotations' and 'categories', but '{key}' is missing or no list. Export the data set as COCO "
                "detection."
            )
    return content


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, of which Python alone would silently take the last value of a key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {brief(key)} occurs twice in one object")
    return content


def _categories(content: dict[str, Any], reader: AnnotationReader) -> list[Category]:
    ids = _ids(content["categories"], "categories", reader)
    if not ids:
        raise UserError(f"Annotation file {reader.source} lists no categories, so there is nothing to detect.")
    categories = [Category(key, _name(entry, key)) for key, entry in zip(ids, content["categories"], strict=True)]
    return sorted(categories, key=lambda category: category.id)


def _name(category: dict[str, Any], key: int) -> str:
    name = category.get("name")
    return str(key if name is None else name)


def _records(
    content: dict[str, Any], categories: Sequence[Category], reader: AnnotationReader, *, masks: bool
) -> list[ImageRecord]:
    ids = _ids(content["images"], "images", reader)
    _check_annotation_ids(content["annotations"], reader)
    rank_of = {category.id: rank for rank, category in enumerate(categories)}
    objects: dict[int, list[_Object]] = {key: [] for key in ids}
    for position, entry in enumerate(content["annotations"]):
        image, found = _object(entry, position, objects, rank_of, reader)
        objects[image].append(found)
    entries = zip(ids, content["images"], strict=True)
    return [_record(key, entry, objects[key], reader, masks=masks) for key, entry in entries]


def _record(
    key: int, image: dict[str, Any], objects: Sequence[_Object], reader: AnnotationReader, *, masks: bool
) -> ImageRecord:
    height, width = _size(image, f"image {key}", reader)
    counts: list[bytes] = []
    if masks:
        read = [(found, encoded(found.segmentation, (height, width), reader, found.place)) for found in objects]
        kept = [(found, mask) for found, mask in read if mask is not None]
        objects, counts = [found for found, _ in kept], [mask for _, mask in kept]
    boxes = np.array([found.box for found in objects], dtype=np.float64).reshape(-1, 4)
    areas = np.array([found.area for found in objects], dtype=np.float64)
    impossible = (areas <= 0) | (areas > height * width)
    for area in areas[impossible].tolist():
        kind = "areas that are not above 0, or above that of the image, and replaced by those of the boxes"
        reader.accept(kind, f"{area:g} in image {key}")
    return ImageRecord(
        id=key,
        file_name=_file_name(image, key, reader),
        size=(height, width),
        boxes=boxes,
        labels=np.array([found.label for found in objects], dtype=np.int64),
        crowds=np.array([found.crowd for found in objects], dtype=bool),
        areas=np.where(impossible, boxes[:, 2] * boxes[:, 3], areas),
        masks=Masks(size=(height, width), counts=tuple(counts)) if masks else None,
        attributes={
            name: value
            for name, value in image.items()
            if name not in COCO_KEYS and not name.endswith("_url") and isinstance(value, str | int | float)
        },
    )


def _object(
    entry: dict[str, Any],
    position: int,
    images: Collection[int],
    rank_of: Mapping[int, int],
    reader: AnnotationReader,
) -> tuple[int, _Object]:
    """The image that an annotation belongs to, and what it holds."""
    place = f"entry {position} of 'annotations'" if is_missing(entry.get("id")) else f"annotation {entry['id']}"
    image, category = entry.get("image_id"), entry.get("category_id")
    if not (type(identity(image)) is int and identity(image) in images):
        raise UserError(
            f"{reader.source}: {place} belongs to image {brief(image)}, which 'images' does not list. Add it there, or "
            "remove the annotation."
        )
    if not (type(identity(category)) is int and identity(category) in rank_of):
        raise UserError(
            f"{reader.source}: {place} has the category {brief(category)}, which is not among the {len(rank_of)} known "
            f"ones ({', '.join(map(str, list(rank_of)[:10]))}). Add it to 'categories', or correct the annotation."
        )
    if entry.get("ignore"):
        reader.accept("annotations with 'ignore', which COCO does not know: they count like others", place)
    box = reader.box(entry, place)
    return reader.whole(image, place, "image_id"), _Object(
        label=rank_of[reader.whole(category, place, "category_id")],
        box=box,
        area=reader.area(entry, box, place),
        crowd=reader.crowd(entry, place),
        segmentation=entry.get("segmentation"),
        place=place,
    )


def _size(entry: dict[str, Any], place: str, reader: AnnotationReader) -> tuple[int, int]:
    height, width = (identity(entry.get(side)) for side in ("height", "width"))
    if not all(type(side) is int and 0 < side < 2**31 for side in (height, width)):
        raise UserError(
            f"{reader.source}: {place} has width {brief(entry.get('width'))} and height {brief(entry.get('height'))}, "
            "wanted two positive whole numbers. Give the size of the image in pixels that its boxes are for."
        )
    return reader.whole(entry["height"], place, "height"), reader.whole(entry["width"], place, "width")


def _file_name(entry: dict[str, Any], key: int, reader: AnnotationReader) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{reader.source}: image {key} has the file_name {brief(name)}, wanted the name of its file as text."
        )
    return name


def _ids(entries: Iterable[Any], kind: str, reader: AnnotationReader) -> list[int]:
    """The ids of images or categories, each of which occurs once."""
    seen: dict[int, None] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(
                f"{reader.source}: entry {position} of '{kind}' is {brief(entry)}, wanted an object with an id."
            )
        value = entry.get("id")
        key = identity(value)
        if type(key) is not int or not -(2**63) <= key < 2**63:
            raise UserError(
                f"{reader.source}: entry {position} of '{kind}' has the id {brief(value)}, wanted a whole number "
                "of at most 64 bits."
            )
        if key in seen:
            raise UserError(f"{reader.source}: the id {key} occurs twice in '{kind}'. Ids must be unique.")
        seen[reader.whole(value, f"entry {position} of '{kind}'", "id")] = None
    return list(seen)


def _check_annotation_ids(entries: Iterable[Any], reader: AnnotationReader) -> None:
    """Nothing is found by them, so they may be missing, or of any kind; but one that occurs twice is a mistake."""
    seen: set[Any] = set()
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or isinstance(entry.get("id"), list | dict):
            raise UserError(
                f"{reader.source}: entry {position} of 'annotations' is {brief(entry)}, wanted an object with an "
                "image_id, a category_id and a bbox."
            )
        key = identity(entry.get("id"))
        if is_missing(key):
            reader.accept("annotations without an id", f"entry {position}")
        elif key in seen:
            raise UserError(f"{reader.source}: the id {key} occurs twice in 'annotations'. Ids must be unique.")
        seen.add(key)
