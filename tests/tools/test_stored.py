"""Configurations from files of others: read as plain values, with limits."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from yaml import YAMLError

from detr.config import build_stored_model, compose, plain
from detr.errors import UserError
from tests.helpers.commands import REPOSITORY
from tools.stored import read_config


@pytest.mark.parametrize("experiment", ["quickstart", "dino_r50_coco_12e", "attention_sweep"])
def test_what_train_writes_is_read_as_it_was(experiment: str, tmp_path: Path) -> None:
    config = compose([f"experiment={experiment}", "data.root=on", "optimizer.lr=1e-7", "run_dir='2024-01-01'"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    assert read_config(tmp_path / "config.yaml") == plain(config)


def test_interpolations_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "xyzzy")
    (tmp_path / "config.yaml").write_text("a: ${oc.env:SECRET}\nb: ${a}\n")
    assert read_config(tmp_path / "config.yaml") == {"a": "${oc.env:SECRET}", "b": "${a}"}


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "content, reason",
    [
        (BOMB, "alias"),
        ("a: &a {b: *a}\n", "alias"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "alias"),
        ("[" * 51, "nested"),
        ("[" * 10**5, "nested"),
        ("{a: " * 10**4, "nested"),
        ("a: !!python/object/apply:os.system ['false']\n", "could not determine a constructor"),
        ("a: [\n", "expected"),
    ],
)
def test_what_train_never_writes_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(YAMLError, match=reason):
        read_config(tmp_path / "config.yaml")


def test_large_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("#" * 2**18 + "\n")
    with pytest.raises(UserError, match=r"config\.yaml has 262145 bytes, wanted at most 262144"):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("config", ["x", 3, None, [1], {}, {"_target_": "torch.nn.Identity"}])
def test_a_model_that_is_none_is_refused_with_its_file(config: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}: model"):
        build_stored_model(config, 3, tmp_path, [])


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "small"])
def test_models_of_version_1_are_built(name: str, tmp_path: Path) -> None:
    """With the parameters that they had then."""
    recorded = json.loads((REPOSITORY / "tests" / "weights" / "version1" / f"{name}.json").read_text())
    model = build_stored_model(recorded["config"], 3, tmp_path, [])
    assert sorted(map(list, (tensor.shape for tensor in model.state_dict().values()))) == sorted(
        recorded["tensors"].values()
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.pop("position"),
        lambda model: model.pop("transformer"),
        lambda model: model.update(transformer=3),
        lambda model: model["transformer"].update(encoder_attention="x"),
        lambda model: model["transformer"].update(_target_="mine.Transformer"),
        lambda model: model["position"].update(unknown=3),
    ],
)
def test_advice_on_moved_options_is_not_given_for_files(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    model = json.loads((REPOSITORY / "tests" / "weights" / "version1" / "detr.json").read_text())["config"]
    change(model)
    with pytest.raises(UserError, match=f"^{tmp_path}") as caught:
        build_stored_model(model, 3, tmp_path, [])
    assert "has moved" not in str(caught.value)


def test_tools_know_nothing_of_benchmarks() -> None:
    for path in (REPOSITORY / "tools").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            assert not [name for name in names if name.partition(".")[0] == "benchmarks"], path
