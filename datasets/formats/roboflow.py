"""Roboflow's COCO export: a folder for each part, with its images and _annotations.coco.json beside them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.formats.base import Annotations
from datasets.formats.coco import from_content, read_json
from datasets.formats.reading import PARTS, Part, no_part, part_of
from datasets.formats.recognition import ROBOFLOW, advice
from detr.errors import UserError


def read_roboflow(*, root: str | Path, part: Part = "train", masks: bool = False) -> Annotations:
    """One part of a download from Roboflow as COCO: train, valid or test. Ids are those of the file.

    root: the folder that holds the parts; one without them is all training. The category with which Roboflow heads the
    list, that of no object and the supercategory of the others, is left out. masks: as in `read_coco`.
    Raises UserError where files are missing or no such ones.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Set data.root to the folder with train/ and valid/.")
    found = part_of(folder, part) or (folder if part == "train" else None)
    if found is None:
        raise no_part(folder, part, f"folder {' or '.join(PARTS[part])}")
    path = found / ROBOFLOW
    if not path.is_file():
        hint = (
            advice(folder, "roboflow") or " Export the data set as COCO, and set data.root to the folder with train/."
        )
        raise UserError(f"{folder} is no COCO export of Roboflow: {path} does not exist.{hint}")
    return replace(from_content(_without_heading(read_json(path)), path, found, masks=masks), named=True)


def _without_heading(content: dict[str, Any]) -> dict[str, Any]:
    categories = [entry for entry in content["categories"] if isinstance(entry, dict)]
    above = [entry.get("supercategory") for entry in categories]
    used = [entry.get("category_id") for entry in content["annotations"] if isinstance(entry, dict)]
    headings = [
        entry
        for entry in categories
        if entry.get("supercategory") == "none" and entry.get("name") in above and entry.get("id") not in used
    ]
    return {**content, "categories": [entry for entry in content["categories"] if entry not in headings]}
