"""What can be measured: checkpoints, models with random weights, and exported files."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from detr import Detector
from detr.config import build_model, compose, plain
from detr.errors import UserError
from detr.export import FORMATS, Description, ExportedModel, Graph, trace
from detr.export.files import Program
from detr.export.running import imported
from detr.images import model_size
from detr.models.detr import DETR
from detr.weights import save
from export import calibration, describe, example, inputs_of
from tools.benchmarking.processes import Job
from tools.counts import count_flops, count_parameters

EXPORTED = {"onnxruntime": "onnx", "openvino": "openvino"}  # runtimes, and their formats of export.py
RUNTIMES = ("eager", "compiled", *EXPORTED)
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
_AUTOCAST = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}  # elsewhere fp32
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino", "onnx", "onnxscript")}
_RUNTIME_OF = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch.export"}
_CLASSES = 80  # of models with random weights, as COCO
_PHOTOGRAPH = 480, 640
_CALIBRATED = 8  # images for int8; the ranges of its values do not change how long it takes


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured of each model, and how. images: for int8."""

    runtimes: Sequence[str]
    precisions: Sequence[str]
    images: str | None
    device: str
    threads: int
    allow_targets: Sequence[str]


def missing(options: Options) -> dict[tuple[str, str], str]:
    """The runtimes and precisions that are asked for and do not exist, with the reason."""
    asked = itertools.product(options.runtimes, options.precisions)
    return {pair: why for pair in asked if (why := _missing(*pair, options.device)) is not None}


def _missing(runtime: str, precision: str, device: str) -> str | None:
    if runtime not in EXPORTED:
        found = _AUTOCAST.get(torch.device(device).type, ("fp32",))
        return None if precision in found else f"on {device} it is measured in {' and '.join(found)}"
    if device != "cpu":
        return "exported files run on the CPU alone"
    found = FORMATS[EXPORTED[runtime]].precisions
    return None if precision in found else f"export.py writes it in {', '.join(found)}"


def check(options: Options) -> None:
    """Raises UserError where something is missing that the options need."""
    for runtime in options.runtimes:
        quantizer = ("nncf",) if runtime == "openvino" and "int8" in options.precisions else ()
        for package in (*_PACKAGES.get(runtime, ()), *quantizer):
            try:
                imported(package)
            except UserError as error:
                raise UserError(f"{error} Or leave {runtime} out of --runtimes.") from None
    if "int8" in options.precisions and EXPORTED.keys() & {*options.runtimes} and options.images is None:
        raise UserError("--precisions int8 takes its ranges from real images. Give --images DIR, or leave int8 out.")


def random_checkpoint(name: str, folder: Path, *options: str) -> Path:
    """A checkpoint of configs/model/NAME.yaml with random weights. options: further ones of its configuration."""
    config = compose([f"model={name}", "model.backbone.weights=null", *options])
    torch.manual_seed(0)
    content = {
        "config": plain(config),
        "categories": [{"id": number, "name": str(number)} for number in range(_CLASSES)],
        "model": build_model(config.model, num_classes=_CLASSES).state_dict(),
        "training": {},
    }
    path = folder / f"{name}.pt"
    save(path, content)
    return path


