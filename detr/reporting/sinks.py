"""Places that a run's records go to. Each is switched on and off in the `logger` configuration."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from detr.files import read_regular
from detr.images import jpeg

logger = logging.getLogger(__name__)
_METRICS = "metrics.jsonl"
_MOST = 2**31  # bytes of metrics.jsonl that a run goes on with
_PIXELS = 300_000  # of a picture in TensorBoard and other trackers


@runtime_checkable
class Sink(Protocol):
    """What a place to log to has to offer. `start` comes first, `close` last, also after an error.

    One that raises OSError later than at its start is left out from then on.
    """

    def start(self, run_dir: Path, step: int, total_steps: int) -> None:
        """step: the steps that were done before, more than 0 where a run goes on."""

    def advance(self, losses: Mapping[str, float]) -> None:
        """After every training step, with its losses."""

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        """Averages since the last call, in the group 'train' or 'val'."""

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Validation images with what was found in them."""

    def close(self) -> None: ...


class Progress:
    """A progress bar where there is a terminal, and a short line in the log now and then: the rest is for the files."""

    def start(self, run_dir: Path, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._step, self._first, self._best = step, True, -math.inf
        self._shown: dict[str, str] = {}
        for _, row in _records(run_dir / _METRICS) if step else ():  # the run goes on: what it has found is shown
            if row["group"] == "val" and row["step"] <= step and isinstance(row.get("AP"), float):
                self._show(row["AP"])
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=None)

    def advance(self, losses: Mapping[str, float]) -> None:
        self._step += 1
        if self._first and "loss" in losses:  # the next line may take a while
            self._first = False
            logger.info("step %d/%d  loss %.4g", self._step, self._total, losses["loss"])
        self._bar.set_postfix({"loss": f"{losses.get('loss', math.nan):.4g}", **self._shown}, refresh=False)
        self._bar.update()

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        if group == "val":
            self._show(values["AP"])
            found = "  ".join(
                f"{name} {values[name]:.3f}" for name in ("AP", "AP50", "AP75", "AR100") if name in values
            )
            logger.info("step %d/%d  evaluated: %s", step, self._total, found)
            return
        self._shown["images/s"] = f"{values['images_per_second']:.3g}"
        shown = {"loss": f"{values.get('loss', math.nan):.4g}"}
        shown |= {name: self._shown[name] for name in ("AP", "images/s") if name in self._shown}
        left = tqdm.format_interval(60 * values["eta_minutes"])
        line = "  ".join(f"{name} {value}" for name, value in shown.items())
        logger.info("step %d/%d  %s  %s left", step, self._total, line, left)

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None: ...

    def close(self) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)

    def _show(self, average_precision: float) -> None:
        """The AP of an evaluation, from now on."""
        self._best = max(self._best, average_precision)
        self._shown["AP"] = f"{average_precision:.3f} (best {self._best:.3f})"


class JsonLines:
    """metrics.jsonl in the run's folder: one object a line, {"step", "group", values...}."""

    def start(self, run_dir: Path, step: int, total_steps: int) -> None:
        self._path, self._begun = run_dir / _METRICS, step
        # A run that goes on repeats the steps after its checkpoint.
        self._keep(lambda row: row["step"] <= step)

    def advance(self, losses: Mapping[str, float]) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        if step == self._begun:  # an evaluation whose checkpoint was not saved is repeated
            self._file.close()
            self._keep(lambda row: (row["step"], row["group"]) != (step, group))
        self._file.write(json.dumps({"step": step, "group": group, **values}) + "\n")
        self._file.flush()

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None: ...

    def close(self) -> None:
        self._file.close()

    def _keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Go on after those rows of the file that are wanted."""
        kept = [line for line, row in _records(self._path) if wanted(row)]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)  # so that there is no moment without them
        self._file = self._path.open("a")


class TensorBoard:
    """tensorboard/ in the run's folder: scalars, validation pictures, the configuration as text."""

    def start(self, run_dir: Path, step: int, total_steps: int) -> None:
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        lines = (run_dir / "config.yaml").read_text().splitlines()
        indented = "".join(f"    {line}\n" for line in lines)  # which markdown shows as it is
        self._writer.add_text("config", indented, step)

    def advance(self, losses: Mapping[str, float]) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
        for index, picture in enumerate(pictures):
            summary = Summary(value=[Summary.Value(tag=f"val/{index}", image=_compressed(picture))])
            self._writer._get_file_writer().add_summary(summary, step)

    def close(self) -> None:
        self._writer.close()


def shrunk(picture: Image.Image) -> Image.Image:
    """Of moderate size: a training logs hundreds of pictures."""
    factor = min(math.sqrt(_PIXELS / (picture.width * picture.height)), 1)
    return picture.resize((max(round(picture.width * factor), 1), max(round(picture.height * factor), 1)))


def _compressed(picture: Image.Image) -> Summary.Image:
    """As JPEG of moderate size: SummaryWriter alone would write PNG."""
    small = shrunk(picture)
    return Summary.Image(width=small.width, height=small.height, colorspace=3, encoded_image_string=jpeg(small, 75))


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The records of a file, each as its line too. Damaged lines, which a kill may leave, are left out."""
    if not path.exists():
        return []
    lines = read_regular(path, _MOST).decode(errors="replace").splitlines(keepends=True)
    records = [(line, row) for line in lines if (row := _parsed(line)) is not None]
    if len(records) < len(lines):
        logger.warning("%d of %d lines of %s are damaged and left out.", len(lines) - len(records), len(lines), path)
    return records


def _parsed(line: str) -> dict[str, Any] | None:
    """The record on a line; None where it is none or cut short."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("group"), str)
    return row if whole else None
