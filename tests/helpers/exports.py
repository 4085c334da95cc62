"""Data sets as labelling tools export them: written from COCO's form, by code that shares nothing with the readers."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from PIL import Image

Coco = Mapping[str, Any]
PARTS = ("train", "val")


def objects_of(coco: Coco, image: Mapping[str, Any]) -> list[tuple[str, list[float], bool]]:
    """Class, x, y, width, height, and whether it is a crowd, of each object in an image."""
    names = {category["id"]: category["name"] for category in coco["categories"]}
    own = [entry for entry in coco["annotations"] if entry["image_id"] == image["id"]]
    return [(names[entry["category_id"]], entry["bbox"], bool(entry.get("iscrowd"))) for entry in own]


def corners(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y + height]


def write_roboflow(coco: Coco, images: Path, root: Path, part: str) -> None:
    """With its heading category, of id 0."""
    folder = root / {"val": "valid"}.get(part, part)
    shutil.copytree(images, folder)
    heading = {"id": 0, "name": "things", "supercategory": "none"}
    categories = [{**category, "supercategory": "things"} for category in coco["categories"]]
    (folder / "_annotations.coco.json").write_text(json.dumps({**coco, "categories": [heading, *categories]}))


def write_yolo(coco: Coco, images: Path, root: Path, part: str) -> None:
    """Sixteen digits; no file for images without objects."""
    names = [category["name"] for category in coco["categories"]]
    shutil.copytree(images, root / "images" / part)
    (root / "labels" / part).mkdir(parents=True)
    for image in coco["images"]:
        lines = []
        for name, (x, y, width, height), _ in objects_of(coco, image):
            across, down = image["width"], image["height"]
            values = ((x + width / 2) / across, (y + height / 2) / down, width / across, height / down)
            lines.append(" ".join([str(names.index(name)), *(f"{value:.16f}" for value in values)]))
        if lines:
            file = Path(root / "labels" / part / image["file_name"]).with_suffix(".txt")
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    listed = "\n".join(f"  {number}: {json.dumps(name)}" for number, name in enumerate(names))
    text = f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{listed}\n"
    (root / "data.yaml").write_text(text, encoding="utf-8")


def voc_xml(coco: Coco, image: Mapping[str, Any]) -> str:
    objects = "".join(
        f"""
  <object>
    <name>{escape(name)}</name>
    <difficult>{int(crowd)}</difficult>
    <bndbox>{"".join(f"<{edge}>{value!r}</{edge}>" for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), corners(box), strict=True))}</bndbox>
  </object>"""
        for name, box, crowd in objects_of(coco, image)
    )
    size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
    return f"<annotation>\n  <filename>{escape(image['file_name'])}</filename>\n  {size}{objects}\n</annotation>\n"


def write_voc(coco: Coco, images: Path, root: Path, part: str) -> None:
    lists = root / "ImageSets" / "Main"
    for folder in (root / "Annotations", root / "JPEGImages", lists):
        folder.mkdir(parents=True, exist_ok=True)
    stems = []
    for image in coco["images"]:
        file = Path(f"{part} {image['file_name']}")
        shutil.copy(images / image["file_name"], root / "JPEGImages" / file)
        xml = voc_xml(coco, {**image, "file_name": file.name})
        (root / "Annotations" / file.with_suffix(".xml")).write_text(xml, encoding="utf-8")
        stems.append(file.stem)
    (lists / f"{part}.txt").write_text("\n".join(stems) + "\n", encoding="utf-8")


def write_cvat(coco: Coco, images: Path, root: Path, part: str) -> None:
    shutil.copytree(images, root / part)
    labels = "".join(f"<label><name>{escape(category['name'])}</name></label>" for category in coco["categories"])
    rows = []
    for number, image in enumerate(coco["images"]):
        boxes = "".join(
            f"\n    <box label={quoteattr(name)} occluded='0' xtl='{x1!r}' ytl='{y1!r}' xbr='{x2!r}' ybr='{y2!r}' z_order='0'/>"
            for name, box, _ in objects_of(coco, image)
            for x1, y1, x2, y2 in [corners(box)]
        )
        sides = f"width='{image['width']}' height='{image['height']}'"
        rows.append(f"\n  <image id='{number}' name={quoteattr(image['file_name'])} {sides}>{boxes}</image>")
    text = f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>{''.join(rows)}\n</annotations>"
    (root / f"{part}.xml").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{text}', encoding="utf-8")


def write_csv(coco: Coco, images: Path, root: Path, part: str) -> None:
    shutil.copytree(images, root / part)
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for image in coco["images"]:
        file = f'"{image["file_name"]}",{image["width"]},{image["height"]}'
        found = objects_of(coco, image)
        lines += [f'{file},"{name}",{",".join(map(repr, corners(box)))}' for name, box, _ in found]
        lines += [] if found else [f"{file},,,,,"]
    (root / f"{part}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Coco, Path, Path, str], None]] = {
    "roboflow": write_roboflow,
    "yolo": write_yolo,
    "voc": write_voc,
    "cvat": write_cvat,
    "csv": write_csv,
}


def options(name: str, root: Path, parts: tuple[str, ...] = PARTS) -> list[str]:
    """The options of a data set that a writer made."""
    if name in ("cvat", "csv"):
        paths = [
            (part, {"images": root / part, "annotations": root / f"{part}.{name.replace('cvat', 'xml')}"})
            for part in parts
        ]
        return [f"data={name}", *(f"data.{part}.{key}={path}" for part, files in paths for key, path in files.items())]
    return [f"data={name}", f"data.root={root}"]


def write(name: str, coco_root: Path, root: Path, images: str = "images/{}") -> None:
    """Both parts of a data set whose COCO files are instances_{train,val}.json."""
    root.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        coco = json.loads((coco_root / f"instances_{part}.json").read_text())
        WRITERS[name](coco, coco_root / images.format(part), root, part)


def put(root: Path, files: Mapping[str, str | bytes | tuple[int, int]]) -> None:
    """Write files by name: text, bytes, or an image of a size (width, height)."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", content, "white").save(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
