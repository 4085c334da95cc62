"""The commands, run as a user runs them."""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from detr.config import build_model, compose, plain
from detr.weights import read_checkpoint, save

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_MODEL = (
    "model/backbone=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=batch",
    "model.backbone.freeze=[]",
    "model.num_queries=7",
    "model.encoder.d_model=32",
    "model.encoder.nhead=4",
    "model.encoder.num_layers=1",
    "model.decoder.num_layers=2",
    "model.encoder.dim_feedforward=32",
)
# Takes milliseconds for a step; needs allow_targets=[tests].
TINIEST_MODEL = (
    "model=small",
    "~model.backbone",
    "+model.backbone={_target_: tests.helpers.TinyBackbone}",
    "model.num_queries=5",
    "model.encoder.d_model=32",
    "model.encoder.nhead=2",
    "model.encoder.num_layers=1",
    "model.encoder.dim_feedforward=16",
    "model.decoder.num_layers=1",
)


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str

    @property
    def message(self) -> str:
        """The error message alone, or the last warning where there is no error."""
        found = re.findall(r"^(?:Error:|\[.*\]\[HYDRA\]|.* ERROR:) (.*)$", self.output, re.M)
        found = found or re.findall(r"^.* WARNING: (.*)$", self.output, re.M)
        return found[-1] if found else (self.output.strip().splitlines() or [""])[-1]


def run(script: str, *overrides: str) -> Outcome:
    """Run a command in this process, with nothing left behind in it."""
    output = io.StringIO()
    root, hydra = logging.getLogger(), HydraConfig.instance()
    handlers, level, composed, folder = root.handlers[:], root.level, hydra.cfg, Path.cwd()
    root.handlers.clear()
    GlobalHydra.instance().clear()
    os.chdir(REPOSITORY)
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", [script, *overrides]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:  # noqa: BLE001 - as the interpreter would
            traceback.print_exc()
            code = 1
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
            GlobalHydra.instance().clear()
            hydra.cfg = composed
            os.chdir(folder)
    return Outcome(code, output.getvalue())


def run_process(script: str, *overrides: str) -> Outcome:
    """Run a command as a user does."""
    done = subprocess.run(
        [sys.executable, script, *overrides], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    return Outcome(done.returncode, done.stdout + done.stderr)


def save_untrained(path: Path, overrides: Sequence[str], names: Sequence[str], *, first: int = 1, **more: Any) -> Path:
    """A checkpoint as train.py writes it, of an untrained model.

    overrides: its configuration. names: of its classes, whose ids count from `first`. more: further content.
    """
    torch.manual_seed(0)
    config = compose(overrides)
    content = {
        "config": plain(config),
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=first)],
        "model": build_model(config.model, num_classes=len(names)).state_dict(),
        "training": {},
        **more,
    }
    save(path, content)
    return path


def predict(checkpoint: Path, source: Path | str, output: Path, *more: str) -> Outcome:
    """Run predict.py with everything that was found."""
    options = [f"checkpoint={checkpoint}", f"source='{source}'", f"output='{output}'", "threshold=0", "device=cpu"]
    return run("predict.py", *options, f"run_dir={output.parent / 'log'}", *more)


def figures(run_dir: Path) -> dict[str, Any]:
    """What an evaluation found, without what it was of."""
    content = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    return {name: value for name, value in content.items() if name != "data"}


def checksum(path: Path) -> str:
    """Of the weights in a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in read_checkpoint(path).state.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
