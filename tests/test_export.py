"""export.py: files of each format, what they detect, and which are refused."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jaxtyping
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from datasets.shapes import generate
from detr import Detections, Detector, UserError
from detr.export import FORMATS, ExportedModel, Graph, Limits, Proof, prove, trace
from detr.export.files import Onnx
from detr.export.running import Runtime, imported
from detr.images import read_image
from export import compared, describe, example, inputs_of
from tests.helpers.commands import REPOSITORY, Outcome, figures, predict, run, save_untrained

onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
NAMES = ["circle", "square", "triangle"]
# Two families: softmax scores of all queries; two-stage proposals, sigmoid scores and sampled points.
DEFORMABLE = ("model=small", "model.encoder.d_model=32", "model.encoder.dim_feedforward=32", "model.num_queries=9")


@pytest.fixture(scope="module", autouse=True)
def untyped() -> Iterator[None]:
    """Sizes are symbols while a model is traced, which shapes in types cannot be compared with."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def export(checkpoint: Path, output: Path, *more: str) -> Outcome:
    return run("export.py", f"checkpoint={checkpoint}", f"output={output}", f"run_dir={output.parent / 'log'}", *more)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> Path:
    return save_untrained(tmp_path_factory.mktemp("export") / "best.pt", tiny_options, NAMES)


@pytest.fixture(scope="module")
def onnx_file(checkpoint: Path, untyped: None) -> Path:
    output = checkpoint.parent / "onnx"
    done = export(checkpoint, output)
    assert done.code == 0, done.output
    return output / "model.onnx"


def check_equal(found: list[Detections], wanted: list[Detections]) -> None:
    for one, ours in zip(found, wanted, strict=True):
        assert one.names == ours.names
        torch.testing.assert_close(one.scores, ours.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.boxes, ours.boxes, atol=0.1, rtol=0)


def test_a_file_detects_what_its_checkpoint_does(onnx_file: Path, checkpoint: Path, shapes_root: Path) -> None:
    ours, exported = Detector.from_checkpoint(checkpoint), Detector.from_checkpoint(onnx_file)
    assert exported.categories == ours.categories and exported.resizing == ours.resizing
    image = read_image(shapes_root / "val" / "000000.jpg")
    images = [image, image[:, :31], image[:, :, 7:], image[:, 3:, :23]]
    check_equal(exported.predict(images, 0.0), ours.predict(images, 0.0))
    for one in (ours, exported):
        one.resize_to(80, 101)
    check_equal(exported.predict(images, 0.0, batch_size=3), ours.predict(images, 0.0, batch_size=3))


def test_a_file_says_what_it_is(onnx_file: Path) -> None:
    about = json.loads({p.key: p.value for p in onnx.load(onnx_file).metadata_props}["detr"])
    assert [row["name"] for row in about["categories"]] == NAMES and about["size"] == 48
    assert about["proof"]["images"] == 16 and about["proof"]["score"] < 1e-4 and about["proof"]["box"] < 0.1
    assert about["config"]["model"]["num_queries"] == 7 and about["precision"] == "fp32"
    graph = onnx.load(onnx_file).graph
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert axes == {"images": ["batch", 3, "height", "width"], "sizes": ["batch", 2]}
    assert [value.name for value in graph.output] == ["scores", "labels", "boxes", "queries"]
    onnx.checker.check_model(onnx_file, full_check=True)


