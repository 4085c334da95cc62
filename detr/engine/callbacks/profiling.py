"""A profile of a few training steps."""

import logging
from collections.abc import Mapping

from torch.profiler import ProfilerActivity, profile, schedule

from detr.engine.profile import summary
from detr.engine.trainer import Callback, Trainer

logger = logging.getLogger(__name__)
_WAIT, _WARMUP, _STEPS = 5, 2, 5  # the first steps are slower than those that follow


class Profiling(Callback):
    """Records some steps near the start.

    Writes profile/trace.json, for chrome://tracing or ui.perfetto.dev, and profile/summary.txt: the time of each phase
    and of the operations that take most. Nothing is written where the training is shorter than the steps before these.
    """

    def __init__(self) -> None:
        self.profiler: profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        def write(profiler: profile) -> None:
            folder = trainer.run_dir / "profile"
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / "trace.json"))
            (folder / "summary.txt").write_text(summary(profiler, device, _STEPS))
            logger.info("The profile of %d steps is in %s.", _STEPS, folder)

        device = trainer.update.device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        chosen = schedule(wait=_WAIT, warmup=_WARMUP, active=_STEPS, repeat=1)
        self.profiler = profile(activities=activities, schedule=chosen, on_trace_ready=write)
        self.profiler.start()

    def on_step_end(self, trainer: Trainer, losses: Mapping[str, float]) -> None:
        if self.profiler is not None:
            self.profiler.step()

    def on_end(self, trainer: Trainer) -> None:
        if self.profiler is not None:
            self.profiler.stop()
