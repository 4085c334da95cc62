"""Exported files as models: they take an ImageBatch, as those of torch do."""

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.errors import UserError, brief
from detr.export.description import KEY, Description
from detr.postprocess import Ranked
from detr.types import ImageBatch, Predictions


class Runtime(ABC):
    """Runs a file. described: what it says of itself, as JSON."""

    described: str | None

    @abstractmethod
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, in order."""


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path) -> None:
        onnxruntime = imported("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.described = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        self._names = [each.name for each in self._session.get_inputs()]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in self._session.run(None, feeds)]


class OpenVino(Runtime):
    """OpenVINO on the CPU; computes in float32, also where weights are float16."""

    def __init__(self, path: Path) -> None:
        openvino = imported("openvino")
        model = openvino.Core().read_model(path)
        self.described = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
        exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._request = openvino.compile_model(model, "CPU", exact).create_infer_request()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        found = self._request.infer([tensor.numpy() for tensor in inputs])
        return [torch.from_numpy(output.copy()) for output in found.values()]


class TorchProgram(Runtime):
    """A program of torch.export."""

    def __init__(self, path: Path) -> None:
        _refuse_pickles(path)
        extra = {KEY: ""}
        self._module = torch.export.load(path, extra_files=extra).module()
        self.described = extra[KEY]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(self._module(*inputs))


ENDINGS: dict[str, Callable[[Path], Runtime]] = {".onnx": OnnxRuntime, ".xml": OpenVino, ".pt2": TorchProgram}


class ExportedModel(nn.Module):
    """An exported file in the place of a model; it can only predict, and runs on the CPU.

    forward: an ImageBatch of the sizes that the file takes, uint8 or, where it does not normalize, float.
    """

    def __init__(self, runtime: Runtime, description: Description) -> None:
        super().__init__()
        self.runtime, self.description = runtime, description

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks too."""
        return self.description.masks

    @property
    def has_logits(self) -> bool:
        """Whether it gives what segments are made of."""
        return not self.description.postprocess

    @property
    def one_by_one(self) -> bool:
        """As `Description` has it."""
        return self.description.one_by_one

    def forward(self, batch: ImageBatch) -> Predictions | Ranked:
        about = self.description
        if batch.padded and not about.padding:
            raise UserError("The exported file takes no padding. Give images of one size, or one at a time.")
        if not about.normalize:
            batch = batch.normalized(about.mean, about.std)
        if about.side is not None:
            height, width = batch.images.shape[-2:]
            if max(height, width) > about.side or (not about.padding and (height, width) != (about.side, about.side)):
                raise UserError(
                    f"The exported file takes images of {about.side} x {about.side} pixels, got {width} x {height}. "
                    "Leave size, max_size and square out, or export the model again with fixed_size=false."
                )
            batch = padded(batch, about.side)
        sizes = torch.tensor(batch.sizes())
        step = about.batch_size or len(batch)
        found = [self._run(batch.images[i : i + step], sizes[i : i + step], step) for i in range(0, len(batch), step)]
        return self._named([torch.cat(parts)[: len(batch)] for parts in zip(*found, strict=True)], batch)

    def _run(self, images: Tensor, sizes: Tensor, count: int) -> list[Tensor]:
        inputs = [images, sizes] if self.description.padding else [images]
        # The last images once more where the file takes no fewer.
        full = [torch.cat((part, part[-1:].expand(count - len(part), *part.shape[1:]))) for part in inputs]
        try:
            return self.runtime.run([part.contiguous() for part in full])
        except Exception as error:  # each runtime has errors of its own
            raise UserError(
                f"The exported file failed on {count} images of {images.shape[3]} x {images.shape[2]} pixels: "
                f"{_reason(error)}. Export the model again, or use its checkpoint."
            ) from error

    def _named(self, outputs: Sequence[Tensor], batch: ImageBatch) -> Predictions | Ranked:
        named = dict(zip(self.description.outputs, outputs, strict=True))
        masks = named.pop("masks", None)
        size = cast(tuple[int, int], tuple(batch.images.shape[-2:]))
        if self.description.postprocess:
            return Ranked(**named, masks=masks, mask_size=size)
        logits, boxes = (named[name][None] for name in ("logits", "boxes_cxcywh"))
        return Predictions(logits=logits, boxes=boxes, masks=None if masks is None else masks[None], mask_size=size)


class PaddedModel(nn.Module):
    """A model that gets its images padded to one height and width, as a file of one size does."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, batch: ImageBatch) -> Predictions:
        return self.model(padded(batch, self.side))


def open_exported(path: Path) -> ExportedModel:
    """A file of export.py, by its ending. Raises UserError where it is missing, damaged or another's."""
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give a file of export.py: model.onnx, model.xml or model.pt2.")
    try:
        runtime = ENDINGS[path.suffix.lower()](path)
    except UserError:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise UserError(f"{path} cannot be read: {_reason(error)}. Export the model again.") from error
    return ExportedModel(runtime, Description.from_json(runtime.described, path))


def _reason(error: Exception) -> str:
    """What a runtime says, on one line."""
    return brief(" ".join(str(error).split()))


def _refuse_pickles(path: Path) -> None:
    """Raises UserError where tensors are pickled, which run code when they are read; `torch.export.save` has none."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(name)).get("config", {}).values()
                if any(entry.get("use_pickle", True) for entry in entries):
                    raise UserError(f"{path} has pickled tensors, which are not read. Export the model again.")


def imported(package: str) -> Any:
    """A package of the extra `export`. Raises UserError where it is missing."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(
            f"This needs the package {package}. Install it with pip install 'detr-framework[export]'."
        ) from None


def padded(batch: ImageBatch, side: int) -> ImageBatch:
    """At the right and bottom, to squares of so many pixels."""
    height, width = batch.images.shape[-2:]
    more = (0, side - width, 0, side - height)
    return replace(
        batch,
        images=F.pad(batch.images, more),
        mask=F.pad(batch.mask, more, value=True),
        padded=batch.padded or any(more),
    )
