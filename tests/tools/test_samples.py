"""Samples drawn before a training are those that it learns from."""

from pathlib import Path

import pytest
from PIL import Image

from datasets import DetectionDataset
from detr.errors import UserError
from tools import samples


def options(root: Path) -> list[str]:
    return [f"data.root={root}", "data.prepare=null", "data.size=48", "data.batch_size=5", "data/mixing=[mosaic,mixup]"]


@pytest.mark.parametrize(("epoch", "size"), [(1, 48), (2, 40)])
def test_sixteen_samples_of_an_epoch(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, size: int
) -> None:
    read, asked = DetectionDataset.__getitem__, []

    def watched(dataset: DetectionDataset, key: tuple[int, int, None]) -> object:
        asked.append(key)
        return read(dataset, key)

    monkeypatch.setattr(DetectionDataset, "__getitem__", watched)
    schedule = ["trainer.epochs=3", "data.plain_after=0.6", "data.plain_transforms.sizes=[40]"]
    command = [*options(shapes_root), *schedule, "--epoch", str(epoch), "--output", str(tmp_path / "new")]
    samples.main(command)
    samples.main(command)  # which replaces its own picture
    assert {key[0] for key in asked} == {epoch} and len(asked) == 2 * 20
    with Image.open(tmp_path / "new" / "samples.jpg") as picture:
        # Four in a row, each enlarged to where names can be read, with a line of text above.
        side = size * -(-300 // size)
        assert picture.size == (4 * (side + 6) - 6, 4 * (side + 22 + 6) - 6)


def test_mistakes_are_refused(shapes_root: Path, tmp_path: Path) -> None:
    command = [*options(shapes_root), "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"no option data\.sise.*data\.size"):
        samples.main([*command, "data.sise=3"])
    with pytest.raises(SystemExit, match=r"^2$"):
        samples.main([*command, "--epoch", "-1"])
    (tmp_path / "samples.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"samples\.jpg .*--output DIR"):
        samples.main(command)
    assert (tmp_path / "samples.jpg").read_bytes() == b"mine"
