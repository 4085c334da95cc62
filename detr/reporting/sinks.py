"""Places that a run's records go to. Each is switched on and off in the `logger` configuration."""

import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)
_PIXELS = 300_000  # of a picture in TensorBoard
_DETAIL = re.compile(r"_\d+$|/")  # losses of earlier decoder layers, and what has a/path for a name, are for the files


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
    """A progress bar with losses, speed and memory, where there is a terminal, and a line in the log now and then."""

    def start(self, run_dir: Path, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._rates: dict[str, float] = {}
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=None)

    def advance(self, losses: Mapping[str, float]) -> None:
        shown = {name: losses[name] for name in ("loss", "loss_ce", "loss_bbox", "loss_giou") if name in losses}
        self._bar.set_postfix({**shown, **self._rates}, refresh=False)
        self._bar.update()

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        if group == "train":  # the bar itself shows the time that is left
            self._rates = {name: values[name] for name in ("images_per_second", "data_wait", "memory_gb")}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not _DETAIL.search(name))
        logger.info("step %d/%d %s: %s", step, self._total, group, shown)

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None: ...

    def close(self) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)


class JsonLines:
    """metrics.jsonl in the run's folder: one object a line, {"step", "group", values...}."""

    def start(self, run_dir: Path, step: int, total_steps: int) -> None:
        path = run_dir / "metrics.jsonl"
        # A run that goes on repeats the steps after its checkpoint.
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)  # so that there is no moment without them
        self._file = path.open("a")

    def advance(self, losses: Mapping[str, float]) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        self._file.write(json.dumps({"step": step, "group": group, **values}) + "\n")
        self._file.flush()

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None: ...

    def close(self) -> None:
        self._file.close()


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


def _compressed(picture: Image.Image) -> Summary.Image:
    """As JPEG of moderate size: SummaryWriter alone would write PNG, and a training hundreds of pictures."""
    factor = min(math.sqrt(_PIXELS / (picture.width * picture.height)), 1)
    small = picture.resize((max(round(picture.width * factor), 1), max(round(picture.height * factor), 1)))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=75)
    return Summary.Image(width=small.width, height=small.height, colorspace=3, encoded_image_string=stream.getvalue())


def _lines(path: Path) -> list[str]:
    """The complete lines of a file; a run that was killed may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
