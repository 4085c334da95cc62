"""A server under load: many clients that each send one photograph after another, with batches and without."""

import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.results import Row
from tools.benchmarking.sources import random_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
REQUESTS, CLIENTS, BATCH_SIZES = 1000, 16, (8, 1)
SIDE = 160  # pixels of the short side for the model: small, so that serving counts beside the model
PHOTOGRAPHS = 8  # that differ
FIRST = 100  # requests, after which memory is looked at
SECONDS = 60  # until an answer counts as lost


def run(*, threads: int, requests: int = REQUESTS, clients: int = CLIENTS) -> Iterator[Row]:
    """threads: of torch in the server."""
    with tempfile.TemporaryDirectory() as temporary:
        sizes = (f"data.size={SIDE}", f"data.max_size={SIDE * 5 // 3}")
        checkpoint = random_checkpoint("small", Path(temporary), *sizes)
        for batch_size in BATCH_SIZES:
            case = f"batches of {batch_size}"
            with server(checkpoint, batch_size, threads) as (port, process):
                yield from measure(case, port, process, requests, clients)


@contextmanager
def server(checkpoint: Path, batch_size: int, threads: int) -> Iterator[tuple[int, int]]:
    """Its port and the number of its process."""
    command = [sys.executable, "tools/serve.py", str(checkpoint), "--port", "0", "--batch-size", str(batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command += ["--device", "cpu"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines: list[str] = []
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", lines[-1] if lines else "")):
                if not (line := process.stderr.readline()):
                    raise RuntimeError(f"The server did not start: {''.join(lines)}")
                lines.append(line)
            threading.Thread(target=process.stderr.read, daemon=True).start()  # else a full pipe would stop it
            yield int(found[1]), process.pid
        finally:
            process.terminate()


def measure(case: str, port: int, process: int, requests: int, clients: int) -> Iterator[Row]:
    seconds: list[float] = []
    send(port, photographs(), min(FIRST, requests), clients)
    early = held(process)
    began = time.perf_counter()
    lost = send(port, photographs(), requests, clients, seconds)
    took = time.perf_counter() - began
    median, high = np.quantile(seconds, (0.5, 0.99)) * 1000
    yield Row(case, "speed", "images/s", (requests - lost) / took, more_is_better=True)
    yield Row(case, "half of the answers within", "ms", median)
    yield Row(case, "99 % of the answers within", "ms", high)
    yield Row(case, f"answers lost of {requests:,}", "", lost, target=0)
    yield Row(case, f"memory after {min(FIRST, requests)} requests", "MiB", early)
    yield Row(case, f"memory after {requests:,} more", "MiB", held(process))


def photographs() -> list[bytes]:
    """JPEG files of 640 x 480 pixels."""
    contents = []
    for number in range(PHOTOGRAPHS):
        pixels = torch.rand((6, 8, 3), generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    return contents


def send(port: int, contents: Sequence[bytes], requests: int, clients: int, seconds: list[float] | None = None) -> int:
    """How many answers were lost. seconds: gets the time of each other one."""
    numbers, lock, lost = iter(range(requests)), threading.Lock(), 0

    def client() -> None:
        nonlocal lost
        connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            began, status = time.perf_counter(), 0
            try:
                body, headers = contents[number % len(contents)], {"Content-Type": "image/jpeg"}
                connection.request("POST", "/detect?threshold=0.05", body, headers)
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, HTTPException):
                connection.close()  # the next request opens it again
            with lock:
                if status != 200:
                    lost += 1
                elif seconds is not None:
                    seconds.append(time.perf_counter() - began)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return lost


def held(process: int) -> float:
    """MiB of memory that a process holds."""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmRSS:")[2].split()[0]) / 2**10
