"""Pascal VOC's format: one XML file an image (Everingham et al., IJCV 2010; http://host.robots.ox.ac.uk/pascal/VOC)."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element

from datasets.formats.base import Annotations, ImageRecord, numbered
from datasets.formats.reading import (
    Part,
    check_corners,
    completed,
    images_in,
    line_of,
    no_part,
    number,
    part_of,
    read_text,
    read_xml,
    size_of,
    stem,
    warn,
)
from datasets.formats.recognition import advice
from detr.errors import UserError, brief

logger = logging.getLogger(__name__)
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_IMAGES = ("jpegimages", "images")
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "": False}


class _Object(NamedTuple):
    name: str
    corners: list[float]
    difficult: bool


class _Image(NamedTuple):
    file_name: str
    size: tuple[int, int]
    objects: list[_Object]


def read_voc(*, root: str | Path, part: Part = "train", first_pixel: Literal[0, 1] = 0) -> Annotations:
    """One part of a data set in Pascal VOC's format. Categories are sorted by name, with ids from 1.

    root: either of
        Annotations/, with JPEGImages/ or images/, and ImageSets/Main/{train,val,test}.txt, which list names;
        a folder for each part, with XML files beside the images, or as above;
        XML files beside the images. Without parts, all images are those of training.
    first_pixel: 1 for the files of the VOC challenges, which count pixels from 1 and have the last one inside; tools of
        today write the edges of boxes, from 0.

    An image belongs to the XML file of its name, or to the one that names it. Images without one are left out, with a
    warning. A difficult object is like a crowd: training leaves it out, and evaluation ignores detections in it.
    Raises UserError where files are missing or no such ones.
    """
    folder = Path(root).expanduser()
    files, source = _files(folder, part)
    parent = files[0].parent
    images = _image_folder(parent)
    there: dict[str, list[str]] = defaultdict(list)
    for path in images_in(images):
        there[stem(path)].append(path.name)
    found = [_read(path, there, first_pixel) for path in files]
    names = sorted({one.name for image in found for one in image.objects})
    if not names:
        raise UserError(
            f"{source}: no object is annotated in its {len(files)} XML files. See whether it is the right one."
        )
    rank_of = {name: rank for rank, name in enumerate(names)}
    records = [
        ImageRecord.of(
            image.file_name,
            [one.corners for one in image.objects],
            [rank_of[one.name] for one in image.objects],
            size=image.size,
            crowds=[one.difficult for one in image.objects],
        )
        for image in found
    ]
    _report(source, records, {stem(path) for path in parent.glob("*.xml")}, there)
    records = completed(records, images, source)
    return Annotations(source=source, images=images, categories=numbered(names, source), records=records, named=True)


def _report(source: Path, records: Sequence[ImageRecord], annotated: set[str], there: Mapping[str, list[str]]) -> None:
    used = {record.file_name for record in records}
    left = [name for key, names in there.items() if key not in annotated for name in names if name not in used]
    warn(
        source,
        left,
        "{} images have no XML file, such as {}, and are left out. Add XML files without objects where there are none.",
    )
    if difficult := sum(int(record.crowds.sum()) for record in records):
        text = "%s: %d objects are difficult: training leaves them out, and evaluation ignores detections in them."
        logger.info(text, source, difficult)


def _files(root: Path, part: Part) -> tuple[list[Path], Path]:
    """The XML files of a part, and what lists them."""
    folder = part_of(root, part)
    inner = _inner(folder or root, ("annotations",))
    listed = root / "ImageSets" / "Main" / f"{part}.txt"
    if folder is None and inner is not None and listed.parent.is_dir():
        if not listed.is_file():
            raise no_part(root, part, f"file {listed}")
        source, files = listed, list(_listed(listed, inner))
    else:
        if folder is None and part != "train" and any(root.rglob("*.xml")):
            raise no_part(root, part, f"folder of that name, and no {listed.relative_to(root)}")
        source = inner or folder or root
        files = sorted(source.glob("*.xml"))
    if not files:
        hint = advice(root, "voc") or " Set data.root to the folder with Annotations/, or with XML files beside images."
        problem = "lists no image" if source.is_file() else "holds no XML file" if source.is_dir() else "does not exist"
        raise UserError(f"{root} is no data set of Pascal VOC: {source} {problem}.{hint}")
    return files, source


def _listed(source: Path, folder: Path) -> Iterable[Path]:
    for line, name in enumerate(read_text(source).splitlines(), start=1):
        if not name.strip():
            continue
        path = folder / f"{name.strip()}.xml"
        if not path.is_file():
            raise UserError(
                f"{source}, line {line}: {path} does not exist. Wanted one name of an XML file in a line, without its "
                "ending. Add the file, or remove the line."
            )
        yield path


def _inner(folder: Path, names: Sequence[str]) -> Path | None:
    """A folder in a folder, by one of its names in any capitals."""
    inner = {path.name.casefold(): path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
    return next((inner[name] for name in names if name in inner), None)


def _image_folder(annotations: Path) -> Path:
    """Of the XML files in a folder: beside it where it is one for annotations alone."""
    beside = _inner(annotations.parent, _IMAGES) if annotations.name.casefold() == "annotations" else None
    return beside or annotations


def _read(path: Path, images: Mapping[str, list[str]], first_pixel: int) -> _Image:
    root = read_xml(path)
    if root.tag != "annotation":
        hint = advice(path, "voc") or " Remove it, or export it again."
        raise UserError(f"{path}: the root is <{root.tag}>, wanted <annotation>, as Pascal VOC has it.{hint}")
    written = (root.findtext("filename") or "").strip()
    same = images.get(stem(path), [])
    return _Image(
        file_name=same[0] if len(same) == 1 else written or path.with_suffix(".jpg").name,
        size=size_of(root.findtext("size/height"), root.findtext("size/width")),
        objects=[_object(element, path, first_pixel) for element in root.iter("object")],
    )


def _object(element: Element, path: Path, first_pixel: int) -> _Object:
    place = f"{path}, line {line_of(element)}"
    name = (element.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{place}: this object has no <name>, wanted the name of its class. Add it.")
    texts = [element.findtext(f"bndbox/{edge}") for edge in _EDGES]
    edges = [edge for edge in map(number, texts) if edge is not None]
    if len(edges) < len(_EDGES):
        raise UserError(
            f"{place}: this object has the <bndbox> {brief(texts)}, wanted the four numbers {', '.join(_EDGES)}. "
            "Correct it."
        )
    check_corners(edges, place)
    flag = (element.findtext("difficult") or "").strip().lower()
    if flag not in _FLAGS:
        raise UserError(f"{place}: <difficult> is {brief(flag)}, wanted 0 or 1. Correct it, or leave it out.")
    edges[0] -= first_pixel
    edges[1] -= first_pixel
    return _Object(name, edges, _FLAGS[flag])
