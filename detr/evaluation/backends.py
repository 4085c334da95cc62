"""The back ends of the COCO metrics: hotcoco, and pycocotools, which judges it. The only file that imports hotcoco."""

import contextlib
import io
from typing import Literal, get_args

import hotcoco
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from detr.errors import UserError
from detr.evaluation.comparison import Comparison, Entries

Backend = Literal["hotcoco", "pycocotools"]


def check_backend(backend: str, wanted: str) -> None:
    """Raise UserError where there is no such back end. wanted: the beginning of the message."""
    if backend not in get_args(Backend):
        names = " or ".join(f"'{name}'" for name in get_args(Backend))
        renamed = " hotcoco has taken the place of faster-coco-eval: write 'hotcoco'." if backend == "faster" else ""
        raise UserError(f"{wanted} {names}, got '{backend}'.{renamed}")


def hotcoco_evaluation(comparison: Comparison, max_dets: int) -> hotcoco.COCOeval:
    """hotcoco's evaluation, matched and accumulated; ids in it are the numbers of the comparison.

    Annotations and detections have the ids 1 to N, in their order.
    max_dets: most detections counted in an image; recall is also computed for 1 and 10.
    """
    truth, found = comparison.truth, comparison.found
    annotations = hotcoco.COCO.from_arrays(
        comparison.listed_images,
        comparison.listed_categories,
        truth.images,
        truth.categories,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.crowds,
        segmentation=truth.masks,
    )
    table = np.column_stack((found.images, found.boxes, found.scores, found.categories))
    detections = annotations.load_res(table, segmentation=found.masks)
    if found.masks is not None:  # whose areas are not always those of the boxes
        detections.update_anns(ids=np.arange(1, len(table) + 1), area=found.areas)
    evaluation = hotcoco.COCOeval(annotations, detections, comparison.iou_type)
    evaluation.params.max_dets = [1, 10, max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def pycocotools_evaluation(comparison: Comparison, max_dets: int) -> pycocotools.cocoeval.COCOeval:
    """The same evaluation by pycocotools, the reference."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth, found = (_dataset(comparison, entries) for entries in (comparison.truth, comparison.found))
        evaluation = pycocotools.cocoeval.COCOeval(truth, found, comparison.iou_type)
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _dataset(comparison: Comparison, entries: Entries) -> pycocotools.coco.COCO:
    columns = {
        "image_id": entries.images.tolist(),
        "category_id": entries.categories.tolist(),
        "bbox": entries.boxes.tolist(),
        "area": entries.areas.tolist(),
        "iscrowd": entries.crowds.astype(int).tolist(),
        "score": entries.scores.tolist(),
        **({} if entries.masks is None else {"segmentation": entries.masks}),
    }
    rows = enumerate(zip(*columns.values(), strict=True), start=1)  # pycocotools takes the id 0 for no match
    coco = pycocotools.coco.COCO()
    coco.dataset = {
        "images": comparison.listed_images,
        "categories": comparison.listed_categories,
        "annotations": [{"id": n, **dict(zip(columns, row, strict=True))} for n, row in rows],
    }
    coco.createIndex()
    return coco
