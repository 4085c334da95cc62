"""--help says what is true."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from detr.cli import help as pages
from detr.config import compose
from detr.folders import CONFIGS
from tests.helpers.commands import REPOSITORY, run, run_process

EXAMPLES = [(name, example) for name, page in pages.PAGES.items() for example in page.examples]


def default(name: str, option: str) -> str:
    """What the composed configuration has, as one would write it on the command line."""
    for entry in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["defaults"]:
        if isinstance(entry, dict) and entry.get(option) is not None:
            return entry[option]
    group, _, key = option.rpartition(".")
    config = compose(name=name)
    node = OmegaConf.select(config, group) if group else config
    assert isinstance(node, DictConfig) and key in node._content, f"{option} is no option"
    raw = node._get_node(key)._value()
    if isinstance(raw, list):
        return f"[{','.join(str(one._value()) for one in raw)}]"
    value = str(raw).replace("${now:%Y-%m-%d_%H-%M-%S}", pages.DATE).replace("${run_dir}", "run_dir")
    return {"???": pages.NEEDED, "None": "null", "True": "true", "False": "false"}.get(value, value)


@pytest.mark.parametrize("name", pages.PAGES)
def test_defaults_are_the_composed_ones(name: str) -> None:
    options = pages.PAGES[name].options
    assert len(options) == 10
    assert {option: shown for option, (shown, _) in options.items()} == {one: default(name, one) for one in options}


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_compose(name: str, example: str) -> None:
    compose(shlex.split(example), name=name)


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_page_shows_options_recipes_and_examples(name: str) -> None:
    done = run(f"{name}.py", "--help")
    assert done.code == 0 and done.output.startswith(pages.PAGES[name].about)
    assert f"Usage: python {name}.py " in done.output
    assert all(f"\n  {option} " in done.output for option in pages.PAGES[name].options)
    assert all(f"\n  python {name}.py {example}\n" in done.output for example in pages.PAGES[name].examples)
    assert max(map(len, done.output.replace(str(CONFIGS), "configs").splitlines())) <= 100
    recipes = [path.stem for path in (CONFIGS / "experiment").glob("*.yaml")]
    if name == "train":
        assert all(recipe in done.output for recipe in recipes)


@pytest.mark.parametrize("installed", [False, True], ids=["script", "installed"])
@pytest.mark.parametrize("name", pages.PAGES)
def test_it_imports_nothing_that_takes_seconds(name: str, installed: bool, tmp_path: Path) -> None:
    script = REPOSITORY / f"{name}.py"
    if installed:
        script = tmp_path / f"detr-{name}"
        script.write_text("from detr.cli.launch import main\nmain()\n")  # as pip writes it
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(script), "--help"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"Usage: {script.name if installed else f'python {name}.py'} " in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "detr" in imported
    assert imported.isdisjoint(
        {"torch", "torchvision", "numpy", "PIL", "pycocotools", "hydra", "omegaconf", "datasets"}
    )


def test_an_installed_command_is_named_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "/usr/local/bin/detr-train", "--help"])
    page = pages.help_page("train")
    assert "Usage: detr-train " in page and "python train.py" not in page
    assert "torchrun --nproc_per_node=8 --no-python detr-train " in page


def test_hydra_has_its_own_page() -> None:
    done = run_process("train.py", "--hydra-help")
    assert done.code == 0 and "--multirun" in done.output
