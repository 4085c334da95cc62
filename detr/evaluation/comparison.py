"""What the back ends of the COCO metrics compare."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from detr.annotations import AnnotationReader, identity, is_plain
from detr.errors import UserError
from detr.evaluation.results import CocoResults
from detr.files import open_regular

IouType = Literal["bbox", "segm"]


@dataclass(frozen=True, eq=False)
class Entries:
    """Annotations or detections in columns.

    images, categories: (N,) numbers.
    boxes: (N, 4) as x, y, width, height in pixels. areas: (N,) in pixels.
    scores: (N,), 0 for annotations.
    masks: polygons or run-length encodings; None where boxes are compared.
    """

    images: Int64[np.ndarray, " n"]
    categories: Int64[np.ndarray, " n"]
    boxes: Float64[np.ndarray, "n 4"]
    areas: Float64[np.ndarray, " n"]
    crowds: Bool[np.ndarray, " n"]
    scores: Float64[np.ndarray, " n"]
    masks: list[Any] | None


class Comparison:
    """Annotations and detections with numbers instead of ids, the same for every back end.

    hotcoco refuses negative ids, and its array of detections holds ids as floats, which round large ones. So images and
    categories are numbered from 0. Numbers have the order of the ids: images in this order rank detections of the same
    score. Annotations of images or categories that are not listed, and detections of such categories, do not count.

    annotations: COCO annotations, as a file or its content.
    results: COCO results, as a file, its content, or columns.
    iou_type: compare boxes ("bbox") or masks ("segm").

    images, categories: id -> number.
    names: of the categories, by number; the id follows where two have the same name.
    listed_images, listed_categories: rows as COCO lists them; images have sizes where masks are compared.
    truth, found: the annotations and the detections.

    Raises UserError where results belong to images that are not listed, or are not finite.
    """

    def __init__(
        self,
        annotations: str | Path | Mapping[str, Any],
        results: str | Path | Sequence[Mapping[str, Any]] | CocoResults,
        iou_type: IouType,
    ) -> None:
        content, found = loaded(annotations), loaded(results)
        if not isinstance(found, CocoResults):
            found = CocoResults.from_rows(found, masks=iou_type == "segm")
        _check(content, found)
        self.images = _numbers(content["images"])
        self.categories = _numbers(content["categories"])
        self.names = _names(content["categories"], self.categories)
        self.iou_type = iou_type
        self.listed_images = _images(content["images"], self.images, sizes=iou_type == "segm")
        self.listed_categories = [{"id": number, "name": str(number)} for number in range(len(self.names))]
        reader = AnnotationReader(
            annotations if isinstance(annotations, str | Path) else "evaluate_coco: the ground truth"
        )
        self.truth = self._truth(content["annotations"], reader)
        reader.report()
        self.found = self._found(found)

    def _truth(self, rows: Sequence[Mapping[str, Any]], reader: AnnotationReader) -> Entries:
        boxed = self.iou_type == "bbox"
        rows = [row if is_plain(row) else _read(row, number, reader, boxed) for number, row in enumerate(rows)]
        rows = [row for row in rows if row["image_id"] in self.images and row["category_id"] in self.categories]
        rows = [row for row in rows if all(map(math.isfinite, row["bbox"]))]
        return Entries(
            images=np.array([self.images[row["image_id"]] for row in rows], dtype=np.int64),
            categories=np.array([self.categories[row["category_id"]] for row in rows], dtype=np.int64),
            boxes=np.array([row["bbox"] if boxed else (0, 0, 0, 0) for row in rows], dtype=float).reshape(-1, 4),
            areas=np.array([row["area"] for row in rows], dtype=float),
            crowds=np.array([row["iscrowd"] for row in rows], dtype=bool),
            scores=np.zeros(len(rows)),
            masks=None if boxed else [row["segmentation"] for row in rows],
        )

    def _found(self, results: CocoResults) -> Entries:
        categories = np.array([self.categories.get(key, -1) for key in results.category_ids.tolist()], dtype=np.int64)
        areas = results.box_areas() if self.iou_type == "bbox" else results.mask_areas()
        kept = categories >= 0
        return Entries(
            images=np.array([self.images[key] for key in results.image_ids.tolist()], dtype=np.int64)[kept],
            categories=categories[kept],
            boxes=results.boxes[kept],
            areas=areas[kept],
            crowds=np.zeros(kept.sum(), dtype=bool),
            scores=results.scores[kept],
            masks=_masks(results, kept) if self.iou_type == "segm" else None,
        )


def _read(row: Mapping[str, Any], number: int, reader: AnnotationReader, boxed: bool) -> dict[str, Any]:
    """An annotation in the words of COCO. boxed: whether its box counts; otherwise it only replaces an area."""
    place = f"annotation {row.get('id', number)}"
    box = reader.box(row, place) if boxed or row.get("area") is None else (0.0,) * 4
    area = reader.area(row, box, place)
    if area < 0 and row.get("area") is not None:
        reader.accept("areas below 0, which count for no size: AP is -1 where there are no others", place)
    return {
        **row,
        "image_id": identity(row["image_id"]),
        "category_id": identity(row["category_id"]),
        "bbox": box,
        "area": area,
        "iscrowd": reader.crowd(row, place),
    }


def loaded(source: Any) -> Any:
    """The content of a JSON file; what is no path is content already."""
    if not isinstance(source, str | Path):
        return source
    with open_regular(source) as file:
        return json.load(file)


def _check(annotations: Mapping[str, Any], results: CocoResults) -> None:
    unknown = set(results.image_ids.tolist()) - {identity(image["id"]) for image in annotations["images"]}
    if unknown:
        raise UserError(
            f"evaluate_coco: {len(unknown)} images of the results, such as {min(unknown)}, are not in the annotations. "
            "Evaluate against the annotations of the same images."
        )
    broken = np.isnan(results.scores) | ~np.isfinite(results.boxes).all(axis=1)
    if broken.any():
        raise UserError(
            f"evaluate_coco: {broken.sum()} results, such as one of image {results.image_ids[broken.argmax()]}, have a "
            "box or score that is not a finite number. Repair or remove them; a model that gives them has diverged."
        )


def _numbers(rows: Iterable[Mapping[str, Any]]) -> dict[Any, int]:
    return {key: number for number, key in enumerate(sorted({identity(row["id"]) for row in rows}))}


def _images(rows: Iterable[Mapping[str, Any]], numbers: Mapping[Any, int], *, sizes: bool) -> list[dict[str, Any]]:
    by_id = {identity(row["id"]): row for row in rows}
    sides = ("height", "width") if sizes else ()
    return [{"id": number, **{side: by_id[key][side] for side in sides}} for key, number in numbers.items()]


def _names(rows: Iterable[Mapping[str, Any]], numbers: Mapping[Any, int]) -> list[str]:
    names = {identity(row["id"]): str(row["id"] if row.get("name") is None else row["name"]) for row in rows}
    count = Counter(names.values())
    return [names[key] if count[names[key]] == 1 else f"{names[key]} ({key})" for key in numbers]


def _masks(results: CocoResults, kept: Bool[np.ndarray, " n"]) -> list[Any]:
    masks = results.masks or [None] * len(results)
    places = kept.nonzero()[0].tolist()
    return [masks[place] or _outline(*results.boxes[place].tolist()) for place in places]


def _outline(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x, y + height, x + width, y + height, x + width, y]]
