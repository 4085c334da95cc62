"""A generated COCO-format data set of colored circles, squares and triangles, for trying things out anywhere."""

import hashlib
import json
import logging
import math
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageDraw

from detr.errors import UserError
from detr.masks import Masks

logger = logging.getLogger(__name__)

CATEGORIES = ("circle", "square", "triangle")
FORMAT = "DETR generated shapes"
_MANIFEST = "manifest.json"
_GENERATED = re.compile(r"(train|val)/\d{6,}\.jpg|instances_(train|val)\.json")
_OVERSAMPLING = 2


def generate(
    root: str | Path,
    *,
    train_images: int = 2000,
    val_images: int = 200,
    image_size: int = 96,
    min_objects: int = 1,
    max_objects: int = 5,
    seed: int = 0,
) -> None:
    """Write the set to `root` as train/, val/, instances_train.json and instances_val.json, unless it is there.

    Each image has min_objects..max_objects shapes of random color, size and rotation on a shaded, noisy background;
    later shapes may cover up to half of an earlier one. Masks are what is seen of the shapes. The same options give the
    same images.

    A manifest lists the files with their checksum. A set that is damaged or has other options is generated again; only
    files that the manifest lists are replaced. Raises UserError where `root` holds any other file.
    """
    options = {
        "train_images": train_images,
        "val_images": val_images,
        "image_size": image_size,
        "min_objects": min_objects,
        "max_objects": max_objects,
        "seed": seed,
        "masks": 1,  # which sets of former versions do not have
    }
    root = Path(root).resolve()
    if _is_complete(root, options):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{root}.lock"):
        if _is_complete(root, options):  # another job has just generated it
            return
        _check_replaceable(root)
        logger.info("Generating %d + %d images of shapes in %s.", train_images, val_images, root)
        with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
            complete = Path(temporary) / root.name
            for number, (split, count) in enumerate((("train", train_images), ("val", val_images))):
                _generate_split(complete, split, count, (seed, number), image_size, min_objects, max_objects)
            files = sorted(_files(complete))
            content = {"format": FORMAT, "options": options, "sha256": _checksum(complete, files), "files": files}
            (complete / _MANIFEST).write_text(json.dumps(content, indent=2))
            _remove(root)
            complete.rename(root)


def _is_complete(root: Path, options: Mapping[str, int]) -> bool:
    manifest = _manifest(root)
    return manifest.get("options") == options and manifest["sha256"] == _checksum(root, manifest["files"])


def _check_replaceable(root: Path) -> None:
    """Refuse a folder that holds anything beside the files of its manifest."""
    manifest = _manifest(root)
    own = {_MANIFEST, *manifest["files"]} if manifest else set()
    foreign = root.name if root.is_file() else next((name for name in _files(root) if name not in own), "")
    if foreign:
        raise UserError(
            f"The folder {root} holds something else than generated shapes: {foreign}. Nothing in it was changed. Name "
            "a new folder in data.root, or move that one away."
        )
    if manifest:
        logger.info("The shapes in %s are damaged or of other options; generating them again.", root)


def _remove(root: Path) -> None:
    """Remove a replaceable set, its manifest last. A folder stays, with an error, where a file has just been added."""
    _check_replaceable(root)
    for name in sorted(_files(root), key=lambda name: name == _MANIFEST):
        (root / name).unlink()
    for folder in sorted(root.rglob("*"), reverse=True):
        folder.rmdir()
    if root.exists():
        root.rmdir()