class Source:
    """A checkpoint, or a file of export.py, which is measured as it is.

    name: of the model, for people. path: as `Detector.from_checkpoint` takes it. folder: where the files that are made
    of a checkpoint go, of this source alone.
    """

    def __init__(self, name: str, path: str, folder: Path, options: Options) -> None:
        self.name, self.path, self._folder, self._options = name, path, folder, options
        self._detector = Detector.from_checkpoint(path, allow_targets=options.allow_targets)
        side = self.description.side if self.exported else None
        self._size = (side, side) if side else self._of_photograph()
        # All images that are measured have one size.
        self._detector.resize_to(square=True)

    @property
    def exported(self) -> bool:
        return isinstance(self._detector.model, ExportedModel)

    @property
    def variants(self) -> list[tuple[str, str]]:
        """Runtimes and precisions: those that are asked for of a checkpoint, and its own of a file."""
        if self.exported:
            return [(_RUNTIME_OF[Path(self.path).suffix], self.description.precision)]
        asked = itertools.product(self._options.runtimes, self._options.precisions)
        return [pair for pair in asked if pair not in missing(self._options)]

    @property
    def description(self) -> Description:
        """Of an exported file; of a checkpoint as export.py has it for images of one size."""
        model = self._detector.model
        return model.description if isinstance(model, ExportedModel) else describe(self._config(), self._detector)

    def parameters(self) -> int | None:
        """Of the model as it is deployed; None of exported files."""
        return None if self.exported else count_parameters(self._graph)

    def flops(self, size: tuple[int, int]) -> int | None:
        """Of the model as it is deployed, for one image; None of exported files."""
        if self.exported:
            return None
        inputs = inputs_of([torch.zeros(3, *size, dtype=torch.uint8)], self._graph.description)
        return count_flops(partial(self._graph, *inputs.values()))

    def job(self, runtime: str, precision: str, size: tuple[int, int] | None, batch: int) -> Job:
        """size: height and width; None: those of a photograph of 480x640 as the detector resizes it.

        Raises UserError where it cannot be had.
        """
        height, width = size or self._size
        path, description = self.path, self.description
        if self.exported:
            _check_fit(description, height, width, batch)
        elif runtime in EXPORTED:
            path = str(self._written(EXPORTED[runtime], precision))
        return Job(
            model=self.name,
            path=path,
            runtime=runtime,
            precision=precision,
            height=height,
            width=width,
            batch=batch,
            description=description,
            device="cpu" if self.exported else self._options.device,
            threads=self._options.threads,
            allow_targets=self._options.allow_targets,
        )

    def _of_photograph(self) -> tuple[int, int]:
        detector = self._detector
        return model_size(*_PHOTOGRAPH, detector.size, detector.max_size, square=detector.square)

    def _config(self, precision: str = "fp32") -> DictConfig:
        config = compose(["checkpoint=", f"precision={precision}"], name="export")
        config.images, config.num_calibration_images = self._options.images, _CALIBRATED
        return config

    @cached_property
    def _graph(self) -> Graph:
        assert isinstance(self._detector.model, DETR)
        # Without gradients everywhere: the counter of operations does not cope with parameters under no_grad.
        return Graph(self._detector.model, self.description).eval().requires_grad_(False)

    @cached_property
    def _program(self) -> Program:
        examples = [example(self._detector, self._graph.description)] * 2
        return trace(self._graph, inputs_of(examples, self._graph.description))

    def _written(self, form: str, precision: str) -> Path:
        """The model as a file of export.py, for any batch and size, written once."""
        kind, config = FORMATS[form], self._config(precision)
        path = self._folder / f"{precision}{kind.ending}"
        if not path.exists():
            self._folder.mkdir(exist_ok=True)
            description = describe(config, self._detector)
            kind.write(self._program, description, path, lambda: calibration(config, self._detector, description))
            kind.describe(path, description, self._program)
        return path


def file_size(path: str) -> int | None:
    """Bytes of an exported file, with the one beside it; None of checkpoints."""
    file = Path(path)
    kind = next((kind for kind in FORMATS.values() if kind.ending == file.suffix), None)
    if kind is None:
        return None
    return sum(each.stat().st_size for each in kind.files(file))


def _check_fit(description: Description, height: int, width: int, batch: int) -> None:
    """Raises UserError where an exported file does not take such a batch as it is."""
    if description.batch_size not in (None, batch):
        raise UserError(f"the file takes batches of {description.batch_size} alone")
    side = description.side
    fits = (height, width) == (side, side) or (description.padding and max(height, width) <= (side or 0))
    if side is not None and not fits:
        raise UserError(f"the file takes images of {side}x{side} alone")
