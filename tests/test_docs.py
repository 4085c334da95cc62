"""The documentation: every block of code is composed, parsed or run; links, paths and quoted messages lead somewhere."""

import argparse
import ast
import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hydra
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from torch.distributed.run import get_args_parser

from detr.config import build_model, compose
from detr.config.overrides import as_hydra_reads
from detr.errors import UserError
from detr.folders import CONFIGS
from tests.helpers.commands import REPOSITORY, TINY_MODEL, save_untrained

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = {f"{name}.py": name for name in ("train", "evaluate", "predict", "export")}
# Options of tools that are options of a command too, and of which one.
OVERRIDES = {"check_data.py": "train", "samples.py": "train", "convert_data.py": "convert_data"}
# What no rule below can check, and why that is fine.
LISTED = {
    ("python", "-m", "venv", ".venv"): "Python's own",
    ("source", ".venv/bin/activate"): "Python's own",
    ("mkdocs", "serve"): "needs the extra docs; make docs builds the same site",
    ("python", "docs/deploy/detect.py", "exported/model.onnx", "photo.jpg"): "tests/test_export.py runs it",
    ("docker", "build", "-t", "detr", "."): "needs docker",
    ("export", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"): "tests/engine/test_processes.py has what happens without it",
}
LANGUAGES_OF_OTHERS = {"nginx"}
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOTLESS = {"experiment=overfit": ("data.train.images=DIR", "data.train.annotations=FILE")}
PLACEHOLDER = re.compile("DIR|NAME|PATH|FILE|SAME|RUN|OUTPUT|OTHER|OWNER|URL")


class Block(NamedTuple):
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S))
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.M)), f"{page}: a block is not closed"
    return [Block(page, text[: one.start()].count("\n") + 1, one[2], textwrap.dedent(one[3])) for one in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def without_blocks(page: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)


@pytest.fixture(scope="module")
def detector_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what blocks of Python read: best.pt, of a model that is sure of what it finds, and photographs."""
    folder = tmp_path_factory.mktemp("files")
    options = [*TINY_MODEL, "data.size=48", "data.max_size=64"]
    model = build_model(compose(options).model, num_classes=2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    [bias] = [value for name, value in state.items() if name.endswith("class_head.bias")]
    bias[0] = 9.0
    save_untrained(folder / "best.pt", options, ["cat", "dog"], model=state)
    for name in ("a.jpg", "b.jpg", "generated/shapes/val/000000.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((61, 47), 60).convert("RGB").save(folder / name)
    (folder / "runs" / "quickstart" / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "best.pt", folder / "runs" / "quickstart" / "checkpoints" / "best.pt")
    return folder


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """Writes the files that blocks of a page give by a name in their first line, and lets Python find them."""
    before = set(sys.modules)

    def write(page: Path) -> Path:
        for block in blocks_of(page):
            if name := file_of(block):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(block.text)
        return tmp_path

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def file_of(block: Block) -> str | None:
    found = re.match(r"# ([\w/]+\.(?:py|yaml))\n", block.text)
    return found[1] if found else None


@pytest.mark.parametrize("block", BLOCKS, ids=[block.place for block in BLOCKS])
def test_a_block(
    block: Block,
    page_folder: Callable[[Path], Path],
    detector_files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if block.language == "bash":
        folder = page_folder(block.page)
        for words in commands_of(block):
            check_command(words, folder, block.page)
    elif block.language == "python":
        page_folder(block.page)
        monkeypatch.chdir(detector_files)
        run_python(block)
    elif block.language == "yaml":
        assert file_of(block), "a block of YAML begins with the name of its file; a command then composes it"
        assert yaml.safe_load(block.text)
    elif block.language == "json":
        assert json.loads(block.text)
    else:
        assert block.language in LANGUAGES_OF_OTHERS, f"{block.place}: no rule covers {block.language!r}"


def commands_of(block: Block) -> Iterator[list[str]]:
    """Each command as its words, without variables of the environment before it."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


def check_command(words: Sequence[str], folder: Path, page: Path) -> str:
    """How it was checked. Fails where it is wrong, and where no rule covers it."""
    program, rest = words[0], list(words[1:])
    if tuple(words) in LISTED:
        return "listed"
    if program == "python" and Path(rest[0]).name in COMMANDS:
        compose_command(rest, folder)
        return "composed"
    if program == "python" and (REPOSITORY / rest[0]).is_file():
        parse_tool(rest)
        return "parsed"
    if program == "torchrun":
        given = get_args_parser().parse_args(rest)
        compose_command([given.training_script, *given.training_script_args], folder)
        assert any(option.startswith("run_dir=") for option in given.training_script_args)
        return "composed"
    if program == "docker":
        start = rest.index("detr")
        assert rest[0] == "run"
        compose_command(rest[start + 1 :], folder)
        return "composed"
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
        assert rest and targets.issuperset(rest), words
        return "parsed"
    if program == "pip":
        [extras] = re.fullmatch(r"install -e \.(?:\[([\w,]+)\])?", " ".join(rest)).groups()  # type: ignore[union-attr]
        assert project()["optional-dependencies"].keys() >= set((extras or "test").split(",")), words
        return "parsed"
    if program == "curl":
        assert page == DOCS / "serving.md", "tests/tools/test_serve.py runs those of docs/serving.md"
        return "run elsewhere"
    raise AssertionError(f"no rule covers {shlex.join(words)}")


def compose_command(words: Sequence[str], folder: Path) -> None:
    """Compose the configuration of a command, with every value of a sweep."""
    script, *options = words
    sweeps = "-m" in options
    options = [option for option in options if option != "-m"]
    own = []
    if "--cfg" in options:
        place = options.index("--cfg")
        assert options[place : place + 2] == ["--cfg", "job"]
        del options[place : place + 2]
    if "--config-dir" in options:
        place = options.index("--config-dir")
        own.append(f"hydra.searchpath=[file://{folder / options[place + 1]}]")
        del options[place : place + 2]
    assert all("=" in option or option.startswith("~") for option in options), options
    launcher = tuple(option for option in options if option.startswith("hydra"))
    if launcher:
        compose_launcher(launcher)
    values = [choices(option) for option in options if option not in launcher]
    assert sweeps or all(len(one) == 1 for one in values), f"a sweep needs -m: {words}"
    first = [one[0] for one in values]
    name = COMMANDS[Path(script).name]
    checked(name, *own, *first)
    for place, one in enumerate(values):
        for other in one[1:]:
            checked(name, *own, *first[:place], other, *first[place + 1 :])


def choices(option: str) -> list[str]:
    parsed = OverridesParser.create().parse_override(as_hydra_reads(option))
    if not parsed.is_sweep_override():
        return [option]
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


@functools.cache
def checked(name: str, *options: str) -> None:
    compose(options, name)


@functools.cache
def compose_launcher(options: tuple[str, ...]) -> None:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra.compose("train", overrides=list(options), return_hydra_config=True)


class Parsed(BaseException):
    """The end of a tool, once its command line is understood."""


def parse_tool(words: Sequence[str]) -> None:
    """Let a tool parse its command line, and stop it there; compose what of it are options of a command."""
    script = words[0]
    given: list[argparse.Namespace] = []

    def stopping(parse: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
        def parse_and_stop(self: argparse.ArgumentParser, *arguments: Any) -> argparse.Namespace:
            given.append(parse(self, *arguments))
            raise Parsed

        return parse_and_stop

    parser = argparse.ArgumentParser
    with (
        mock.patch.object(parser, "parse_args", stopping(parser.parse_args)),
        mock.patch.object(parser, "parse_intermixed_args", stopping(parser.parse_intermixed_args)),
        mock.patch.object(sys, "argv", list(words)),
        mock.patch.object(sys, "path", [*sys.path]),
        pytest.raises(Parsed),
    ):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    if name := OVERRIDES.get(Path(script).name):
        checked(name, *given[0].overrides)


def run_python(block: Block) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), torch.random.fork_rng(devices=[]):
        exec(compile(block.text, block.place, "exec"), {"__name__": "block"})
    if "print(" in block.text and not file_of(block):
        assert output.getvalue(), f"{block.place} printed nothing"


WRITTEN = [page for page in PAGES if page.name != "messages.md"]  # that one lists what is in the code


@pytest.mark.parametrize("page", WRITTEN, ids=[str(page.relative_to(REPOSITORY)) for page in WRITTEN])
def test_options_within_the_text_compose(page: Path) -> None:
    """Those of train.py, with the others of the same code."""
    value = r"(?:\{[^}|]*\}|\[[^]|]*\]|[^\s,|'{\[]+)"
    group = r"(?:model|criterion|scheduler|data|experiment|logger)(?:/\w+)*=(?:\w+|\[[\w,]+\])"
    option = rf"(?:trainer|optimizer|data|model|criterion|scheduler|evaluation)\.[\w.]+={value}"
    seen: set[str] = set()
    for code in re.findall(r"`([^`\n]+)`", without_blocks(page)):
        own = re.findall(rf"(?<!\S)'?({group}|{option})'?(?!\S)", code)
        own = [option for option in own if not PLACEHOLDER.search(option.partition("=")[2])]
        if seen.issuperset(own):
            continue
        try:
            checked("train", "data.root=DIR", *ROOTLESS.get(own[0], ()), *own)
        except UserError as error:
            raise AssertionError(f"{page.name}: {code}: {error}") from error
        seen.update(own)
    if page == DOCS / "training.md":
        assert {"trainer.ema=0.9997", "optimizer.lr_factors={sampling_offsets:0.1}"} <= seen


@functools.cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert page.parent != DOCS or target.is_relative_to(DOCS), f"{link}: the site holds the pages of docs/ alone"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_paths_within_the_text_are_there(page: Path) -> None:
    for path in re.findall(r"`((?:tests|configs|detr|datasets|tools|benchmarks|docs)/[\w/.]*)`", page.read_text()):
        assert PLACEHOLDER.search(path) or (REPOSITORY / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert any(f"def {name}(" in file.read_text() for file in (REPOSITORY / "tests").rglob("*.py")), name


def test_the_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    cog = pytest.importorskip("cogapp", reason="cogapp, of the extra dev, makes the tables")
    monkeypatch.chdir(REPOSITORY)
    pages = [page for page in PAGES if "[[[cog" in page.read_text()]
    assert len(pages) == 6
    options = ["cog", "--check", "--diff", "-P", "-p", "from docs.tables import show"]
    assert cog.Cog().main([*options, *map(str, pages)]) == 0, "run make tables"


@pytest.mark.parametrize("page", [PAGES[0], DOCS / "results.md"], ids=lambda page: page.name)
def test_figures_come_from_the_results(page: Path) -> None:
    """What was measured stands in tables that are made of the file of results, and is not typed between them."""
    text = re.sub(r"<!-- \[\[\[cog.*?\[\[\[end\]\]\] -->", "", without_blocks(page), flags=re.S)
    text = re.sub(r"`[^`]*`", "", text)
    measured = r"\b0\.\d\d|\d ?(?:MiB|GiB|images/s)\b|\d times (?:as|less|more)"
    assert not re.findall(measured, text)


def test_messages_are_quoted_as_they_are() -> None:
    known = messages()
    text = (DOCS / "troubleshooting.md").read_text()
    tables = re.findall(r"^\| message .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    rows = [row for table in tables for row in table.splitlines()]
    quotes = [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows]  # type: ignore[index]
    quotes += [*re.findall(r"[Tt]he message `([^`]+)`", text), "so AP is -1", "No score reaches threshold"]
    for quote in quotes:
        parts = [re.escape(part) for part in quote.split("...")]
        pattern = re.compile(".*?".join(parts), re.S)
        assert any(pattern.search(message) for message in known), quote


@functools.cache
def messages() -> tuple[str, ...]:
    """All texts of the code, with … in the place of what they fill in."""
    texts = []
    files = [file for folder in ("detr", "datasets", "tools") for file in (REPOSITORY / folder).rglob("*.py")]
    for file in [*files, *REPOSITORY.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


@functools.cache
def project() -> Any:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_readme_is_short_and_its_badges_true() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 150
    assert (DOCS / "images" / "detections.jpg").stat().st_size < 200_000
    assert f"Python {project()['requires-python'].removeprefix('>=')} or newer" in text
    assert f"License: {project()['license']}" in text


def test_the_site_has_all_pages() -> None:
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    listed = [path for entry in site["nav"] for path in entry.values()]
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_reference_names_what_is_there() -> None:
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M):
        module, _, attribute = name.rpartition(".")
        assert getattr(__import__(module, fromlist=[attribute]), attribute).__doc__, name
