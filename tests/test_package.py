"""What is installed: the files of the package, and its commands in an environment of their own."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import detr
from tests.helpers.commands import REPOSITORY, TINY_MODEL

BESIDE = ("configs", "datasets", "tools")  # of detr/ in a checkout, and inside of it when installed
COMMANDS = ("train", "evaluate", "predict", "export")
KINDS = {".py", ".yaml", ".j2", ".html", ".css", ".js", ".svg"}
tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
setuptools = pytest.importorskip("setuptools", minversion="77", reason="builds the package without the network")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, in which a build leaves its files."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    names = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff")
    for name in (*names, *(f"{command}.py" for command in COMMANDS)):
        copy.mkdir(exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy)
    for name in ("detr", *BESIDE, "tests", "docs", "benchmarks"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(sources: Path, kind: str, folder: Path) -> Path:
    """A 'wheel' or an 'sdist', as pip and build make them."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(sources, "wheel", tmp_path_factory.mktemp("wheel"))


def relative(folder: Path) -> set[str]:
    """The files of a folder of the checkout that a program reads."""
    files = (path for path in (REPOSITORY / folder).rglob("*") if path.is_file() and path.suffix in KINDS)
    return {path.relative_to(REPOSITORY).as_posix() for path in files}


def test_the_wheel_holds_all_that_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    moved = {name for folder in BESIDE for name in relative(Path(folder))} | {f"{name}.py" for name in COMMANDS}
    assert names == relative(Path("detr")) | {f"detr/commands/{name}" for name in moved}
    assert wheel.stat().st_size < 2**20


def test_the_package_has_its_names() -> None:
    assert all(getattr(detr, name) is not None for name in detr.__all__)
    assert set(detr.__all__) <= set(dir(detr)) and detr.Detector.__module__ == "detr.detector"
    with pytest.raises(AttributeError, match="'detr' has no attribute 'Detecter'"):
        detr.Detecter  # noqa: B018 - to look it up is the test


def test_each_command_has_its_script() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for command, target in project["scripts"].items():
        script = f"{command.removeprefix('detr-').replace('-', '_')}.py"
        assert (REPOSITORY / script).is_file() != (REPOSITORY / "tools" / script).is_file()
        assert target == "detr.cli.launch:main"
    tools = {path.name for path in (REPOSITORY / "tools").glob("*.py") if "__main__" in path.read_text()}
    installed = {f"{name.removeprefix('detr-').replace('-', '_')}.py" for name in project["scripts"]}
    assert tools - {"release_check.py"} | {f"{name}.py" for name in COMMANDS} == installed  # that one is for a checkout


def test_the_source_distribution_builds_the_same_wheel(sources: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build(sources, "sdist", tmp_path / "sdist")
    assert archive.stat().st_size < 4 * 2**20
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "tests" / "golden" / "curves.json").is_file() and (unpacked / "docs").is_dir()
    again = build(unpacked, "wheel", tmp_path / "again")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and another library called `datasets`; the rest is that of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", f"--python={folder / 'bin' / 'python'}", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True, capture_output=True, text=True)
    (packages / "datasets.py").write_text("raise ImportError('the wrong datasets')\n")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder


def run(environment: Path, folder: Path, command: Sequence[str], expect: int = 0) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


SHAPES = ("data.prepare.train_images=16", "data.prepare.val_images=4", "data.batch_size=4", "data.workers=1")
SHORT = (*TINY_MODEL, *SHAPES, "trainer.max_steps=2", "device=cpu", "run_dir=run")


@pytest.mark.slow
def test_installed_commands_work_in_any_folder(environment: Path, tmp_path: Path) -> None:
    run(environment, tmp_path, ["detr-train", "experiment=quickstart", *SHORT])
    assert (tmp_path / "generated" / "shapes" / "instances_train.json").is_file(), "beside the user, as from a checkout"
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    run(environment, tmp_path, ["detr-evaluate", f"checkpoint={best}", "run_dir=evaluated", "device=cpu"])
    assert (tmp_path / "evaluated" / "evaluation" / "metrics.json").is_file()
    run(environment, tmp_path, ["detr-predict", f"checkpoint={best}", "source=generated/shapes/val", "run_dir=found"])
    assert (tmp_path / "found" / "results.json").is_file()
    for command in ("detr-check-data", "detr-serve"):
        assert "usage: " in run(environment, tmp_path, [command, "--help"])
    assert "Usage: detr-export checkpoint=" in run(environment, tmp_path, ["detr-export", "--help"])
    message = run(environment, tmp_path, ["detr-train", "trainer.epoch=1"], expect=2)
    assert "trainer.epochs" in message and "Traceback" not in message
    location = "import detr; print(detr.__file__)"
    assert Path(run(environment, tmp_path, ["python", "-c", location]).strip()).is_relative_to(environment)


@pytest.mark.slow
def test_installed_commands_run_under_torchrun(environment: Path, tmp_path: Path) -> None:
    torchrun = [
        str(environment / "bin" / "python"),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    ]
    run(environment, tmp_path, [*torchrun, "--no-python", "detr-train", *SHORT])
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


@pytest.mark.slow
def test_configurations_from_python_beside_another_datasets(environment: Path, tmp_path: Path) -> None:
    python = str(environment / "bin" / "python")
    code = "from detr.config import compose; compose(['model=small']); from datasets import DetectionDataset"
    run(environment, tmp_path, [python, "-c", code])
    code = "import sys, types; sys.modules['datasets'] = types.ModuleType('datasets'); import detr.config as c; c.compose()"
    assert "another library of that name" in run(environment, tmp_path, [python, "-c", code], expect=1)


def test_project_files_agree() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pages = list((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(pages) == 3 and all(yaml.safe_load(page.read_text()) for page in pages)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["license"] == project["license"] and citation["keywords"] == project["keywords"]
    named = re.findall(r":: (3\.\d+)", "\n".join(project["classifiers"]))
    assert project["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize("name", ["Dockerfile", "tools/serving/Dockerfile"])
def test_an_image_has_what_its_installation_reads(name: str, tmp_path: Path) -> None:
    """What is copied before the installation is enough to build the package's description, without this checkout."""
    lines = (REPOSITORY / name).read_text().splitlines()
    before = lines[: next(n for n, line in enumerate(lines) if line.startswith("RUN") and "-e " in line)]
    for line in before:
        words = [word for word in line.split() if not word.startswith("--")]
        if words[:1] == ["COPY"]:
            target = tmp_path / words[-1]
            target.mkdir(parents=True, exist_ok=True)
            for source in words[1:-1]:
                shutil.copy(REPOSITORY / source, target)
    site = Path(setuptools.__file__).parents[1]
    # -S: without the editable installation of this checkout.
    command = f"import sys; sys.path.append({str(site)!r}); sys.argv[1:] = ['--version']; exec(open('setup.py').read())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == detr.__version__, done.stderr


def test_the_image_of_the_server_composes_configurations() -> None:
    """Published checkpoints bring theirs by name, which names readers of `datasets`."""
    lines = (REPOSITORY / "tools" / "serving" / "Dockerfile").read_text().splitlines()
    assert {"COPY detr detr", "COPY configs configs", "COPY datasets datasets", "COPY tools tools"} <= set(lines)