def test_commands_take_files(onnx_file: Path, checkpoint: Path, tmp_path: Path, shapes_root: Path) -> None:
    found = []
    for name, path in (("ours", checkpoint), ("exported", onnx_file)):
        options = (f"checkpoint={path}", "device=cpu", "data.workers=0", f"run_dir={tmp_path / name}")
        done = run("evaluate.py", *options)
        assert done.code == 0, done.output
        assert predict(path, shapes_root / "val", tmp_path / f"{name}_found").code == 0
        rows = json.loads((tmp_path / f"{name}_found" / "results.json").read_text())
        found.append((figures(tmp_path / name)["bbox"]["AP"], rows))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3) and len(found[0][1]) == len(found[1][1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("openvino", ("batch_size=1",)),
        ("torch", ("num_images=1",)),
        ("onnx", ("postprocess=false", "normalize=false")),
        ("onnx", ("fixed_size=true", "batch_size=2")),
        pytest.param("onnx", ("square=true", "size=64", "fixed_size=true"), marks=pytest.mark.slow),
        pytest.param("openvino", ("precision=fp16",), marks=pytest.mark.slow),
    ],
)
def test_every_format_and_form(
    kind: str, options: tuple[str, ...], tmp_path: Path, tiny_options: list[str], shapes_root: Path
) -> None:
    checkpoint = save_untrained(tmp_path / "best.pt", [*tiny_options, *DEFORMABLE], NAMES)
    done = export(checkpoint, tmp_path / "out", f"format={kind}", *options)
    assert done.code == 0 and "Proof: " in done.output, done.output
    ours, exported = (
        Detector.from_checkpoint(path) for path in (checkpoint, tmp_path / "out" / f"model{FORMATS[kind].ending}")
    )
    ours.resize_to(exported.size, exported.max_size, exported.square)
    images = [read_image(path)[:, :41] for path in sorted((shapes_root / "val").iterdir())][:3]
    if "precision=fp16" not in options and "fixed_size=true" not in options:  # padding changes a little
        check_equal(exported.predict(images, 0.0), ours.predict(images, 0.0))


def test_masks_are_exported(tmp_path: Path, tiny_options: list[str], shapes_root: Path) -> None:
    options = [*tiny_options, "model/masks=dot_product"]
    checkpoint = save_untrained(tmp_path / "best.pt", options, NAMES)
    assert export(checkpoint, tmp_path / "out", "num_images=2").code == 0
    ours, exported = (Detector.from_checkpoint(path) for path in (checkpoint, tmp_path / "out" / "model.onnx"))
    image = shapes_root / "val" / "000000.jpg"
    (one,), (other) = ours.predict(image, 0.0), exported.predict(image, 0.0)[0]
    assert one.masks is not None and other.masks is not None and len(one.masks)
    assert (one.masks.ious(other.masks) > 0.99).all()
    with pytest.raises(UserError, match="Export the model again with postprocess=false"):
        exported.panoptic(image)


def test_the_minimal_example_finds_the_same(onnx_file: Path, shapes_root: Path) -> None:
    image = shapes_root / "val" / "000000.jpg"
    code = f"import detect, onnxruntime; from PIL import Image; import json; print(json.dumps(detect.detect(onnxruntime.InferenceSession({str(onnx_file)!r}), Image.open({str(image)!r}), 0.0)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY / "docs" / "deploy", capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)
    (found,) = Detector.from_checkpoint(onnx_file).predict(image, 0.0)
    assert [row["name"] for row in rows] == found.names
    np.testing.assert_allclose([row["score"] for row in rows], found.scores, atol=2e-3)  # Pillow rounds otherwise
    np.testing.assert_allclose([row["box"] for row in rows], found.boxes, atol=0.5)


def broken(change: Callable[[object], None]) -> object:
    """The writer of ONNX, which something happens to afterwards."""
    write = Onnx.write

    def spoil(self: Onnx, program: object, description: object, path: Path, calibration: object) -> object:
        program = write(self, program, description, path, calibration)  # type: ignore[arg-type]
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)
        return program

    return mock.patch.object(Onnx, "write", spoil)


def wrong_epsilon(model: object) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "LayerNormalization"]  # type: ignore[attr-defined]
    for attribute in nodes[1].attribute:
        if attribute.name == "epsilon":
            attribute.f = 0.5


def test_an_export_that_detects_otherwise_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with broken(wrong_epsilon):  # type: ignore[attr-defined]
        done = export(checkpoint, tmp_path / "out")
    assert done.code == 2 and "is not kept: a" in done.message and "of at most" in done.message
    assert "The first layer that differs is encoder.layers.0.norm2 (LayerNorm), in its layer_norm." in done.message
    assert not (tmp_path / "out").exists()


def test_halves_that_overflow_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=False)
    state = content["model"]
    state["encoder.layers.0.ffn.linear1.weight"] *= 1e6
    state["encoder.layers.0.ffn.linear2.weight"] /= 1e6
    torch.save(content, tmp_path / "best.pt")
    done = export(tmp_path / "best.pt", tmp_path / "out", "precision=fp16")
    assert done.code == 2 and "scores differ by" in done.message and "precision=fp32" in done.message
    assert "The first layer that differs is encoder.layers.0.ffn.linear1 (Linear)" in done.message
    assert not (tmp_path / "out").exists()


