"""YOLO's format: one text file an image, and a data.yaml (https://docs.ultralytics.com/datasets/detect).

A line is `class center_x center_y width height`, relative to the sides of the image. Lines of segmentation,
`class x1 y1 x2 y2 x3 y3 ...`, and those of rotated boxes, with four points, become the boxes around their points, and
masks where these are asked for.
"""

import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import yaml

from datasets.formats.base import Annotations, ImageRecord, numbered
from datasets.formats.reading import (
    PARTS,
    Part,
    completed,
    images_in,
    is_image,
    no_part,
    part_of,
    read_text,
    stem,
    warn,
)
from datasets.formats.recognition import advice
from datasets.formats.segmentation import no_masks
from detr.errors import UserError, brief
from detr.masks import Masks, encode_segmentation

logger = logging.getLogger(__name__)
_ROUNDING = 1e-3  # by which tools exceed the sides of an image
_NO_LABELS = ("classes.txt", "labels.txt", "notes.txt")  # what tools write beside the labels


class _Description(NamedTuple):
    """What data.yaml says. names: of classes, by the number that labels have. keypoints: numbers a line ends with."""

    source: Path
    content: Mapping[str, Any]
    names: dict[int, str]
    keypoints: int


class _Line(NamedTuple):
    """One object. values: a box or points, relative to the sides of the image. place: file and line."""

    label: int
    values: list[float]
    place: str


def read_yolo(*, root: str | Path, part: Part = "train", masks: bool = False) -> Annotations:
    """One part of a data set in YOLO's format. Categories have the order of data.yaml, with ids from 1.

    root: the folder with data.yaml, or that file. Where there is none, classes.txt gives the names, one a line.
    part: where data.yaml names no part, it is looked for under its usual names, and all images are those of training
        where there are no parts at all.
    masks: fill the polygons. Lines of boxes, and polygons without a pixel, are left out then, and a warning counts
        them. Areas are those of the masks.

    Paths of data.yaml are relative to its `path`, or to the file. Where an absolute one does not exist, because it is
    of another machine, its end is looked for in the folder; a warning says so. Labels are in the folder whose path has
    `labels` in place of the last `images`, or beside the images. An image without a label file has no objects.
    Raises UserError where files are missing or no such ones.
    """
    found = _description(Path(root).expanduser())
    bases = _bases(found)
    places = _places(found, part, bases)
    source = places[0] if len(places) == 1 else found.source
    images = sorted({path for place in places for path in _images(place, bases)})
    if not images:
        raise UserError(f"{source}: there are no images of the part '{part}'. Put them there, or correct data.yaml.")
    folder = Path(os.path.commonpath([path.parent for path in images]))
    rank_of = {number: rank for rank, number in enumerate(found.names)}
    labels = _label_files(images, source)
    empty = [ImageRecord.of(path.relative_to(folder).as_posix(), [], []) for path in images]
    records: list[ImageRecord] = []
    left: list[str] = []
    for path, image in zip(images, completed(empty, folder, source), strict=True):
        lines = _lines(labels.get(path), rank_of, found.keypoints)
        record = _in_pixels(image, lines)
        records.append(_with_masks(record, lines, left) if masks else record)
    if left and not any(len(record.labels) for record in records):
        raise no_masks(source, len(left))
    warn(source, left, "{} objects have no polygon with pixels in the image, such as {}, and are left out.")
    categories = numbered(list(found.names.values()), found.source)
    return Annotations(source=source, images=folder, categories=categories, records=records, named=True)


def _in_pixels(image: ImageRecord, lines: Sequence[_Line]) -> ImageRecord:
    """The record of an image with its objects."""
    height, width = image.size
    record = ImageRecord.of(image.file_name, [_corners(line.values) for line in lines], [line.label for line in lines])
    corners = np.concatenate((record.boxes[:, :2], record.boxes[:, :2] + record.boxes[:, 2:]), axis=1)
    scaled = (corners * (width, height, width, height)).tolist()
    return ImageRecord.of(image.file_name, scaled, record.labels.tolist(), id=image.id, size=image.size)


