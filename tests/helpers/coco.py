"""Made annotations and results in COCO format."""

import copy
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pycocotools.mask


def synthetic(seed: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)

    def box() -> list[float]:
        return [*rng.uniform(0, 100, 2).tolist(), *rng.uniform(5, 150, 2).tolist()]

    images = [{"id": 7 * number} for number in range(11)]
    truth = [
        {"id": n + 1, "image_id": 7 * int(rng.integers(8)), "category_id": int(rng.choice([2, 5])), "bbox": box()}
        for n in range(60)
    ]  # without area and iscrowd, which many exporters leave out
    found = []
    for _ in range(detections):
        entry = truth[rng.integers(len(truth))]
        shaken = (np.array(entry["bbox"]) + rng.normal(0, 6, 4)).clip(1).tolist()
        found.append({**entry, "bbox": shaken, "score": float(rng.choice([0.1, 0.5, 0.5, rng.random()]))})
        found[-1].pop("id")
    categories = [{"id": 2, "name": "a"}, {"id": 5, "name": "b"}, {"id": 9, "name": "never there"}]
    return {"images": images, "annotations": truth, "categories": categories}, found


def hard_case(seed: int, key: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ties of scores and overlaps, crowds, boxes without area, areas at the limits, entries that are not listed.

    key: makes an id of a number.
    """
    rng = np.random.default_rng(seed)

    def box() -> list[float]:
        kinds = [
            rng.integers(0, 6, 4),
            [0, 0, 10, rng.integers(1, 21)],  # overlaps that are exactly a threshold
            rng.uniform(-20, 20, 4),
            [*rng.uniform(0, 500, 2), *rng.uniform(0, 400, 2)],
        ]
        return [float(value) for value in kinds[rng.integers(len(kinds))]]

    def place(listed: int) -> dict[str, Any]:  # 7 images and 3 categories are listed
        return {"image_id": key(int(rng.integers(listed))), "category_id": key(int(rng.integers(4)))}

    truth = [
        {
            "id": number,
            **place(8),
            "bbox": box(),
            "area": float(rng.choice([0, 1024, 9216, 2e10, -5, rng.uniform(0, 20000)])),
            "iscrowd": int(rng.random() < 0.2),
            "ignore": int(rng.random() < 0.2),  # which COCO does not know
        }
        for number in range(1, 41)
    ]
    found = []
    for number in range(400):
        entry = truth[rng.integers(len(truth))]
        copied = number % 2 and entry["image_id"] != key(7)
        where = {name: entry[name] for name in ("image_id", "category_id", "bbox")} if copied else place(7)
        score = float(rng.choice([0.1, 0.5, 0.5, rng.random(), -1, 2]))
        found.append({"bbox": box(), **where, "score": score})
    images = [{"id": key(number)} for number in rng.permutation(7).tolist()]
    categories = [{"id": key(number), "name": str(number)} for number in (2, 0, 1)]
    return {"images": images, "annotations": truth, "categories": categories}, found


KEYS = {
    "from 0": lambda number: number,
    "negative": lambda number: number - 5,
    "descending": lambda number: -3 * number,
    "more than floats hold": lambda number: 2**60 + number,
    "more than 64 bits": lambda number: 2**70 * (number - 2),
}


def judged(annotations: dict[str, Any], results: list[dict[str, Any]], iou_type: str = "bbox") -> list[float]:
    """The twelve numbers by pycocotools alone: read, matched and summed up by it."""
    truth = pycocotools.coco.COCO()
    truth.dataset = copy.deepcopy(annotations)
    truth.createIndex()
    evaluation = pycocotools.cocoeval.COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def masked(seed: int, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Polygons and encoded masks, crowds among them. kind: what results have: masks, boxes, or both."""
    rng = np.random.default_rng(seed)
    height, width = 47, 61

    def mask(text: bool) -> dict[str, Any]:
        pixels = np.zeros((height, width), np.uint8, order="F")
        (top, left), (rows, columns) = rng.integers(0, 30, 2), rng.integers(3, 29, 2)
        pixels[top : top + rows, left : left + columns] = (
            rng.random(pixels[top : top + rows, left : left + columns].shape) < 0.9
        )
        encoded = pycocotools.mask.encode(pixels)
        return {**encoded, "counts": encoded["counts"].decode()} if text else encoded

    def listed(runs: list[int]) -> dict[str, Any]:
        return {"size": [height, width], "counts": [*runs, height * width - sum(runs)]}

    truth = []
    for number in range(1, 42):
        crowd = number % 11 == 0
        polygon = [(rng.random(8) * 45).tolist()]
        segmentation = listed([100, 300, 50, 200]) if crowd else polygon if number % 3 else mask(text=number % 2 == 0)
        place = {"image_id": int(rng.integers(5)), "category_id": int(rng.integers(2))}
        truth.append(
            {
                "id": number,
                **place,
                "area": float(rng.integers(3000)),
                "iscrowd": int(crowd),
                "segmentation": segmentation,
            }
        )
    found = []
    for number in range(307):
        entry = truth[rng.integers(len(truth))]
        again = isinstance(entry["segmentation"], dict) and not entry["iscrowd"]
        segmentation = entry["segmentation"] if again else mask(text=number % 2 == 0)
        box = pycocotools.mask.toBbox(segmentation).tolist()
        row = {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": float(rng.integers(5)) / 5}
        found.append(
            {
                **row,
                **({} if kind == "boxes" else {"segmentation": segmentation}),
                **({} if kind == "masks" else {"bbox": box}),
            }
        )
    images = [{"id": number, "height": height, "width": width} for number in range(5)]
    return {
        "images": images,
        "annotations": truth,
        "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
    }, found
