"""The format CVAT for images 1.1: one XML file (https://docs.cvat.ai/docs/manual/advanced/xml_format)."""

import math
from collections.abc import Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from datasets.formats.base import Annotations, ImageRecord, numbered
from datasets.formats.reading import check_corners, completed, line_of, number, read_xml, size_of, warn
from datasets.formats.recognition import advice
from detr.errors import UserError, brief

_EDGES = ("xtl", "ytl", "xbr", "ybr")
_SHAPES = ("polyline", "points", "cuboid", "mask", "ellipse", "skeleton")  # which have no reading as a box here


def read_cvat(*, images: str | Path, annotations: str | Path) -> Annotations:
    """An export as "CVAT for images 1.1". Categories have the order of the task's labels, with ids from 1.

    images: the folder that file names are relative to. annotations: the XML file.
    A rotated box or a polygon becomes the box around it. Shapes of other kinds are left out, with a warning.
    Raises UserError where the file is missing or damaged, has tracks of a video, or another format.
    """
    path = Path(annotations).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        hint = advice(path, "cvat") or " Set data.train.annotations and data.val.annotations."
        raise UserError(f"Annotation file {path} {problem}, wanted an XML file of CVAT.{hint}")
    if hint := advice(path, "cvat"):
        raise UserError(f"Annotation file {path} is not in the format CVAT for images.{hint}")
    root = read_xml(path)
    if root.tag != "annotations":
        raise UserError(
            f"{path}: the root is <{root.tag}>, wanted <annotations>. Export the task as 'CVAT for images 1.1'."
        )
    if (track := root.find("track")) is not None:
        raise UserError(
            f"{path}, line {line_of(track)}: this has tracks of a video. Export the task as 'CVAT for images 1.1', "
            "not as 'CVAT for video 1.1': then each frame is an image."
        )
    found = list(root.iter("image"))
    labels = _labels(root, found)
    if not labels:
        raise UserError(f"{path}: there is no label, so there is nothing to detect. See whether it is the right file.")
    rank_of = {name: rank for rank, name in enumerate(labels)}
    left = [f"<{kind}> in line {line_of(shape)}" for kind in _SHAPES for shape in root.iterfind(f"image/{kind}")]
    warn(path, left, "{} shapes are no boxes or polygons, such as {}, and are left out.")
    folder = Path(images).expanduser()
    records = completed([_record(image, rank_of, path) for image in found], folder, path)
    return Annotations(source=path, images=folder, categories=numbered(labels, path), records=records, named=True)


def _labels(root: Element, images: list[Element]) -> list[str]:
    """Those of the task; where there is no list of them, those of the boxes, sorted."""
    # The parts of a skeleton are labels with a parent.
    listed = [label.findtext("name") or "" for label in root.iterfind("meta//label") if not label.findtext("parent")]
    used = {shape.get("label", "") for image in images for kind in ("box", "polygon") for shape in image.iterfind(kind)}
    return list(dict.fromkeys(name for name in listed or sorted(used) if name))


def _record(image: Element, rank_of: Mapping[str, int], path: Path) -> ImageRecord:
    name = image.get("name")
    if not name:
        raise UserError(f"{path}, line {line_of(image)}: this image has no name, wanted that of its file. Add it.")
    shapes = [shape for shape in image if shape.tag in ("box", "polygon")]
    corners, labels = [], []
    for shape in shapes:
        place, label = f"{path}, line {line_of(shape)}", shape.get("label", "")
        if label not in rank_of:
            raise UserError(
                f"{place}: the label {brief(label)} is not among those of the task, {brief(list(rank_of))}. Add it to "
                "<labels>, or correct the shape."
            )
        labels.append(rank_of[label])
        corners.append(_around_box(shape, place) if shape.tag == "box" else _around_polygon(shape, place))
    return ImageRecord.of(name, corners, labels, size=size_of(image.get("height"), image.get("width")))


def _around_box(box: Element, place: str) -> list[float]:
    texts = [box.get(edge) for edge in _EDGES]
    edges = [edge for edge in map(number, texts) if edge is not None]
    if len(edges) < len(_EDGES):
        raise UserError(
            f"{place}: this box has {brief(texts)}, wanted the four numbers {', '.join(_EDGES)}. Correct it."
        )
    check_corners(edges, place)
    angle = math.radians(number(box.get("rotation")) or 0.0)
    if angle == 0:
        return edges
    left, top, right, bottom = edges
    width, height = right - left, bottom - top  # turned about the center
    across = (abs(width * math.cos(angle)) + abs(height * math.sin(angle))) / 2
    down = (abs(width * math.sin(angle)) + abs(height * math.cos(angle))) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return [x - across, y - down, x + across, y + down]


def _around_polygon(polygon: Element, place: str) -> list[float]:
    points = [[number(value) for value in pair.split(",")] for pair in (polygon.get("points") or "").split(";")]
    known = [(pair[0], pair[1]) for pair in points if len(pair) == 2 and None not in pair]
    if len(known) < max(len(points), 3):
        raise UserError(
            f"{place}: this polygon has the points {brief(polygon.get('points'))}, wanted three or more as x,y;x,y;... "
            "Correct it."
        )
    corners = np.array(known, dtype=np.float64)
    return [*corners.min(0).tolist(), *corners.max(0).tolist()]
