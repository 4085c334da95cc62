"""Refuse a release that changes training without saying so: python tools/release_check.py

Runs the golden curves of the last tag and of HEAD here, one after the other, so that the processor is the same. Every
curve that differs in any bit has to be named under "Changes training" in the first section of CHANGELOG.md.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detr.cli.exit_codes import exit_codes
from detr.errors import UserError

HEADING = "### Changes training"
CURVES = "tests/golden/curves.json"
Curves = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", metavar="TAG", help="another revision than the last tag")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="some of the curves")
    options = parser.parse_args(arguments)
    if git("status", "--porcelain"):
        raise UserError("There are changes that are not committed. Commit them: a release is made of a commit.")
    since = options.since or last_tag()
    cases = [
        case
        for case in json.loads(git("show", f"{since}:{CURVES}"))
        if case in json.loads(git("show", f"HEAD:{CURVES}"))
    ]
    cases = [case for case in cases if options.only is None or case in options.only]
    if not cases:
        raise UserError(f"--only: {since} and HEAD have no such curve in common. See {CURVES} for their names.")
    print(f"Running {len(cases)} curves of {since} and of HEAD.", flush=True)
    before, now = (curves(revision, cases) for revision in (since, "HEAD"))
    changed = [case for case in cases if before[case] != now[case]]
    silent = unnamed(changed, git("show", "HEAD:CHANGELOG.md"))
    print(f"{len(cases) - len(changed)} are equal bit by bit; changed: {', '.join(changed) or 'none'}.")
    if silent:
        raise UserError(
            f'CHANGELOG.md: wanted every changed curve named under "{HEADING}" of its first section; not named: '
            f"{', '.join(silent)}. Say what changes and why, or undo the change."
        )


def last_tag() -> str:
    try:
        return git("describe", "--tags", "--abbrev=0")
    except subprocess.CalledProcessError:
        raise UserError("There is no tag before HEAD. Name a revision to compare with: --since REVISION.") from None


def curves(revision: str, cases: Sequence[str]) -> Curves:
    """What the code of a revision computes here."""
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            command = [sys.executable, "tests/golden/curves.py", "--renew", "--only", *cases]
            subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
            return json.loads((tree / CURVES).read_text())
        finally:
            git("worktree", "remove", "--force", str(tree))


def unnamed(changed: Sequence[str], changelog: str) -> list[str]:
    """The curves that the first section of a changelog does not name under the heading."""
    section = re.split(r"^## ", changelog, flags=re.M)[1]
    said = " ".join(section.partition(f"{HEADING}\n")[2].partition("\n### ")[0].split())
    return [case for case in changed if not re.search(rf"(?<!\w){re.escape(case)}(?!\w)", said)]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    with exit_codes():
        main()
