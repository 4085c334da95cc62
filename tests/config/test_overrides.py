"""The command line takes any path, with or without what Hydra's grammar is made of."""

from pathlib import Path

import pytest

from detr.config import compose
from detr.config.overrides import as_hydra_reads
from detr.errors import UserError


@pytest.mark.parametrize(
    "path",
    [
        "/data/my photos (1)/x",
        "/data/a=b",
        "/data/Größe",
        "写真",
        "/data/it's",
        '/data/"x"',
        "/data/photo [1].jpg",
        "/data/{a}",
        "/data/a#b;c",
        "C:\\x y\\",
        "/data/\\' (",
        "/plain/path.json",
        " leading and trailing ",
    ],
)
def test_any_path_is_taken_as_it_is(path: str) -> None:
    assert compose([f"data.root={path}"]).data.root == path.strip()


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a b"))
    config = compose(["data.root=~/x", "run_dir=~", "weights=/tmp/~x", "~model/denoising"])
    assert (config.data.root, config.run_dir, config.weights) == (f"{tmp_path}/a b/x", f"{tmp_path}/a b", "/tmp/~x")


def test_lists_mappings_and_quoted_texts_stay_hydras() -> None:
    for override in (
        "data.transforms.sizes=[1,2]",
        "trainer.freeze={backbone:5}",
        "data.root='a, b'",
        "a=[1",
        "seed=1,2",
    ):
        assert as_hydra_reads(override) == override


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "There is no option epochs. Did you mean trainer.epochs?"),
        ("batchsize=3", "There is no option batchsize. Did you mean data.batch_size?"),
        ("seed", "'seed' has no value. Write seed=VALUE."),
        ("data.root=[a] b", """quote it: "data.root='[a] b'"."""),
        ("data.root=a,b", """"data.root='a,b'" for one text with a comma, or add -m"""),
        ("optimizer=sgd", "Could not find 'optimizer/sgd' Available options in 'optimizer': adamw"),
    ],
)
def test_what_is_wrong_is_explained(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([override])
    assert message in f"{caught.value}." and "hydra.cc" not in str(caught.value)
