"""Averages a run's records and hands them to the sinks."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from detr import distributed
from detr.contents import check_content, mapping, number, record, whole
from detr.errors import UserError
from detr.evaluation.samples import Sample
from detr.memory import forget_peak_memory, peak_memory
from detr.reporting.samples import draw_batch, draw_sample
from detr.reporting.sinks import Sink
from detr.types import ImageBatch, Target

logger = logging.getLogger(__name__)
_STATE = record(sums=mapping(number()), count=whole(), left_out=mapping(whole()))
_BATCH_IMAGES = 8  # of a training batch that are drawn


class Reporter:
    """Passes losses, speed, memory and pictures to all sinks. A context manager around the whole run.

    Of several processes the first alone reports.

    sinks: where to log to, by name; None switches one off.
    run_dir: the run's folder, with its config.yaml; drawn validation images go to its predictions/, the first training
        batch to training_batch.jpg.
    log_every: steps between two records of averages.
    names: of the classes, for the training batch.
    Raises UserError where a sink is none.
    """

    def __init__(
        self, *, sinks: Mapping[str, Sink | None], run_dir: Path, log_every: int = 50, names: Sequence[str] = ()
    ) -> None:
        for name, sink in sinks.items():
            if not isinstance(sink, Sink | None):
                raise UserError(
                    f"logger.{name}: wanted a place to log to with its _target_, such as "
                    f"detr.reporting.sinks.JsonLines, or null to switch it off, got {sink!r}."
                )
        own = sinks.values() if distributed.rank() == 0 else ()
        self.sinks, self.run_dir = [sink for sink in own if sink is not None], run_dir
        self.log_every, self.names = log_every, names
        self.total_steps = 0
        self._started: list[Sink] = []
        self._batch_is_drawn = False
        self._sums: dict[str, float] = {}
        self._count = 0  # of the steps in _sums; those of this process since the last record are _timed
        self._left_out: dict[str, int] = {}  # steps whose value is in no sum: with fp16, gradients that overflow
        self._timed, self._images, self._waited, self._since = 0, 0, 0.0, 0.0

    def start(self, step: int, total_steps: int) -> None:
        """step: steps done before. Must come before everything else."""
        self.total_steps = total_steps
        for sink in self.sinks:
            sink.start(self.run_dir, step, total_steps)
            self._started.append(sink)
        forget_peak_memory()  # a sweep trains one model after another in the same process
        self._restart_clock()

    def step(
        self, step: int, losses: Mapping[str, float], state: Mapping[str, float], images: int, waited: float
    ) -> None:
        """One training step is done.

        losses: by name. state: what is logged as it is now, such as learning rates, by name. images: in the batch.
        waited: seconds without data.
        """
        self._count += 1
        self._timed += 1
        self._images += images
        self._waited += waited
        for name, value in losses.items():
            known = math.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + (value if known else 0.0)
            if not known:
                self._left_out[name] = self._left_out.get(name, 0) + 1
        self._send(lambda sink: sink.advance(losses))
        if step % self.log_every and step != self.total_steps:
            return
        seconds = time.perf_counter() - self._since
        counts = {name: self._count - self._left_out.get(name, 0) for name in self._sums}
        averages = {name: value / counts[name] for name, value in self._sums.items() if counts[name]}
        speed = {
            "images_per_second": self._images / seconds,
            "data_wait": self._waited / seconds,
            "memory_gb": peak_memory() / 2**30,
            "eta_minutes": (self.total_steps - step) * seconds / self._timed / 60,
        }
        self._scalars(step, {**averages, **state, **speed}, "train")
        self._reset()

    def batch(self, batch: ImageBatch, targets: Sequence[Target]) -> None:
        """What the model is about to learn from. Of a run's first batch there is a picture."""
        if self._batch_is_drawn:
            return
        self._batch_is_drawn = True
        path = self.run_dir / "training_batch.jpg"
        if distributed.rank() > 0 or path.exists():
            return  # it is of the run's start, which this one goes on with
        shown = range(min(len(targets), _BATCH_IMAGES))
        samples = [Sample.of(batch, index, targets[index], names=self.names) for index in shown]
        self._save({path: draw_batch(samples)})

    def evaluation(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """An evaluation is done; samples: images with what is annotated and what was found in them."""
        self._scalars(step, metrics, "val")
        pictures = [draw_sample(sample) for sample in samples]
        folder = self.run_dir / "predictions"
        self._save({folder / f"{index}.jpg": picture for index, picture in enumerate(pictures)})
        self._send(lambda sink: sink.pictures(step, pictures))
        self._reset()  # the time of the evaluation is not training time

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the averages of a run that goes on are those of one that was not stopped."""
        return {"sums": dict(self._sums), "count": self._count, "left_out": dict(self._left_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        # Earlier versions left nothing out, so that sums could be NaN.
        sums = {
            name: value for name, value in state["sums"].items() if type(value) is not float or math.isfinite(value)
        }
        state = {"left_out": {}, **state, "sums": sums}
        check_content(state, _STATE, "the averages of the log")
        self._sums, self._count, self._left_out = dict(sums), state["count"], dict(state["left_out"])

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._send(lambda sink: sink.close())

    def _save(self, pictures: Mapping[Path, Image.Image]) -> None:
        """A training must not end by its pictures either."""
        try:
            for path, picture in pictures.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, quality=92)
        except OSError as error:
            logger.warning("No picture at %s: %s.", path, error.with_traceback(None))

    def _scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        self._send(lambda sink: sink.scalars(step, values, group))

    def _send(self, call: Callable[[Sink], None]) -> None:
        """Pass something to all sinks; one that fails is left out from then on: a training must not end by its log."""
        for sink in list(self._started):
            try:
                call(sink)
            except OSError as error:
                self._started.remove(sink)
                # Without its traceback: a sink may keep the error, which would keep alive what the training was at.
                logger.warning("Nothing more goes to %s: %s.", type(sink).__name__, error.with_traceback(None))

    def _reset(self) -> None:
        self._sums, self._count, self._left_out = {}, 0, {}
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._timed, self._images, self._waited, self._since = 0, 0, 0.0, time.perf_counter()
