"""Export a checkpoint to a file that other runtimes run, with the proof that it gives the same detections:

python export.py checkpoint=PATH format=onnx output=DIR
"""

from detr.cli.help import answer_help

if __name__ == "__main__":
    answer_help("export")

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from omegaconf import DictConfig
from torch import Tensor

from datasets.shapes import generate
from detr import Detections, Detector, UserError, __version__
from detr.cli.command import command
from detr.cli.devices import pick_device
from detr.cli.run_folder import run_directory
from detr.config import as_yaml
from detr.errors import NonFiniteOutputsError
from detr.evaluation import CocoEvaluator
from detr.export import (
    FORMATS,
    Description,
    ExportedModel,
    Format,
    Graph,
    Limits,
    PaddedModel,
    Proof,
    first_difference,
    first_traced_difference,
    prove,
    trace,
)
from detr.export.files import Inputs, Program
from detr.export.running import padded
from detr.images import check_image, find_images, model_size, pad_to_batch, read_image
from detr.models.detr import DETR
from detr.reporting import OutputFolder
from evaluate import evaluator_of, unread

logger = logging.getLogger(__name__)
CONFIG = "export.yaml"


@command("export", unread=unread)
def main(config: DictConfig) -> None:
    with run_directory(config):
        export(config)


def export(config: DictConfig) -> None:
    kind = FORMATS[config.format]
    if config.precision not in kind.precisions:
        raise UserError(f"format={config.format} has no {config.precision}. Set precision={kind.precisions[0]}.")
    kind.check(config.precision)
    if config.precision == "int8" and config.images is None:
        raise UserError("precision=int8 takes its ranges from real images. Set images=DIR, to some like your own.")
    names = [file.name for file in kind.files(Path(f"model{kind.ending}"))]
    output = OutputFolder(Path(config.output).expanduser(), [*names, CONFIG], overwrite=config.overwrite)
    detector = Detector.from_checkpoint(
        config.checkpoint, pick_device(config.device), model=config.model, allow_targets=config.allow_targets
    )
    if not isinstance(detector.model, DETR):
        raise UserError(f"checkpoint={config.checkpoint} is exported already. Give the checkpoint that it is from.")
    detector.resize_to(config.size, config.max_size, config.square)
    description = describe(config, detector)
    graph = Graph(detector.model, description).cpu()
    # What can be wrong with the user's data is found before the work begins.
    evaluator = evaluator_of(config, detector, one_by_one=description.one_by_one)[0] if config.evaluate else None
    with TemporaryDirectory() as folder:
        images = pictures(config, Path(folder))
        logger.info("Tracing the model.")
        program = trace(graph, inputs_of([example(detector, description)] * 2, description))
        path = Path(folder) / names[0]
        logger.info("Writing %s in %s.", names[0], config.precision)
        written = kind.write(program, description, path, lambda: calibration(config, detector, description))
        kind.describe(path, description, program)
        logger.info("Comparing it with the model.")
        proof = proof_of(config, detector, path, images, evaluator)
        limits = Limits.of(config.precision)
        if (excess := proof.excess(limits, config.ap_loss)) is not None:
            inputs = inputs_of([detector.resized(read_image(images[0]))] * 2, description)
            raise UserError(
                f"The exported file does not detect what the model does, and is not kept: {excess}. "
                + blamed(kind, path, graph, program, written, inputs, limits.value)
                + remedy(config)
            )
        kind.describe(path, replace(description, proof=proof.content()), program)
        if compared(detector, Detector.from_checkpoint(path), images[:2], [(1.0, 2)]).excess(limits, 1.0):
            raise UserError(
                "The exported file changed when its proof was added to it, and is not kept. Export it again."
            )
        output.write(CONFIG, as_yaml(config).encode())
        for name in names:
            with (Path(folder) / name).open("rb") as source, output.create(name) as target:
                shutil.copyfileobj(source, target)
    size = sum((output.folder / name).stat().st_size for name in names) / 2**20
    logger.info("Proof: %s.", proof)
    if proof.sure == 0:
        logger.warning("No score reaches 0.05 in these images, so the proof says little. Set images=DIR, to your own.")
    logger.info("The file is %s, %.1f MiB.", output.folder / names[0], size)


def describe(config: DictConfig, detector: Detector) -> Description:
    assert isinstance(detector.model, DETR)
    backbone = detector.model.backbone
    side = (detector.size if detector.square else detector.max_size) if config.fixed_size else None
    return Description(
        categories=detector.categories,
        size=detector.size,
        max_size=detector.max_size,
        square=detector.square,
        normalize=config.normalize,
        mean=backbone.mean.tolist(),
        std=backbone.std.tolist(),
        postprocess=config.postprocess,
        masks=detector.has_masks,
        # Without it, images of different shapes come one at a time.
        padding=not detector.square and (side is not None or config.batch_size != 1),
        batch_size=config.batch_size,
        side=side,
        precision=config.precision,
        version=__version__,
        thresholds=None if detector.thresholds is None else detector.thresholds.content(),
        config=detector.config,
    )


