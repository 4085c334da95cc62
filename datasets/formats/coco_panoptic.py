"""COCO's panoptic format: one JSON file and a PNG an image, whose colors are the ids of segments.

Kirillov et al., CVPR 2019; https://cocodataset.org/#format-data. Things and stuff are objects alike, as DETR trains on
them. The pictures of segments are read when they are asked for: COCO has 118,000.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from datasets.formats.base import Annotations, ImageRecord
from datasets.formats.coco import from_content, read_json
from detr.annotations import identity
from detr.errors import UserError, brief
from detr.images import read_image
from detr.segments import ids_of_colors

_MOST = 256**3  # ids that colors can tell apart
_REMEDY = (
    'Wanted a file such as panoptic_val2017.json, with {"image_id", "file_name", "segments_info"} for each image. '
    "Files of boxes are read with data=coco or data=custom."
)


def read_coco_panoptic(
    *, images: str | Path, annotations: str | Path, segments: str | Path, masks: bool = False
) -> Annotations:
    """A data set in COCO's panoptic format. Each segment is an object: its box, its class, and whether it is a crowd.

    images: the folder that file names are relative to. annotations: the JSON file. segments: the folder of the PNGs,
    each of which has the name of its image; read for masks alone.
    Raises UserError where a file or folder is missing, damaged, or not in this format.
    """
    path, folder = Path(annotations), Path(segments)
    if masks and not folder.is_dir():
        raise UserError(
            f"{path}: the folder of its PNGs, {folder}, does not exist. Unpack them, or set data.train.segments and "
            "data.val.segments."
        )
    content = read_json(path)
    objects, ids = _objects(content, path)
    read = from_content({**content, "annotations": objects}, path, images)
    things = {identity(row["id"]): _is_thing(row, path) for row in content["categories"]}
    return replace(
        read,
        categories=[replace(category, is_thing=things[category.id]) for category in read.categories],
        records=[_with_segments(record, ids, path) for record in read.records],
        segments=folder if masks else None,
    )


def segments_file(file_name: str) -> str:
    """The name of the PNG of an image."""
    return f"{PurePosixPath(file_name).stem}.png"


def read_segments(path: str | Path) -> Int64[np.ndarray, "height width"]:
    """The id of the segment of each pixel, 0 where there is none. Raises UserError as `detr.images.read_image` does."""
    return ids_of_colors(read_image(path).permute(1, 2, 0).numpy())


def read_masks(record: ImageRecord, segments: Path) -> Bool[np.ndarray, "n height width"]:
    """The mask of each object of a record. segments: as in `Annotations`.

    Raises UserError where the PNG is missing or damaged, or is not of this image.
    """
    path = segments / segments_file(record.file_name)
    ids = read_segments(path)
    if ids.shape != record.size:
        raise UserError(f"{path} has the height and width {ids.shape}, wanted those of its image, {record.size}.")
    assert record.segments is not None
    missing = np.setdiff1d(record.segments, ids)
    if len(missing):
        raise UserError(
            f"{path} has no pixel of {len(missing)} of the {len(record.segments)} segments of image {record.id}, such "
            f"as {missing[0]}. Use PNGs and a JSON file of one export; ids are red + 256 green + 256^2 blue."
        )
    return ids == record.segments[:, None, None]


def _objects(content: Mapping[str, Any], path: Path) -> tuple[list[dict[str, Any]], dict[Any, list[int]]]:
    """All segments as COCO's files of boxes list objects, and by the id of each image the ids of its segments.

    The content is changed: a copy of it would take gigabytes.
    """
    names = {identity(row.get("id")): row.get("file_name") for row in content["images"] if isinstance(row, dict)}
    objects: list[dict[str, Any]] = []
    ids: dict[Any, list[int]] = {}
    for position, entry in enumerate(content["annotations"]):
        infos = entry.get("segments_info") if isinstance(entry, dict) else None
        if not isinstance(infos, list):
            raise UserError(f"{path}: entry {position} of 'annotations' has no list 'segments_info'. {_REMEDY}")
        image = identity(entry.get("image_id"))
        if not isinstance(image, int | str) or image not in names:
            raise UserError(
                f"{path}: entry {position} of 'annotations' belongs to image {brief(image)}, which 'images' does not "
                "list. Add it there, or remove the entry."
            )
        if image in ids:
            raise UserError(
                f"{path}: image {image} has several entries in 'annotations', wanted one with all segments."
            )
        name = names[image]
        if isinstance(name, str) and entry.get("file_name") != segments_file(name):
            raise UserError(
                f"{path}: the segments of image {image}, {brief(name)}, are in {brief(entry.get('file_name'))}, wanted "
                f"'{segments_file(name)}': a PNG has the name of its image. Rename it, and correct the JSON file."
            )
        ids[image] = [_id(info, image, path) for info in infos]
        for info in infos:
            info |= {"id": f"{info['id']} of image {image}", "image_id": image}  # ids repeat from image to image
            objects.append(info)
    return objects, ids


def _id(info: Any, image: object, path: Path) -> int:
    key = info.get("id") if isinstance(info, dict) else None
    if type(key) is not int or not 0 < key < _MOST:
        raise UserError(
            f"{path}: a segment of image {image} is {brief(info)}, wanted an object with an id from 1 to {_MOST - 1}, "
            "as colors have it."
        )
    return key


def _is_thing(row: Mapping[str, Any], path: Path) -> bool:
    if row.get("isthing") not in (0, 1):
        raise UserError(
            f"{path}: the category {brief(row.get('name'))} has isthing {brief(row.get('isthing'))}, wanted 1 for "
            "things, which are counted, and 0 for stuff."
        )
    return bool(row["isthing"])


def _with_segments(record: ImageRecord, ids: Mapping[Any, list[int]], path: Path) -> ImageRecord:
    if record.id not in ids:
        raise UserError(
            f"{path}: image {record.id} has no entry in 'annotations'. Remove it from 'images', or add its segments."
        )
    return replace(record, segments=np.array(ids[record.id], dtype=np.int64))