def _manifest(root: Path) -> dict[str, Any]:
    """The manifest of the generated set in a folder; empty where it has none, or one of another program."""
    try:
        content = json.loads((root / _MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    keys = content.keys() if isinstance(content, dict) else set()
    if keys == {"format", "options", "sha256", "files"} and content["format"] == FORMAT:
        return content
    if keys == {"options", "sha256"}:  # sets of former versions, of which the checksum is the proof
        files = sorted(set(_files(root)) - {_MANIFEST})
        if all(map(_GENERATED.fullmatch, files)) and content["sha256"] == _checksum(root, files):
            return {**content, "files": files}
    return {}


def _files(root: Path) -> Iterator[str]:
    """Names of everything below a folder but folders; links are not followed."""
    for path in root.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(root).as_posix()


def _checksum(root: Path, files: Collection[str]) -> str | None:
    """Of names and contents; None where a file is missing."""
    digest = hashlib.sha256()
    for name in files:
        if not (root / name).is_file():
            return None
        digest.update(name.encode() + (root / name).read_bytes())
    return digest.hexdigest()


def _generate_split(
    root: Path, split: str, count: int, seed: tuple[int, int], image_size: int, min_objects: int, max_objects: int
) -> None:
    (root / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng((*seed, index))
        picture, objects = _picture(rng, image_size, int(rng.integers(min_objects, max_objects + 1)))
        name = f"{index:06d}.jpg"
        picture.save(root / split / name, quality=95)
        images.append({"id": index, "file_name": name, "width": image_size, "height": image_size})
        for category, (x1, y1, x2, y2), mask in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": category + 1,
                    "bbox": [round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                    "segmentation": mask,
                }
            )
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(CATEGORIES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"instances_{split}.json").write_text(json.dumps(content))


Box = tuple[float, float, float, float]


def _picture(
    rng: np.random.Generator, size: int, count: int
) -> tuple[Image.Image, list[tuple[int, Box, dict[str, Any]]]]:
    """A picture, and the category, box and mask of each shape in it."""
    corners = rng.uniform(40, 215, (2, 2, 3)).astype(np.uint8)
    shade = np.asarray(Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR))
    noisy = shade + rng.integers(0, 25, shade.shape, dtype=np.uint8)
    canvas = Image.fromarray(noisy).resize((size * _OVERSAMPLING,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    objects: list[tuple[int, Box]] = []
    outlines = []
    for _ in range(20 * count):  # a crowded picture may have no room for all
        if len(objects) == count:
            break
        category = int(rng.integers(len(CATEGORIES)))
        outline, box = _shape(rng, category, size)
        if any(_covered(old, box) > 0.5 for _, old in objects):
            continue
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        outlines.append([(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in outline])
        draw.polygon(outlines[-1], fill=color)
        objects.append((category, box))
    masks = Masks.encode(torch.from_numpy(_visible(outlines, size))).rows()
    found = [(category, box, mask) for (category, box), mask in zip(objects, masks, strict=True)]
    return canvas.resize((size, size), Image.Resampling.BOX), found


def _visible(outlines: Sequence[Sequence[tuple[float, float]]], size: int) -> np.ndarray:
    """What is seen of each shape: pixels that it covers at least half, where no later one does."""
    masks = np.zeros((len(outlines), size, size), dtype=bool)
    for number, outline in enumerate(outlines):
        canvas = Image.new("L", (size * _OVERSAMPLING,) * 2)
        ImageDraw.Draw(canvas).polygon(outline, fill=255)
        masks[number] = np.asarray(canvas.resize((size, size), Image.Resampling.BOX)) >= 128
        masks[:number] &= ~masks[number]
    return masks


def _shape(rng: np.random.Generator, category: int, size: int) -> tuple[list[tuple[float, float]], Box]:
    radius = rng.uniform(0.07, 0.22) * size
    x, y = rng.uniform(radius, size - radius, 2)
    corners = {"circle": 48, "square": 4, "triangle": 3}[CATEGORIES[category]]
    turn = rng.uniform(0, 2 * math.pi)
    angles = turn + np.arange(corners) * 2 * math.pi / corners
    xs, ys = x + radius * np.cos(angles), y + radius * np.sin(angles)
    box = (float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max()))
    return list(zip(xs.tolist(), ys.tolist(), strict=True)), box


def _covered(box: Box, by: Box) -> float:
    """Share of a box that another one covers."""
    width = min(box[2], by[2]) - max(box[0], by[0])
    height = min(box[3], by[3]) - max(box[1], by[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))
