"""A release that changes training has to say so: which curves differ, and what the changelog names."""

import subprocess
import sys
from pathlib import Path

import pytest

from detr.errors import UserError
from tests.helpers.commands import REPOSITORY
from tools import release_check

CHANGELOG = """# Changelog

## Unreleased

### Changes training

- A norm has another epsilon (curves: small, attention
  se).

### Fixed

- bf16.

## 1.0.0

### Changes training

- Curve: dino.
"""


def test_curves_are_to_be_named_under_the_heading_of_the_first_section() -> None:
    changed = ["small", "attention se", "bf16", "dino", "attention s"]
    assert release_check.unnamed(changed, CHANGELOG) == ["bf16", "dino", "attention s"]
    assert release_check.unnamed(["small"], CHANGELOG.replace("### Changes training", "### Changed", 1)) == ["small"]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as it is committed, under a tag of its own."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, check=False).returncode:
        pytest.skip("this is no git repository")
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(REPOSITORY), str(folder)], check=True)
    monkeypatch.chdir(folder)
    for name in ("user.name", "user.email"):
        release_check.git("config", name, "tests")
    release_check.git("tag", "v0.9", "-m", "tests")
    return folder


def commit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    release_check.git("commit", "--quiet", "--all", "--message", "tests: change")


def test_what_is_not_committed_is_refused(clone: Path) -> None:
    (clone / "README.md").write_text("other")
    with pytest.raises(UserError, match="not committed"):
        release_check.main([])


@pytest.mark.slow
def test_a_change_of_training_is_refused_until_the_changelog_names_it(clone: Path) -> None:
    command = [sys.executable, "tools/release_check.py", "--only", "small", "last layer only"]

    def check() -> tuple[int, str]:
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert check() == (0, "Running 2 curves of v0.9 and of HEAD.\n2 are equal bit by bit; changed: none.\n")
    commit(clone / "configs/criterion/set.yaml", "weight: 5.0", "weight: 4.0")
    code, output = check()
    assert code == 2 and "changed: last layer only." in output and "not named: last layer only. Say what" in output
    commit(clone / "CHANGELOG.md", "### Changes training", "### Changes training\n\n- L1 weighs 4 (last layer only).")
    assert check()[0] == 0
    assert release_check.git("worktree", "list").count("\n") == 0
