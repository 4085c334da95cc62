"""Annotated images: those that findings name, and some others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from datasets.findings import Finding
from datasets.formats.base import ImageRecord
from detr.drawing import draw_detections
from detr.errors import UserError
from detr.images import read_image
from detr.types import Detections
from tools.data_check.facts import Part

_COUNT, _OF_FINDINGS = 12, 8
_SIDE = 480  # pixels of the long side


@dataclass(frozen=True)
class Picture:
    """An image with all that is annotated in it. caption: its file, and what was found there."""

    image: Image.Image
    caption: str


def draw(parts: Sequence[Part], findings: Mapping[str, Sequence[Finding]]) -> list[Picture]:
    """One for each finding that names files that can be read, then images spread over the parts."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        for finding in findings[part.name]:
            for name in finding.files[:2]:
                wanted.setdefault((part.name, name), []).append(finding.kind)
    chosen = list(wanted)[:_OF_FINDINGS]
    for part in parts:
        names = list(part.annotated)
        step = max(len(names) // _COUNT, 1)
        chosen += [(part.name, name) for name in names[::step]]
    by_name = {part.name: part for part in parts}
    pictures: list[Picture] = []
    for part_name, name in dict.fromkeys(chosen):
        part, kinds = by_name[part_name], wanted.get((part_name, name), [])
        if name in part.annotated and (image := _drawn(part, part.annotated[name])) is not None:
            pictures.append(
                Picture(
                    image, ": ".join([f"{part_name}/{name}", *([", ".join(dict.fromkeys(kinds))] if kinds else [])])
                )
            )
        if len(pictures) == _COUNT:
            break
    return pictures


def _drawn(part: Part, record: ImageRecord) -> Image.Image | None:
    try:
        pixels = read_image(part.dataset.folder / record.file_name, record.size)
    except UserError:
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = min(_SIDE / max(image.size), 1)
    image = image.resize([max(round(side * scale), 1) for side in image.size])
    with np.errstate(over="ignore", invalid="ignore"):
        corners = np.hstack((record.boxes[:, :2], record.boxes[:, :2] + record.boxes[:, 2:])) * scale
    usable = np.isfinite(corners).all(1)
    corners = np.hstack((np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])))
    labels = record.labels[usable].tolist()
    names = [part.dataset.own_categories[label].name for label in labels]
    found = Detections(
        boxes=torch.from_numpy(corners[usable]).float(),
        scores=torch.ones(len(labels)),
        labels=torch.tensor(labels, dtype=torch.int64),
        names=names,
        queries=torch.arange(len(labels)),
    )
    return draw_detections(image, found, enlarge=True, scores=False)
