"""Which device a name stands for."""

import pytest
import torch

from detr import distributed
from detr.cli.devices import pick_device
from detr.errors import UserError


@pytest.mark.parametrize(
    ("count", "name", "device"),
    [(0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (2, "cuda:1", "cuda:1")],
)
def test_of_one_process(count: int, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert pick_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (0, "cuda", r"^device=cuda was asked for, but torch finds no CUDA devices\. Set device=cpu or device=auto\.$"),
        (2, "cuda:2", r"^device=cuda:2 was asked for, but torch finds 2 CUDA devices\."),
        (2, "toaster", r"^device: wanted auto, cpu, cuda, cuda:N or mps, got 'toaster'\.$"),
        (2, "mps", r"^device=mps was asked for, but torch finds no Apple GPU here\."),
        (2, "cuda:x", r"got 'cuda:x'"),
    ],
)
def test_what_cannot_be_had_is_refused(count: int, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=message):
        pick_device(name)


def test_each_of_several_processes_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "local_rank", lambda: 1)
    assert pick_device("auto") == torch.device("cuda:1") and chosen == [1]
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(distributed, "local_rank", lambda: 2)
    with pytest.raises(UserError, match=r"^This machine has 2 CUDA devices, too few for its process 2\."):
        pick_device("cuda")