class Undecided(nn.Module):
    """What depends on the values of its input cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.mean() > 0) else x


def test_a_part_that_cannot_be_traced_is_named(checkpoint: Path, tmp_path: Path) -> None:
    build = Detector.from_checkpoint

    def with_part(*arguments: object, **options: object) -> Detector:
        detector = build(*arguments, **options)  # type: ignore[arg-type]
        detector.model.decoder.norm = nn.Sequential(detector.model.decoder.norm, Undecided())  # type: ignore[union-attr, operator, assignment]
        return detector

    with mock.patch.object(Detector, "from_checkpoint", with_part):
        done = export(checkpoint, tmp_path / "out")
    assert done.code == 2 and "cannot be exported: decoder.norm.1 (Undecided) does not allow it" in done.message


FORM = OmegaConf.create(
    {"normalize": True, "postprocess": True, "fixed_size": False, "batch_size": None, "precision": "fp32"}
)


class Searching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.searchsorted(images[0, 0, 0], images)


def test_an_operation_that_onnx_lacks_is_named(checkpoint: Path, tmp_path: Path) -> None:
    program = torch.export.export(Searching(), (torch.zeros(1, 3, 4, 4),))
    description = describe(FORM, Detector.from_checkpoint(checkpoint))
    with pytest.raises(UserError, match=r"cannot be written as ONNX: .*searchsorted.*Set format=torch"):
        Onnx().write(program, description, tmp_path / "model.onnx", lambda: iter(()))


def test_backbones_of_certain_sizes_are_traced_for_all(checkpoint: Path) -> None:
    detector = Detector.from_checkpoint(checkpoint)
    detector.model.backbone.size_divisor = 32  # type: ignore[union-attr, assignment]
    description = describe(FORM, detector)
    graph = Graph(detector.model, description)  # type: ignore[arg-type]
    program = trace(graph, inputs_of([example(detector, description)] * 2, description)).module()
    for size in ((48, 64), (64, 96), (33, 65)):
        inputs = inputs_of([torch.randint(255, (3, *size), dtype=torch.uint8)] * 2, description)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs.values()), graph(*inputs.values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("format=torch", "precision=fp16"), "format=torch has no fp16. Set precision=fp32."),
        (("precision=int8",), "precision=int8 takes its ranges from real images. Set images=DIR"),
        (("format=tflite",), "format: wanted onnx or openvino or torch, got 'tflite'."),
        (("images=nowhere",), "images=nowhere names no image"),
    ],
)
def test_wrong_options_are_named(options: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path) -> None:
    done = export(checkpoint, tmp_path / "out", *options)
    assert done.code == 2 and message in done.message


def test_nothing_is_exported_twice_or_overwritten(onnx_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = export(onnx_file, tmp_path / "out")
    assert done.code == 2 and "is exported already" in done.message
    before = onnx_file.read_bytes()
    done = export(checkpoint, onnx_file.parent)
    assert done.code == 2 and "exists already" in done.message and onnx_file.read_bytes() == before


def test_files_of_others_are_named(onnx_file: Path, tmp_path: Path) -> None:
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"other.onnx does not say what its inputs and outputs are. Wanted a file of"):
        Detector.from_checkpoint(tmp_path / "other.onnx")
    (tmp_path / "half.onnx").write_bytes(onnx_file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"half.onnx cannot be read: .*PROTOBUF"):
        Detector.from_checkpoint(tmp_path / "half.onnx")
    shutil.copy(onnx_file, tmp_path / "capitals.ONNX")
    assert Detector.from_checkpoint(tmp_path / "capitals.ONNX").size == 48
    with pytest.raises(UserError, match=r"none.onnx does not exist"):
        Detector.from_checkpoint(tmp_path / "none.onnx")


def test_a_file_of_one_size_takes_no_other(checkpoint: Path, tmp_path: Path, shapes_root: Path) -> None:
    assert export(checkpoint, tmp_path / "out", "fixed_size=true", "num_images=1").code == 0
    detector = Detector.from_checkpoint(tmp_path / "out" / "model.onnx")
    detector.resize_to(200)
    with pytest.raises(UserError, match="takes images of 64 x 64 pixels, got 200 x 200"):
        detector.predict(shapes_root / "val" / "000000.jpg")


def test_what_an_exported_file_cannot_do_is_said_first(onnx_file: Path, shapes_root: Path, tmp_path: Path) -> None:
    for option, message in (("formats=[panoptic]", "panoptic needs a model"), ("attention=true", "needs a checkpoint")):
        done = predict(onnx_file, shapes_root / "val", tmp_path / "found", option)
        assert done.code == 2 and message in done.message and not (tmp_path / "found").exists()


def test_a_runtime_that_fails_is_one_message(onnx_file: Path, shapes_root: Path, tmp_path: Path) -> None:
    with mock.patch("detr.export.running.OnnxRuntime.run", side_effect=RuntimeError("no\nmemory")):
        done = predict(onnx_file, shapes_root / "val", tmp_path / "found")
    assert done.code == 2 and "The exported file failed on" in done.message and "no memory" in done.message


def test_pickled_tensors_are_refused(tmp_path: Path) -> None:
    config = {"config": {"weight": {"path_name": "weight_0", "use_pickle": True}}}
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/weights/model_weights_config.json", json.dumps(config))
    with pytest.raises(UserError, match="has pickled tensors, which are not read"):
        Detector.from_checkpoint(tmp_path / "model.pt2")


def test_a_broken_image_is_named_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with mock.patch("export.trace", side_effect=AssertionError("too late")):
        done = export(checkpoint, tmp_path / "out", f"images={tmp_path / 'images'}")
    assert done.code == 2 and "a.jpg" in done.message


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(UserError, match=r"pip install 'detr-framework\[export\]'"):
        imported("a_package_that_nobody_has")


def detections(*rows: tuple[str, float, list[float]]) -> Detections:
    names = [row[0] for row in rows]
    return Detections(
        boxes=torch.tensor([row[2] for row in rows]).reshape(-1, 4),
        scores=torch.tensor([row[1] for row in rows]),
        labels=torch.tensor([NAMES.index(name) for name in names], dtype=torch.int64),
        names=names,
        queries=torch.arange(len(rows)),
    )


def test_differences_are_of_the_same_things() -> None:
    ours = detections(("circle", 0.9, [0, 0, 10, 10]), ("circle", 0.8, [20, 0, 30, 10]), ("square", 0.7, [0, 0, 9, 9]))
    # The circles have swapped ranks; the square is called a triangle.
    theirs = detections(
        ("circle", 0.81, [20, 0, 30, 12]), ("circle", 0.8, [0, 0, 10, 10]), ("triangle", 0.7, [0, 0, 9, 9])
    )
    proof = prove([ours], [theirs])
    assert proof.detections == 3 and proof.box == 2 and proof.mean_box == 1
    assert proof.score == pytest.approx(0.7) and proof.mean_score == pytest.approx((0.1 + 0.01 + 0.7) / 3)
    assert prove([ours], [ours]) == Proof(1, 3, 0.0, 0.0, 0.0, 0.0, sure=3)


def test_detections_of_the_file_alone_count() -> None:
    ours = detections(("circle", 0.9, [0, 0, 10, 10]))
    theirs = detections(
        ("circle", 0.9, [0, 0, 10, 10]), ("circle", 0.8, [20, 0, 30, 10]), ("square", 0.7, [0, 0, 9, 9])
    )
    proof = prove([ours], [theirs])
    assert proof.score == pytest.approx(0.8) and proof.detections == 1


class Swapped(Runtime):
    """A file that takes height and width of images with padding for one another."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        images, sizes = inputs
        return list(self.graph(images, sizes.flip(1)))


def test_images_that_are_compared_have_padding(checkpoint: Path, tmp_path: Path) -> None:
    generate(tmp_path / "set", train_images=1, val_images=2, image_size=48)  # all of them squares
    images = sorted((tmp_path / "set" / "val").iterdir())
    detector = Detector.from_checkpoint(checkpoint)
    exported = Detector.from_checkpoint(checkpoint)
    description = describe(FORM, detector)
    exported.model = ExportedModel(Swapped(Graph(detector.model, description)), description)  # type: ignore[arg-type]
    proof = compared(detector, exported, images, [(1.0, 2)])
    assert proof.excess(Limits.of("fp32"), 0.01) is not None
