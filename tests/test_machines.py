"""Two machines, as name spaces of the network on this one, and a cable between them that is cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY, checksum

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode == 0


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two name spaces with one cable between them."""
    names = [f"detr{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None or not ip("netns", "add", names[0]):
        pytest.skip("needs the command ip and the right to make name spaces of the network")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
            assert ip("-n", name, "link", "set", f"cable{number}", "up") and ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


class Machines:
    """The same command on each machine, as docs/training.md has it."""

    def __init__(self, names: list[str], options: list[str], folder: Path) -> None:
        folder.mkdir()
        self.outputs = [folder / f"{number}.txt" for number in (0, 1)]
        self.processes = []
        for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
            torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:29500", "--rdzv_id=test"]
            # What a machine's name says elsewhere: these have the name and the files of this one.
            torchrun += [f"--local_addr={address}", f"--rdzv_conf=is_host={int(number == 0)}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{number}"}
            with self.outputs[number].open("w") as output:
                command = ["ip", "netns", "exec", name, *torchrun, "train.py", *options]
                self.processes.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
                )

    def said(self) -> list[str]:
        return [output.read_text() for output in self.outputs]

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def end(self) -> list[int]:
        return [process.wait(timeout=300) for process in self.processes]


def test_a_cable_that_is_cut_ends_both_and_the_training_goes_on(
    machines: list[str], tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, "data.batch_size=2", "log_every=1", "trainer.max_steps=40", "trainer.save_every_steps=1"]
    options += ["trainer.evaluate_every=100", "trainer.resume=auto", "trainer.timeout=0.25"]
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    both = Machines(machines, [*options, f"run_dir={folder}"], tmp_path / "cut")
    both.wait(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    ip("-n", machines[0], "link", "set", "cable0", "down")
    both.wait(lambda: all("waited in vain for another one" in text for text in both.said()))
    print(*both.said(), sep="\n=====\n")
    assert both.processes[0].wait(timeout=60)
    both.processes[1].kill()  # torchrun itself, which would wait for the network as long as TCP does
    assert (folder / "checkpoints" / "last.pt").exists()

    ip("-n", machines[0], "link", "set", "cable0", "up")
    again = Machines(machines, [*options, f"run_dir={folder}"], tmp_path / "again")
    assert again.end() == [0, 0], again.said()
    assert "Going on from" in (folder / "train.log").read_text()

    straight = Machines(machines, [*options, f"run_dir={tmp_path / 'straight'}"], tmp_path / "whole")
    assert straight.end() == [0, 0], straight.said()
    last = [tmp_path / run / "checkpoints" / "last.pt" for run in ("run", "straight")]
    assert checksum(last[0]) == checksum(last[1])