def example(detector: Detector, description: Description) -> Tensor:
    """An image to trace the model with, whose height and width differ where they may."""
    size = model_size(3, 4, detector.size, detector.max_size, square=description.side is not None and detector.square)
    return torch.zeros(3, *size, dtype=torch.uint8)


def inputs_of(images: Sequence[Tensor], description: Description) -> Inputs:
    """What the file takes of resized images: a batch of its size, of a part of these or with the last one again."""
    count = description.batch_size or len(images)
    batch = pad_to_batch([images[min(index, len(images) - 1)] for index in range(count)])
    sizes = torch.tensor(batch.sizes())
    if description.side is not None:
        batch = padded(batch, description.side)
    if not description.normalize:
        batch = batch.normalized(description.mean, description.std)
    return {"images": batch.images, "sizes": sizes} if description.padding else {"images": batch.images}


def pictures(config: DictConfig, folder: Path) -> list[Path]:
    """Images to compare detections in: of the user, or generated."""
    if config.images is None:
        root = folder / "shapes"
        generate(root, train_images=1, val_images=config.num_images, image_size=320, min_objects=1, max_objects=8)
        return sorted((root / "val").iterdir())
    root, names = find_images(config.images, option="images")
    chosen = [root / name for name in spread(names, config.num_images)]
    for image in chosen:
        check_image(image)
    return chosen


def calibration(config: DictConfig, detector: Detector, description: Description) -> Iterator[Inputs]:
    root, names = find_images(config.images, option="images")
    for name in spread(names, config.num_calibration_images):
        yield inputs_of([detector.resized(read_image(root / name))], description)


def spread(names: Sequence[Path], count: int) -> list[Path]:
    """At most `count`, from all over."""
    step = max(len(names) / count, 1)
    return [names[int(index * step)] for index in range(min(count, len(names)))]


def proof_of(
    config: DictConfig, detector: Detector, path: Path, images: Sequence[Path], evaluator: CocoEvaluator | None
) -> Proof:
    """Of pairs of images at the size that was asked for, and of single ones at a smaller size, where any will do."""
    exported = Detector.from_checkpoint(path)
    exported.resize_to(detector.size, detector.max_size, detector.square)
    proof = compared(detector, exported, images, [(1.0, 2)] if config.fixed_size else [(1.0, 2), (0.75, 1)])
    if evaluator is None or math.isnan(proof.score):
        return proof
    evaluations = [evaluator(model) for model in (detector.model, exported.model)]
    model_ap, ap = (evaluation.metrics.summary["AP"] for evaluation in evaluations if evaluation is not None)
    return replace(proof, model_ap=model_ap, ap=ap)


def compared(
    detector: Detector, exported: Detector, images: Sequence[Path], runs: Sequence[tuple[float, int]]
) -> Proof:
    """runs: parts of the image size to work at, each with a batch size."""
    size, max_size = detector.size, detector.max_size
    assert isinstance(exported.model, ExportedModel)
    side = exported.model.description.side
    if side is not None and not detector.square:  # padding alone changes detections a little
        detector = copy(detector)
        detector.model = PaddedModel(detector.model, side)
    images = images if len(images) > 1 else [*images] * 2  # for one with padding
    found: list[list[Detections]] = []
    for one in (detector, exported):
        found.append([])
        for share, batch_size in runs:
            one.resize_to(round(size * share), round(max_size * share))
            for start in range(0, len(images), batch_size):
                batch = [cut(images[number], number) for number in range(start, min(start + batch_size, len(images)))]
                try:
                    found[-1] += one.predict(batch, 0.0, 1 if exported.one_by_one else batch_size)
                except NonFiniteOutputsError:
                    if one is detector:
                        raise
                    return Proof.failed()
        one.resize_to(size, max_size)
    return prove(*found)


def cut(image: Path, number: int) -> Tensor:
    """The pixels of an image; of every second one a part, in turn wide and high, so that pairs have padding."""
    pixels = read_image(image)
    height, width = pixels.shape[1:]
    if number % 2 == 0:
        return pixels
    return pixels[:, : -(-height * 3 // 4)] if number % 4 == 1 else pixels[:, :, : -(-width * 3 // 4)]


def blamed(
    kind: Format, path: Path, graph: Graph, program: Program, written: Program, inputs: Inputs, tolerance: float
) -> str:
    """The layer where the difference begins, as a sentence."""
    traced = first_traced_difference(graph, program, inputs, tolerance)
    if traced is not None:
        return f"The first layer that differs, since it was traced, is {traced}. "
    layer = first_difference(kind, path, written, inputs, tolerance)
    if layer is not None:
        return f"The first layer that differs is {layer}. "
    return "No layer alone differs by much: small differences add up. "


def remedy(config: DictConfig) -> str:
    if config.precision == "int8":
        return "Set precision=fp16 or fp32, or give more images like your own."
    if config.precision == "fp16":
        return "Set precision=fp32."
    return "Try another format, or other versions of torch and of the format's packages."


if __name__ == "__main__":
    main()
