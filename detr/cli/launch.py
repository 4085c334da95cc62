"""The installed commands run the scripts of a checkout: detr-train is train.py, detr-serve is tools/serve.py."""

import os
import runpy
import sys
from pathlib import Path

from detr.folders import ROOT


def main() -> None:
    """Run the script that the command is named after."""
    name = Path(sys.argv[0]).stem.removeprefix("detr-").replace("-", "_")
    # First, since the environment may hold another library that is called `datasets`. The variable is for the processes
    # that a sweep starts.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = next(path for path in (ROOT / f"{name}.py", ROOT / "tools" / f"{name}.py") if path.is_file())
    runpy.run_path(str(script), run_name="__main__")
