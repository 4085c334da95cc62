"""Every model as an exported file: the largest differences at three sizes and two batches, time, and size of the file.

Weights are random, and images generated.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import export
from benchmarks.measure import in_new_process
from benchmarks.results import Row
from datasets.shapes import generate
from detr import Detector, UserError
from detr.config import build_model, compose
from detr.export import FORMATS, Graph, trace
from detr.types import Category

MODELS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))
VARIANTS = {
    **{name: [f"model={name}"] for name in MODELS},
    **{
        f"small, attention={path.stem}": ["model=small", f"model/attention={path.stem}"]
        for path in sorted((Path(__file__).parents[1] / "configs" / "model" / "attention").glob("*.yaml"))
        if path.stem not in ("none", "custom")
    },
    **{f"small, masks={name}": ["model=small", f"model/masks={name}"] for name in ("detr", "dot_product")},
    "detr, masks=detr": ["model=detr", "model/masks=detr"],
}
RUNS = [(1.0, 1), (0.75, 2), (1.25, 2)]
SIZE, CLASSES, IMAGES = 256, 80, 2


def run(*, kind: str = "onnx") -> Iterator[Row]:
    for name, options in VARIANTS.items():
        try:
            score, box, seconds, size = in_new_process(_measure, options, kind)
        except UserError as error:
            print(f"{name}: {error}")
            continue
        yield Row(name, "largest difference of scores", "", score, 1e-4)
        yield Row(name, "largest difference of boxes", "pixels", box, 0.1)
        yield Row(name, "time to export", "s", seconds)
        yield Row(name, "size of the file", "MiB", size)


def _measure(options: list[str], kind: str) -> tuple[float, float, float, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = compose([*options, "model.backbone.weights=null"])
    model = build_model(config.model, num_classes=CLASSES)
    square = bool(config.data.square)
    categories = [Category(number, str(number)) for number in range(CLASSES)]
    detector = Detector(model=model, categories=categories, size=SIZE, max_size=SIZE * 5 // 3, square=square)
    about = export.describe(compose(["checkpoint=x"], "export"), detector)
    images = [export.example(detector, about)] * 2
    format_ = FORMATS[kind]
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{format_.ending}"
        began = time.perf_counter()
        program = trace(Graph(model, about), export.inputs_of(images, about))
        format_.write(program, about, path, lambda: iter(()))
        format_.describe(path, about, program)
        seconds = time.perf_counter() - began
        size = sum(file.stat().st_size for file in format_.files(path)) / 2**20
        root = Path(folder) / "shapes"
        generate(root, train_images=1, val_images=IMAGES, image_size=320, min_objects=1, max_objects=8)
        proof = export.compared(detector, Detector.from_checkpoint(path), sorted((root / "val").iterdir()), RUNS)
    return proof.score, proof.box, seconds, size
