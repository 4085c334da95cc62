"""Two machines, as name spaces of the network on this one, and a cable between them that is cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.test_commands import checksum

# After the cable is cut, torchrun itself waits some minutes for its counterpart.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PATIENCE = 900
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


def start(machines: list[str], options: list[str]) -> list[subprocess.Popen[str]]:
    """The same command on each machine, as the README has it."""
    started = []
    for number, (name, address) in enumerate(zip(machines, ADDRESSES, strict=True)):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:29500", "--rdzv_id=test"]
        # Both have this machine's name, by which they would not find each other.
        torchrun += [f"--local_addr={address}", f"--rdzv_conf=is_host={int(number == 0)}", "train.py", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{number}"}
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *torchrun],
                cwd=REPOSITORY,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def test_a_cable_that_is_cut_ends_both_and_the_training_goes_on(
    machines: list[str], tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, "data.batch_size=2", "log_every=1", "trainer.max_steps=40", "trainer.save_every_steps=1"]
    options += ["trainer.evaluate_every=100", "trainer.resume=auto", "trainer.timeout=0.25"]
    folder = tmp_path / "run"
    both = start(machines, [*options, f"run_dir={folder}"])
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert all(machine.poll() is None for machine in both), [machine.communicate()[0] for machine in both]
        time.sleep(0.02)
    ip("-n", machines[0], "link", "set", "cable0", "down")
    said = [machine.communicate(timeout=PATIENCE)[0] for machine in both]
    print(*said, sep="\n=====\n")
    assert all(machine.returncode for machine in both)
    assert all("waited in vain for another one" in text for text in said)
    assert (folder / "checkpoints" / "last.pt").exists()

    ip("-n", machines[0], "link", "set", "cable0", "up")
    both = start(machines, [*options, f"run_dir={folder}"])
    said = [machine.communicate(timeout=PATIENCE)[0] for machine in both]
    assert all(machine.returncode == 0 for machine in both), said
    assert "Going on from" in (folder / "train.log").read_text()

    straight = start(machines, [*options, f"run_dir={tmp_path / 'straight'}"])
    said = [machine.communicate(timeout=PATIENCE)[0] for machine in straight]
    assert all(machine.returncode == 0 for machine in straight), said
    last = [tmp_path / run / "checkpoints" / "last.pt" for run in ("run", "straight")]
    assert checksum(last[0]) == checksum(last[1])
