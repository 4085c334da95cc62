"""Reading and transforming images in one process with one thread, as one worker of the loader does."""

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.measure import threads
from benchmarks.published import load
from benchmarks.results import Row
from datasets import DetectionDataset
from datasets.formats.coco import read_coco
from datasets.transforms import evaluation
from detr.config import build, compose
from tools.timing import medians

IMAGES, HEIGHT, WIDTH = 40, 480, 640
TARGET = 100.0  # images/s
# The same of the published code on another machine.
ELSEWHERE = {"train": 42.7, "val": 36.6}


def run(
    *, checkout: Path | None, repeats: int, folder: Path | None = None, annotations: Path | None = None
) -> Iterator[Row]:
    """folder, annotations: photographs to use, the first ones of a COCO data set; generated ones by default."""
    with tempfile.TemporaryDirectory() as temporary, threads(1):
        folder, chosen = photographs(Path(temporary), folder, annotations)
        data = compose(["data=custom"]).data
        ours = {
            "train": DetectionDataset(
                read_coco(images=folder, annotations=chosen), transforms=build(data.transforms, path="data.transforms")
            ),
            "val": DetectionDataset(
                read_coco(images=folder, annotations=chosen),
                transforms=evaluation(size=data.size, max_size=data.max_size),
            ),
        }
        published = {} if checkout is None else _published_sets(checkout, folder, chosen)
        for split, name in (("train", "training images"), ("val", "evaluation images")):
            calls = {"ours": reader(ours[split])}
            if published:
                calls["published"] = reader(published[split])
            rate = {side: len(ours[split]) / seconds for side, seconds in medians(calls, repeats).items()}
            yield Row(
                name,
                "reading and transforming",
                "images/s",
                rate["ours"],
                target=TARGET,
                published=rate.get("published"),
                elsewhere=ELSEWHERE[split],
                more_is_better=True,
            )
        yield Row(name, "mean difference to Pillow's", "gray levels", _difference(ours["val"]), target=1.0)


def reader(dataset: Any) -> Callable[[], None]:
    """Reads the data set once, in an epoch of its own, which draws a new augmentation."""
    epoch = 0
    random.seed(0)
    torch.manual_seed(0)

    def read() -> None:
        nonlocal epoch
        for index in range(len(dataset)):
            dataset[(epoch, index) if isinstance(dataset, DetectionDataset) else index]
        epoch += 1

    return read


def _published_sets(checkout: Path, folder: Path, annotations: Path) -> dict[str, Any]:
    (coco,) = load(checkout, "datasets.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        return {
            split: coco.CocoDetection(folder, annotations, coco.make_coco_transforms(split), return_masks=False)
            for split in ("train", "val")
        }


def _difference(dataset: DetectionDataset) -> float:
    differences = []
    for index, record in enumerate(dataset.records):
        image = dataset[index][0].permute(1, 2, 0).numpy()
        size = (image.shape[1], image.shape[0])
        with Image.open(dataset.folder / record.file_name) as file:
            reference = np.asarray(file.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        differences.append(np.abs(image.astype(int) - reference).mean())
    return float(np.mean(differences))


def photographs(temporary: Path, folder: Path | None, annotations: Path | None) -> tuple[Path, Path]:
    """A folder of images and annotations of some of them: the first given ones, or generated ones."""
    if folder is None or annotations is None:
        folder, content = temporary, _generate(temporary)
    else:
        content = _first_images(json.loads(annotations.read_bytes()))
    chosen = temporary / "annotations.json"
    chosen.write_text(json.dumps(content))
    return folder, chosen


def _first_images(content: dict[str, Any]) -> dict[str, Any]:
    images = content["images"][:IMAGES]
    ids = {image["id"] for image in images}
    objects = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return {"images": images, "annotations": objects, "categories": content["categories"]}


def _generate(folder: Path) -> dict[str, Any]:
    """Write JPEGs that compress like photographs, and return annotations with 7 boxes an image, as COCO has."""
    generator = torch.Generator().manual_seed(0)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image in range(1, IMAGES + 1):
        pixels = sum(_noise(generator, cell, strength) for cell, strength in ((160, 150), (40, 70), (8, 40), (2, 25)))
        photo = (127 + pixels).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(photo).save(folder / f"{image}.jpg", quality=90)
        images.append({"id": image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH})
        for x, y, w, h in (torch.rand((7, 4), generator=generator) * 300 + 10).tolist():
            objects.append(_object(len(objects) + 1, image, [x, y, w, min(h, HEIGHT - y)]))
    return {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}


def _noise(generator: torch.Generator, cell: int, strength: float) -> torch.Tensor:
    coarse = torch.rand((1, 3, HEIGHT // cell, WIDTH // cell), generator=generator) - 0.5
    return F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0] * strength


def _object(number: int, image: int, box: Sequence[float]) -> dict[str, Any]:
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": area, "iscrowd": 0}
