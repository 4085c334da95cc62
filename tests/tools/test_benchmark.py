"""What detectors cost: operations by hand, percentiles by NumPy, turns by a clock of our own, and mistakes."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets.shapes import generate
from detr import Detector
from detr.config import compose
from detr.errors import UserError
from detr.export import FORMATS, Graph, trace
from detr.models.deployment import deployed
from detr.models.detr import DETR
from detr.postprocess import Ranked
from export import describe, inputs_of
from tests.helpers.commands import TINY_MODEL, run, save_untrained
from tools import benchmark
from tools.benchmarking import processes
from tools.benchmarking.processes import Job, MeasuringProcess, prepared
from tools.benchmarking.sources import Options, Source, file_size
from tools.counts import count_flops, count_parameters
from tools.timing import in_turns, medians

SECONDS = {"eager, fp32": 0.004, "compiled, fp32": 0.002, "eager, bf16": 0.008}
FIGURES = ("median_ms", "p90_ms", "p99_ms", "images_per_second", "memory_mib", "parameters", "flops")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.pt"
    return save_untrained(path, [*TINY_MODEL, "data.size=64", "data.max_size=96"], ["cat", "dog", "fish"])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the variants in the order in which they ran, each in a time of its own that grows from turn to turn."""
    order: list[str] = []

    class Stub:
        memory = 3 * 2.0**20

        def __init__(self, job: Job) -> None:
            self.name = f"{job.runtime}, {job.precision}"

        def __enter__(self) -> "Stub":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __call__(self) -> float:
            order.append(self.name)
            return SECONDS[self.name] * order.count(self.name)

    monkeypatch.setattr(benchmark, "MeasuringProcess", Stub)
    return order


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "benchmark.json").read_text())


def options(**more: Any) -> Options:
    given = {"runtimes": ["eager"], "precisions": ["fp32"], "images": None, "device": "cpu", "threads": 1}
    return Options(**{**given, "allow_targets": (), **more})


def test_a_checkpoint_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    command = [str(checkpoint), "--sizes", "64x96", "--batch-sizes", "2", "--repeats", "5", "--threads", "1"]
    benchmark.main([*command, "--output", str(tmp_path / "out")])
    found = content(tmp_path / "out")
    [row] = found["measurements"]
    assert (row["model"], row["runtime"], row["precision"]) == (str(checkpoint), "eager", "fp32")
    assert (row["height"], row["width"], row["batch_size"], row["speedup"], row["file_mib"]) == (64, 96, 2, 1.0, None)
    assert all(row[name] > 0 for name in FIGURES) and len(row["milliseconds"]) == 5
    assert 0 < min(row["milliseconds"]) <= row["median_ms"] <= row["p90_ms"] <= row["p99_ms"] < 10_000
    # The least that it holds are its weights and what the first layer gives.
    assert row["memory_mib"] * 2**20 > 4 * row["parameters"] and row["memory_mib"] < 4_000
    model = Detector.from_checkpoint(checkpoint).model
    assert isinstance(model, DETR) and row["parameters"] == sum(p.numel() for p in deployed(model).parameters())
    assert found["machine"]["threads"] == 1 and found["machine"]["packages"]["torch"] == torch.__version__
    assert found["command"].endswith(f"{checkpoint} {' '.join(command[1:])} --output {tmp_path / 'out'}")
    page = (tmp_path / "out" / "benchmark.md").read_text()
    assert (
        f"| eager | fp32 | {row['min_ms']:.2f} | {row['median_ms']:.2f} |" in page
        and "not reading, resizing and padding" in page
    )


def test_variants_take_turns_and_are_compared(
    checkpoint: Path, tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(checkpoint), "--runtimes", "eager", "compiled", "--precisions", "fp32", "bf16", "int8"]
    with pytest.raises(SystemExit, match=r"^2$"):
        benchmark.main([*command, "--repeats", "0"])
    SECONDS["compiled, bf16"] = 0.001
    benchmark.main([*command, "--repeats", "11", "--batch-sizes", "1", "4", "--output", str(tmp_path)])
    variants = ["eager, fp32", "eager, bf16", "compiled, fp32", "compiled, bf16"]
    assert ran == variants * 2 * (2 + 11)
    found = content(tmp_path)
    for row in found["measurements"]:
        name = f"{row['runtime']}, {row['precision']}"
        # Two turns of warm-up come before, and with four images all those with one.
        first = 3 if row["batch_size"] == 1 else 3 + 13
        milliseconds = [1000 * SECONDS[name] * count for count in range(first, first + 11)]
        assert row["milliseconds"] == pytest.approx(milliseconds) and row["min_ms"] == pytest.approx(milliseconds[0])
        for percent, figure in ((50, "median_ms"), (90, "p90_ms"), (99, "p99_ms")):
            assert row[figure] == pytest.approx(np.percentile(milliseconds, percent))
        quarter = np.subtract(*np.percentile(milliseconds, [75, 25]))
        assert row["spread"] == pytest.approx(quarter / np.median(milliseconds))
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / np.median(milliseconds))
        assert row["speedup"] == pytest.approx(SECONDS["eager, fp32"] / SECONDS[name])
        assert row["memory_mib"] == 3
        assert (row["height"], row["width"]) == (64, 85), "a photograph of 480x640, as its configuration resizes it"
    assert [*found["left_out"]] == ["eager, int8", "compiled, int8"]
    assert "Left out: eager, int8: on cpu it is measured in fp32 and bf16\n" in capsys.readouterr().out