def _mask(values: Sequence[float], size: tuple[int, int]) -> bytes | None:
    """The encoding of a polygon; None for a box, and where the polygon has no pixel."""
    if len(values) == 4:
        return None
    points = [value * side for value, side in zip(values, itertools.cycle(size[::-1]))]
    counts = encode_segmentation([points], size)
    return counts if Masks(size=size, counts=(counts,)).areas()[0] > 0 else None


def _with_masks(record: ImageRecord, lines: Sequence[_Line], left: list[str]) -> ImageRecord:
    """The record with the objects that have a mask. The places of the others come to `left`."""
    counts = [_mask(line.values, record.size) for line in lines]
    left += [line.place for line, mask in zip(lines, counts, strict=True) if mask is None]
    masks = Masks(size=record.size, counts=tuple(mask for mask in counts if mask is not None))
    kept = record.select(np.array([mask is not None for mask in counts], dtype=bool))
    return replace(kept, masks=masks, areas=masks.areas())


def _description(root: Path) -> _Description:
    if not root.exists():
        raise UserError(f"{root} does not exist. Set data.root to the folder that holds data.yaml.")
    files = [root] if root.is_file() else sorted(path for path in root.iterdir() if path.suffix in (".yaml", ".yml"))
    files.sort(key=lambda path: path.stem != "data")
    if files and files[0].suffix in (".yaml", ".yml"):
        return _read_yaml(files[0])
    listed = next((path for path in (root / "classes.txt", root / "labels" / "classes.txt") if path.is_file()), None)
    if listed is None:
        hint = advice(root, "yolo") or " Set data.root to the folder that holds it."
        raise UserError(f"{root} is no data set of YOLO: there is neither data.yaml nor classes.txt.{hint}")
    names = [line.strip() for line in read_text(listed).splitlines() if line.strip()]
    return _Description(listed, {}, dict(enumerate(names)), 0)


def _read_yaml(path: Path) -> _Description:
    try:
        content = yaml.load(read_text(path), yaml.BaseLoader)  # of which `no` and `1` are texts, as class names are
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"{path}{line}: this is no valid YAML: {reason}. Correct it.") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(
            f"{path}: 'names' is {brief(names)}, wanted the names of the classes, as a list or by number, such as "
            "names: [cat, dog]. Add it."
        )
    if not all(str(key).isdecimal() for key in names):
        raise UserError(
            f"{path}: 'names' has the keys {brief(list(names))}, wanted the numbers that labels have: 0, 1, ..."
        )
    shape = content.get("kpt_shape")
    keypoints = math.prod(int(side) for side in shape if side.isdecimal()) if isinstance(shape, list) else 0
    return _Description(path, content, {int(key): names[key] for key in sorted(names, key=int)}, keypoints)


def _bases(found: _Description) -> list[Path]:
    """The folders that paths are relative to, as absolute paths."""
    home = Path(os.path.abspath(found.source.parent))  # noqa: PTH100 - resolve() would follow links
    home = home.parent if home.name == "labels" else home
    path = found.content.get("path")
    place = _place(path, [home], found.source) if path else None
    return [home] if place is None else [place, home]


def _places(found: _Description, part: Part, bases: Sequence[Path]) -> list[Path]:
    """Folders of the images of a part, or files that list them."""
    entries = next((found.content[name] for name in PARTS[part] if found.content.get(name)), None)
    if entries is None:
        home = bases[-1]
        folder = part_of(home / "images", part) or part_of(home, part)
        if folder is None and part == "train":
            folder = home / "images" if (home / "images").is_dir() else home
        if folder is None:
            listed = "" if found.source.suffix == ".txt" else f"'{part}:' in it, and no "
            raise no_part(found.source, part, f"{listed}folder of that name")
        return [folder]
    places = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _place(entry, bases, found.source) if isinstance(entry, str) else None
        if place is None:
            raise UserError(
                f"{found.source}: '{part}' names {brief(entry)}, which is not in {' or '.join(map(str, bases))}. Write "
                "where the images are, relative to this file."
            )
        places.append(place)
    return places


def _images(place: Path, bases: Sequence[Path]) -> Iterable[Path]:
    return _below(place) if place.is_dir() else _listed_in(place, bases)


def _below(folder: Path) -> list[Path]:
    """The images in a folder and those in it; links to folders are not followed."""
    folder = folder / "images" if (folder / "images").is_dir() and not images_in(folder) else folder
    return sorted(
        Path(parent, name) for parent, _, names in os.walk(folder) for name in names if is_image(Path(parent, name))
    )


