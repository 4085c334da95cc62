"""Writing the files of each format. What each needs of other packages is in the extra `export`."""

import contextlib
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr.errors import UserError
from detr.export.description import KEY, Description
from detr.export.running import imported

Inputs = Mapping[str, Tensor]
Program = torch.export.ExportedProgram

# Where half precision loses what counts: positions and box coordinates are differences of numbers that are near to each
# other, and the order of scores decides which boxes are there at all.
_EXACT = ("Sin", "Cos", "Pow", "Range", "TopK", "CumSum", "GridSample", "Resize", "Log", "Softmax", "Sigmoid")
_QUANTIZED = ("Conv", "MatMul", "Gemm")


class Format(ABC):
    """What writes a program.

    ending: of the file. others: endings of files beside it. precisions: that it can have.
    packages: that it needs. further: those that a precision needs beside them.
    """

    ending: str
    others: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    further: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def files(self, path: Path) -> list[Path]:
        """A file, and those beside it."""
        return [path.with_suffix(ending) for ending in (self.ending, *self.others)]

    def check(self, precision: str) -> None:
        """Raises UserError where a package is missing."""
        for package in (*self.packages, *self.further.get(precision, ())):
            imported(package)

    @abstractmethod
    def write(
        self, program: Program, description: Description, path: Path, calibration: Callable[[], Iterator[Inputs]]
    ) -> Program:
        """Write the file without what it says of itself; gives the program whose values it computes, by name.

        calibration: inputs from real images, which int8 takes its ranges from.
        """

    @abstractmethod
    def describe(self, path: Path, description: Description, program: Program) -> None:
        """Let a file say of itself what it is. program: that `write` was given."""

    @abstractmethod
    def values(self, path: Path, names: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
        """The values inside of a file for some inputs, those of the names that are in it."""


class Onnx(Format):
    """ONNX by the exporter that torch.export feeds, for ONNX Runtime and others."""

    ending = ".onnx"

    def write(
        self, program: Program, description: Description, path: Path, calibration: Callable[[], Iterator[Inputs]]
    ) -> Program:
        onnx, program = _to_onnx(program, description)
        if description.precision == "fp16":
            onnx = _to_half(onnx)
        imported("onnx").save(onnx, path)
        if description.precision == "int8":
            _quantize_onnx(path, calibration())
        return program

    def describe(self, path: Path, description: Description, program: Program) -> None:
        onnx = imported("onnx")
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {KEY: description.as_json()})
        model.producer_name, model.producer_version = "detr-framework", description.version
        onnx.save(model, path)

    def values(self, path: Path, names: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
        onnx, onnxruntime = imported("onnx"), imported("onnxruntime")
        model = onnx.load(path)
        there = {output for node in model.graph.node for output in node.output}
        chosen = [name for name in names if name in there]
        known = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in chosen if name not in known)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(chosen, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(chosen, found, strict=True)}


class OpenVinoFiles(Format):
    """OpenVINO's .xml and .bin, from ONNX."""

    ending = ".xml"
    others = (".bin",)
    packages = (*Format.packages, "openvino")
    further = MappingProxyType({"int8": ("nncf",)})

    def write(
        self, program: Program, description: Description, path: Path, calibration: Callable[[], Iterator[Inputs]]
    ) -> Program:
        openvino = imported("openvino")
        onnx, program = _to_onnx(program, description)
        model = openvino.Core().read_model(onnx.SerializeToString())
        if description.precision == "int8":
            model = _quantize_openvino(model, calibration())
        openvino.save_model(model, path, compress_to_fp16=description.precision == "fp16")
        return program

    def describe(self, path: Path, description: Description, program: Program) -> None:
        openvino = imported("openvino")
        model = openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())
        model.set_rt_info(description.as_json(), [KEY])
        openvino.save_model(model, path, compress_to_fp16=False)

    def values(self, path: Path, names: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
        openvino = imported("openvino")
        model = openvino.Core().read_model(path)
        there = {name for op in model.get_ops() for output in op.outputs() for name in output.get_names()}
        chosen = [name for name in names if name in there]
        own = len(model.outputs)
        model.add_outputs(chosen)
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        found = openvino.compile_model(model, "CPU", exact)([tensor.numpy() for tensor in inputs.values()])
        added = [*found.values()][own:]
        return {name: torch.from_numpy(np.array(value)) for name, value in zip(chosen, added, strict=True)}


class TorchFile(Format):
    """The program itself, for torch.export.load."""

    ending = ".pt2"
    precisions = ("fp32",)
    packages = ()

    def write(
        self, program: Program, description: Description, path: Path, calibration: Callable[[], Iterator[Inputs]]
    ) -> Program:
        torch.export.save(program, path)
        return program

    def describe(self, path: Path, description: Description, program: Program) -> None:
        torch.export.save(program, path, extra_files={KEY: description.as_json()})

    def values(self, path: Path, names: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
        return values_of(torch.export.load(path), names, inputs)


FORMATS: dict[str, Format] = {"onnx": Onnx(), "openvino": OpenVinoFiles(), "torch": TorchFile()}


def values_of(program: Program, names: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
    """The values inside of a program, by the names of its nodes."""
    wanted, found = set(names), {}

    class Interpreter(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node.name in wanted and isinstance(value, Tensor):
                found[node.name] = value.clone()
            return value

    with torch.no_grad():
        Interpreter(program.module()).run(*inputs.values())
    return found


def _to_onnx(program: Program, description: Description) -> tuple[Any, Program]:
    """ONNX's model, and the program whose nodes give its values their names."""
    from onnxscript import optimizer

    with _quiet():
        try:
            onnx = torch.onnx.export(
                program,
                input_names=description.inputs,
                output_names=description.outputs,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
                optimize=False,
                verbose=False,
                dynamo=True,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise UserError(f"The model cannot be written as ONNX: {reason} Set format=torch.") from error
        assert onnx is not None
        # Constants are folded and dead nodes dropped. The exporter's own optimization rewrites more, and loses
        # initializers where one value is limited twice.
        optimizer.optimize(onnx.model)
        for node in onnx.model.graph.all_nodes():
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine
    for place, name in ((0, "batch"), (2, "height"), (3, "width")):
        _rename_axis(onnx.model.graph, place, name)
    assert onnx.exported_program is not None
    return onnx.model_proto, onnx.exported_program


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """ONNX's TopK puts the lower index first where values are equal, as a stable sort does."""
    from onnxscript import opset18 as op

    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))  # type: ignore[type-var]
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _rename_axis(graph: Any, place: int, name: str) -> None:
    """Give a free axis of the images a name that says what it is, in all inputs and outputs."""
    images = graph.inputs[0].shape
    if isinstance(images[place], int):
        return
    symbol = images[place].value
    for value in (*graph.inputs, *graph.outputs):
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value == symbol:
                value.shape[axis] = name


def _to_half(model: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        return convert_float_to_float16(model, keep_io_types=True, op_block_list=list(_EXACT))


def _quantize_onnx(path: Path, inputs: Iterator[Inputs]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(inputs, None)
            return None if found is None else {name: tensor.numpy() for name, tensor in found.items()}

    with _quiet():
        quant_pre_process(path, path, skip_symbolic_shape=True)
        quantize_static(
            path,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTIZED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
        )


def _quantize_openvino(model: Any, inputs: Iterator[Inputs]) -> Any:
    nncf = imported("nncf")
    samples = [[tensor.numpy() for tensor in found.values()] for found in inputs]
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries print and warn about what nobody can change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
