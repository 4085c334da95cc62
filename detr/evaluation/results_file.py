"""Results of any detector, read from a COCO results file and checked against the data that they are of."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pycocotools.mask

from detr.annotations import identity
from detr.errors import UserError, brief
from detr.evaluation.comparison import loaded
from detr.evaluation.listed import name_key
from detr.evaluation.results import CocoResults
from detr.files import open_regular
from detr.masks import encode_segmentation

logger = logging.getLogger(__name__)
_BEGINNING = 2**20  # bytes of a file, where its first result is
_MANY = 0.2  # of the boxes; detectors let few of theirs reach out of the image
_REMEDY = 'Wanted rows {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, as COCO has them.'


def read_results(path: str | Path, annotations: Mapping[str, Any], *, option: str = "results") -> CocoResults:
    """The detections of a file, with the ids of the annotations.

    A row whose image_id is not listed, or is that of an image of another name, may have a listed `file_name`, and one
    whose category_id is not, or is that of another class, a `category_name`, as results.json of predict.py has them.
    Rows of classes that are not listed are left out with a warning. Scores may have any range, since their order alone
    counts.

    path: a list of rows {"image_id", "category_id", "bbox": [x, y, width, height] in pixels, "score"}, or an object
        with such a list as "annotations". Rows may have a mask as "segmentation" besides the bbox, or instead of it.
    annotations: the content of a COCO annotation file. option: names the path in messages.

    Raises UserError for anything else, for images that are not listed, for sides below 0 and for damaged masks.
    """
    path = Path(path).expanduser()
    source = f"{option}={path}"
    rows = _rows(path, source)
    images, categories = _Images(annotations["images"]), _Categories(annotations["categories"])
    kept, masks, unknown = [], [], []
    for number, row in enumerate(rows):
        place = f"{source}: row {number}"
        image = images.of(row)
        if image is None:
            of = brief(row.get("image_id") if row.get("file_name") is None else row["file_name"])
            raise UserError(f"{place} is of the image {of}, which the data do not list. Evaluate on the data it is of.")
        category = categories.of(row)
        if category is None:
            unknown.append(row.get("category_id"))
        else:
            mask, score = _mask(row, images.sizes[image], place), _number(row.get("score"), "score", place)
            box = pycocotools.mask.toBbox(mask).tolist() if mask and "bbox" not in row else _box(row, place)
            kept.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
            masks.append(mask)
    if unknown:
        listed = ", ".join(f"{key} {name}" for key, name in list(categories.names.items())[:5])
        text = (
            f"{source}: {len(unknown)} of {len(rows)} rows have a category_id that the data do not list, such as "
            f"{brief(unknown[0])}; those listed are {listed}."
        )
        if not kept:
            raise UserError(f"{text} Give results with the category ids of the data.")
        logger.warning("%s These rows do not count.", text)
    results = _with_masks(CocoResults.from_rows(kept), masks, source)
    _warn_of_corners(results, annotations["images"], source)
    return results


def holds_masks(path: str | Path) -> bool:
    """Whether the first results of a file have masks; no where it cannot be read, which is for `read_results`."""
    with suppress(OSError), open_regular(Path(path).expanduser()) as file:
        return b'"segmentation"' in file.read(_BEGINNING)
    return False


class _Images:
    """The ids of the listed images, found by id or by the file name that results have.

    sizes: (height, width) by id.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.sizes, self.by_name = {}, defaultdict(set)
        for row in rows:
            self.sizes[row["id"]] = row["height"], row["width"]
            for name in _endings(row["file_name"]):
                self.by_name[name].add(row["id"])

    def of(self, row: Mapping[str, Any]) -> Any:
        """None where no image is meant, or several could be."""
        key = _id(row.get("image_id"))
        names = _endings(row["file_name"]) if isinstance(row.get("file_name"), str) else []
        found = next((self.by_name[name] for name in names if name in self.by_name), set())
        if key in self.sizes and (key in found or not found):
            return key
        return next(iter(found)) if len(found) == 1 else None


class _Categories:
    """The ids of the listed categories, found by id or by name."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.names = {row["id"]: row["name"] for row in rows}
        self.ids = {name: key for key, name in self.names.items()}

    def of(self, row: Mapping[str, Any]) -> Any:
        """None where none is meant."""
        key, name = _id(row.get("category_id")), row.get("category_name")
        if key in self.names and name in (None, self.names[key]):
            return key
        return self.ids.get(name) if isinstance(name, str) else None


def _rows(path: Path, source: str) -> list[dict[str, Any]]:
    try:
        content = loaded(path)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist. Give a COCO results file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read as JSON: {error}. {_REMEDY}") from None
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"{source} holds no list of results, nor one as 'annotations'. {_REMEDY}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{source}: row {number} is {brief(row)}. {_REMEDY}")
        for name in ("category_id", *([] if row.get("segmentation") else ["bbox"]), "score"):
            if name not in row:
                raise UserError(f"{source}: row {number} lacks {name}. {_REMEDY}")
    return rows


def _box(row: Mapping[str, Any], place: str) -> list[float]:
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4:
        raise UserError(f"{place} has the bbox {brief(box)}. {_REMEDY}")
    box = [_number(value, "bbox", place) for value in box]
    if min(box[2:]) < 0:
        raise UserError(f"{place} has a bbox of negative size, {brief(box)}. {_REMEDY}")
    return box


def _mask(row: Mapping[str, Any], size: tuple[int, int], place: str) -> dict[str, Any] | None:
    if not row.get("segmentation"):
        return None
    try:
        return {"size": list(size), "counts": encode_segmentation(row["segmentation"], size)}
    except ValueError as error:
        raise UserError(
            f"{place} has a damaged segmentation: {error}. Write masks as COCO has them, in pixels of the original "
            "images, or leave them out."
        ) from None


def _with_masks(results: CocoResults, masks: list[Any], source: str) -> CocoResults:
    """The masks are those of the rows, None where a row has none."""
    missing = masks.count(None)
    if missing == len(masks):
        return results
    if missing:
        logger.warning(
            "%s: %d of %d rows have no segmentation; their boxes stand for their masks.", source, missing, len(masks)
        )
    own = [pycocotools.mask.area(mask) if mask else np.nan for mask in masks]
    areas = np.where(np.isnan(own), results.box_areas(), own)
    return replace(results, masks=masks, areas=areas)


def _number(value: Any, name: str, place: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{place} has the {name} {brief(value)}, wanted finite numbers. Repair or remove such rows.")
    return float(value)


def _warn_of_corners(results: CocoResults, images: Iterable[Mapping[str, Any]], source: str) -> None:
    sizes = {row["id"]: (row["width"], row["height"]) for row in images}
    limits = np.array([sizes[key] for key in results.image_ids], dtype=float).reshape(-1, 2)
    beyond = (results.boxes[:, :2] + results.boxes[:, 2:] > 1.05 * limits).any(axis=1)
    if beyond.sum() > _MANY * len(results):
        logger.warning(
            "%s: %d of %d boxes reach out of their images. If they are corners x1, y1, x2, y2, convert them to "
            "x, y, width, height; if they are of resized images, to pixels of the originals.",
            *(source, beyond.sum(), len(results)),
        )


def _id(value: Any) -> Any:
    """As in the annotations; None for what can be no id."""
    key = identity(value)
    return key if type(key) in (int, str) else None


def _endings(name: str) -> list[str]:
    """A file name with all of its folders, with fewer and fewer, and alone."""
    parts = PurePosixPath(name_key(name)).parts
    return ["/".join(parts[start:]) for start in range(len(parts))]