def _listed_in(path: Path, bases: Sequence[Path]) -> Iterator[Path]:
    """The images that a text file lists, one a line."""
    if path.suffix != ".txt":
        raise UserError(f"{path} is no folder of images and no .txt file that lists them. Correct data.yaml.")
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not (name := line.strip()):
            continue
        image = _place(name, [path.parent, *bases], path)
        if image is None:
            raise UserError(
                f"{path}, line {number}: the image {brief(name)} does not exist. Write its path relative to this file."
            )
        yield image


def _place(name: str, bases: Sequence[Path], source: Path) -> Path | None:
    """Where the file or folder of a name is; None where it is nowhere."""
    plain = name.strip().replace("\\", "/")
    # Exports for download write ../train/images, of a folder that is beside the file.
    for base in bases:
        for inner in (plain, plain.removeprefix("../")):
            if (base / inner).exists():
                return Path(os.path.normpath(base / inner))
    windows = PureWindowsPath(name)
    if windows.root or windows.drive:
        parts = windows.parts[1:]
        ends = (base / Path(*parts[start:]) for start in range(len(parts)) for base in bases)
        if place := next((end for end in ends if end.exists()), None):
            logger.warning("%s: %s does not exist on this machine; %s is used.", source, ascii(name), place)
            return place
    return None


def _label_files(images: Sequence[Path], source: Path) -> dict[Path, Path]:
    """The label file of each image that has one."""
    folders = {folder: _label_folder(folder) for folder in {path.parent for path in images}}
    files = {
        folder: {stem(path): path for path in folder.iterdir() if path.suffix == ".txt" and path.name not in _NO_LABELS}
        for folder in set(folders.values())
    }
    found = {path: file for path in images if (file := files[folders[path.parent]].get(stem(path))) is not None}
    if not found:
        looked = ", ".join(map(str, sorted(set(folders.values()))[:3]))
        hint = advice(Path(os.path.commonpath([path.parent for path in images])).parent, "yolo", folders_only=True)
        raise UserError(
            f"{source}: not one of {len(images)} images has a label file. They were looked for in {looked}: a file "
            f"images/a.jpg wants labels/a.txt.{hint or ' Put the labels there.'}"
        )
    labeled = set(found.values())
    left = sorted(file for names in files.values() for file in names.values() if file not in labeled)
    warn(source, left, "{} label files have no image, such as {}. They are left out; see whether images are missing.")
    return found


def _label_folder(images: Path) -> Path:
    parts = images.parts
    if "images" in parts:
        place = len(parts) - 1 - parts[::-1].index("images")
        labels = Path(*parts[:place], "labels", *parts[place + 1 :])
        return labels if labels.is_dir() else images
    return images


def _lines(path: Path | None, rank_of: Mapping[int, int], keypoints: int) -> list[_Line]:
    """Those of a label file; none of an image without one."""
    found = []
    for number, line in enumerate(read_text(path).splitlines() if path is not None else (), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        values = _numbers(line, keypoints, place)
        if values[0] not in rank_of:
            raise UserError(
                f"{place}: the class {values[0]:g} is not among the {len(rank_of)} of 'names', which have the numbers "
                f"{brief(list(rank_of))}. Add its name, or correct the line."
            )
        found.append(_Line(rank_of[int(values[0])], values[1:], place))
    return found


def _numbers(line: str, keypoints: int, place: str) -> list[float]:
    """The class, and either a box of four numbers or three and more points."""
    try:
        values = [float(text) for text in line.split()]
    except ValueError:
        values = []
    if keypoints and len(values) == 5 + keypoints:
        values = values[:5]
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise UserError(
            f"{place}: got {brief(line.strip())}, wanted five numbers, class center_x center_y width height, or the "
            "class and three or more points. Correct the line."
        )
    if wrong := [value for value in values[1:] if not -_ROUNDING <= value <= 1 + _ROUNDING]:
        raise UserError(
            f"{place}: {wrong[0]:g} is outside of [0, 1]. Wanted places and sizes relative to the image: divide pixels "
            "by its width and height."
        )
    return values


def _corners(values: Sequence[float]) -> list[float]:
    if len(values) == 4:
        x, y, width, height = values
        return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