def test_turns_by_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, []

    def work(name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            order.append(name)
            now += next(seconds)

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    calls = {"a": work("a", iter([9.0, 1.0, 5.0, 2.0])), "b": work("b", iter([9.0, 3.0, 3.0, 4.0]))}
    assert medians(calls, repeats=3, warmup=1) == {"a": 2.0, "b": 3.0}
    assert "".join(order) == "abababab"
    assert in_turns({"a": iter([1.0, 2.0, 3.0]).__next__}, repeats=2, warmup=1) == {"a": [2.0, 3.0]}


def test_operations_of_convolutions_are_those_by_hand(checkpoint: Path, tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 10, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(10, 8, 3, groups=2))
    images = torch.zeros(7, 3, 22, 34)
    # Maps of 11x17 and 9x15.
    by_hand = 2 * 7 * (11 * 17 * 10 * 3 * 5 * 5 + 9 * 15 * 8 * 5 * 3 * 3)
    assert count_flops(lambda: layers.requires_grad_(False)(images)) == by_hand
    assert count_parameters(layers) == 10 * 3 * 25 + 10 + 8 * 5 * 9 + 8

    # Of a whole model all but attention is in convolutions and linear layers, which are counted as they run.
    source = Source("tiny", str(checkpoint), tmp_path, options())
    model = Detector.from_checkpoint(checkpoint).model
    counted = 0

    def count(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * module.weight[0].numel()

    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.backbone(torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    whole = source.flops((64, 96))
    assert whole is not None and counted < whole < 1.2 * counted, "the rest of the tiny model is small"


def test_an_exported_file_is_measured_as_it_is(checkpoint: Path, tmp_path: Path, ran: list[str]) -> None:
    path = str(tmp_path / "model.pt2")
    detector = Detector.from_checkpoint(checkpoint)
    detector.resize_to(96, square=True)
    about = describe(compose(["checkpoint=", "batch_size=2", "fixed_size=true"], "export"), detector)
    assert isinstance(detector.model, DETR)
    program = trace(Graph(detector.model, about), inputs_of([torch.zeros(3, 96, 96, dtype=torch.uint8)] * 2, about))
    FORMATS["torch"].write(program, about, Path(path), lambda: iter(()))
    FORMATS["torch"].describe(Path(path), about, program)
    SECONDS["torch.export, fp32"] = 0.001
    command = [path, str(checkpoint), "--sizes", "96", "128", "--batch-sizes", "2", "3", "--repeats", "3"]
    benchmark.main([*command, "--output", str(tmp_path / "out")])
    found = content(tmp_path / "out")
    [row] = [row for row in found["measurements"] if row["model"] == path]
    assert (row["height"], row["width"], row["batch_size"], row["runtime"]) == (96, 96, 2, "torch.export")
    assert row["file_mib"] == pytest.approx(Path(path).stat().st_size / 2**20)
    assert row["parameters"] is row["flops"] is row["speedup"] is None
    reasons = {name.rpartition(", ")[2]: reason for name, reason in found["left_out"].items()}
    batch, side = "the file takes batches of 2 alone", "the file takes images of 96x96 alone"
    assert reasons == {"3 of 96x96": batch, "2 of 128x128": side, "3 of 128x128": batch}

    ours, theirs = (Source(name, name, tmp_path, options()) for name in (str(checkpoint), path))
    jobs = [source.job(*source.variants[0], (96, 96), 2) for source in (ours, theirs)]
    outputs = [prepared(job)() for job in jobs]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    # Both are what the detector ranks.
    batch = [image.permute(1, 2, 0).numpy() for image in random_images(jobs[0])]
    [raw] = [one.raw for one in detector.outputs(batch, 2)]
    assert not isinstance(raw, Ranked) and file_size(str(checkpoint)) is None
    torch.testing.assert_close(
        outputs[0][0].sort(-1).values, raw.logits[-1].softmax(-1)[..., :-1].amax(-1).sort(-1).values
    )


def random_images(job: Job) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    size = (3, job.height, job.width)
    return [torch.randint(256, size, dtype=torch.uint8, generator=random) for _ in range(job.batch)]


def test_what_cannot_run_is_left_out(
    checkpoint: Path, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job) -> None:
        raise RuntimeError("no compiler\nMore of it")

    here, there = multiprocessing.Pipe()
    monkeypatch.setattr(processes, "prepared", fail)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    processes._serve(there, Source("tiny", str(checkpoint), tmp_path, options()).job("eager", "fp32", None, 1))
    answer = here.recv()
    assert answer == "RuntimeError: no compiler"

    stub = benchmark.MeasuringProcess

    def start(job: Job) -> MeasuringProcess:
        if job.runtime == "compiled":
            raise UserError(answer)
        return stub(job)

    monkeypatch.setattr(benchmark, "MeasuringProcess", start)
    benchmark.main([str(checkpoint), "--runtimes", "eager", "compiled", "--repeats", "3", "--output", str(tmp_path)])
    found = content(tmp_path)
    assert [row["runtime"] for row in found["measurements"]] == ["eager"]
    assert found["left_out"] == {f"{checkpoint}, compiled, fp32, 1 of its own size": answer}


@pytest.mark.slow
def test_a_process_that_dies_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    job = Source("tiny", str(checkpoint), tmp_path, options()).job("eager", "fp32", None, 1)
    with pytest.raises(UserError, match=r"^Its process ended with exit code 1\."):
        MeasuringProcess(replace(job, batch=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("load", "said"), [((0.1, 1.2), False), ((0.9, 1.2), True), ((0.1, 1.9), True)], ids=["idle", "before", "after"]
)
def test_others_who_use_the_machine_are_mentioned(
    checkpoint: Path,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    load: tuple[float, float],
    said: bool,
) -> None:
    loads = iter(load)
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    benchmark.main([str(checkpoint), "--repeats", "3", "--threads", "1"])
    assert ("Others use this machine" in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--runtimes", "tensorrt"], r"invalid choice: 'tensorrt' \(choose from '?eager"),
        (["--precisions", "fp8"], r"invalid choice: 'fp8'"),
        (["--sizes", "64y64"], r"--sizes: wanted .* 640 or 800x1066 .*got 64y64"),
        (["--batch-sizes", "0"], r"--batch-sizes: wanted a number of at least 1, got 0"),
        (["--models", "small"], r"--models needs --sizes"),
        (
            ["--precisions", "int8", "--runtimes", "onnxruntime"],
            r"int8 takes its ranges from real images. Give --images",
        ),
        (
            ["--precisions", "int8"],
            r"Nothing of this can be measured. eager, int8: on cpu it is measured in fp32 and bf16",
        ),
        (["--models", "smal", "--sizes", "64"], r"model.*smal"),
        (["--device", "cuda:99"], r"device=cuda:99 was asked for"),
        (["missing.pt"], r"missing\.pt does not exist"),
    ],
)
def test_mistakes_end_with_code_2(checkpoint: Path, command: list[str], message: str) -> None:
    outcome = run("tools/benchmark.py", str(checkpoint), *command)
    assert outcome.code == 2 and re.search(message, outcome.output), outcome.output
    assert "Traceback" not in outcome.output


def test_nothing_given_is_a_mistake() -> None:
    outcome = run("tools/benchmark.py")
    assert outcome.code == 2 and "give a CHECKPOINT or --models NAME" in outcome.output


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = run("tools/benchmark.py", str(checkpoint), "--runtimes", "eager", "onnxruntime")
    assert outcome.code == 2, outcome.output
    assert f"needs the package {package}. Install it with pip install 'detr-framework[export]'" in outcome.output
    assert "Or leave onnxruntime out of --runtimes." in outcome.output


def test_files_of_others_are_kept(checkpoint: Path, ran: list[str], tmp_path: Path) -> None:
    (tmp_path / "benchmark.md").write_text("mine")
    outcome = run("tools/benchmark.py", str(checkpoint), "--output", str(tmp_path))
    assert outcome.code == 2 and "--output DIR" in outcome.output and not ran
    assert (tmp_path / "benchmark.md").read_text() == "mine"


@pytest.mark.slow
def test_every_variant_of_a_model_by_name(tmp_path: Path) -> None:
    generate(tmp_path / "shapes", train_images=1, val_images=9, image_size=96, min_objects=1, max_objects=3)
    command = ["--models", "small", "--sizes", "96", "--repeats", "3", "--images", str(tmp_path / "shapes" / "val")]
    runtimes = ["eager", "compiled", "onnxruntime", "openvino"]
    precisions = ["fp32", "bf16", "fp16", "int8"]
    benchmark.main([*command, "--runtimes", *runtimes, "--precisions", *precisions, "--output", str(tmp_path / "out")])
    found = content(tmp_path / "out")
    sizes = {(row["runtime"], row["precision"]): row["file_mib"] for row in found["measurements"]}
    assert sizes.keys() == {
        *((runtime, precision) for runtime in runtimes[:2] for precision in precisions[:2]),
        *((runtime, precision) for runtime in runtimes[2:] for precision in ("fp32", "fp16", "int8")),
    }
    for runtime in runtimes[2:]:
        pytest.importorskip(runtime)
        assert sizes[runtime, "int8"] < sizes[runtime, "fp16"] < sizes[runtime, "fp32"]
    assert all(row["speedup"] > 0 and row["memory_mib"] > 0 for row in found["measurements"])
