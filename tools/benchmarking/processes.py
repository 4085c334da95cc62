"""Variants of models, each in a process of its own, which run when they are asked to."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch

from detr import Detector
from detr.errors import UserError
from detr.export import ENDINGS, Description, Graph, open_exported
from detr.memory import forget_peak_memory, peak_memory
from detr.models.detr import DETR
from export import inputs_of
from tools.timing import timed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures.

    model: its name, for people. path: a checkpoint, as `Detector.from_checkpoint` takes it, or a file of export.py.
    runtime, precision: of a checkpoint eager or compiled, and one of DTYPES.
    height, width: of the images, without padding. batch: their number.
    description: of the inputs and outputs.
    """

    model: str
    path: str
    runtime: str
    precision: str
    height: int
    width: int
    batch: int
    description: Description
    device: str
    threads: int
    allow_targets: Sequence[str] = ()


class MeasuringProcess:
    """Runs a job in a process of its own, which has run once when this is there. A context manager.

    Its memory is that of one variant alone, and its threads wait while others run.
    Raises UserError where the job cannot be done.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, job))
        self._process.start()
        other.close()
        try:
            self.memory = self._answer()  # bytes, the most that it held beyond what it started with
        except UserError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> "MeasuringProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()

    def __call__(self) -> float:
        """Seconds of one run."""
        self._pipe.send(None)
        return self._answer()

    def _answer(self) -> float:
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"Its process ended with exit code {self._process.exitcode}. Where that is -9, memory ran out."
            ) from None
        if isinstance(found, str):
            raise UserError(found)
        return found


def _serve(pipe: Connection, job: Job) -> None:
    """Answer with the peak of memory, then to each message with the seconds of a run, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pipe is closed then
    torch.set_num_threads(job.threads)
    if torch.device(job.device).type == "cuda":
        torch.cuda.set_device(job.device)
        torch.cuda.init()  # from here on memory is that of the GPU
    forget_peak_memory()
    before = peak_memory()
    try:
        call = prepared(job)
        call()  # compilers and runtimes do in it what later runs do not repeat
        forget_peak_memory()
        call()
    except UserError as error:
        pipe.send(str(error))
        return
    except (RuntimeError, MemoryError) as error:  # compilers and runtimes raise kinds of RuntimeError
        pipe.send(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return
    pipe.send(peak_memory() - before)
    try:
        while True:
            pipe.recv()
            pipe.send(timed(call))
    except EOFError:
        return


def prepared(job: Job) -> Callable[[], object]:
    """From images in memory to what `Description.outputs` names, as the job wants it."""
    random = torch.Generator().manual_seed(0)
    size = (3, job.height, job.width)
    images = [torch.randint(256, size, dtype=torch.uint8, generator=random) for _ in range(job.batch)]
    inputs = [tensor.to(job.device) for tensor in inputs_of(images, job.description).values()]
    if Path(job.path).suffix in ENDINGS:
        runtime = open_exported(Path(job.path)).runtime
        return torch.inference_mode()(lambda: runtime.run(inputs))
    detector = Detector.from_checkpoint(job.path, job.device, allow_targets=job.allow_targets)
    assert isinstance(detector.model, DETR)
    graph = Graph(detector.model, job.description).eval()
    call = torch.compile(graph) if job.runtime == "compiled" else graph
    kind, dtype = torch.device(job.device).type, DTYPES[job.precision]

    @torch.inference_mode()
    def run() -> object:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return call(*inputs)

    return run
