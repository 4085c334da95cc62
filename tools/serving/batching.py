"""Images of many requests through one detector, as many at a time as wait and fit together."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TypeVar

from jaxtyping import UInt8
from torch import Tensor

from detr import Detections, Detector
from detr.images import model_size

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class _Job:
    image: UInt8[Tensor, "3 height width"]
    threshold: float
    shape: tuple[int, int]  # of the image for the model
    done: "asyncio.Future[Detections]"


class Batcher:
    """Inside its `async with`, one thread runs the detector on whatever waits, up to `batch_size` images together.

    Images go together that the model gets at the same size. Others would need padding, which changes a little what is
    found, and an answer would depend on who else asks.

    max_wait: seconds that it waits for more images where a batch is not full; 0: none.
    observe: called with the number of images of each batch.
    At the end what waits is done first.
    """

    def __init__(
        self, detector: Detector, *, batch_size: int, max_wait: float, observe: Callable[[int], object]
    ) -> None:
        self._detector, self._batch_size, self._max_wait, self._observe = detector, batch_size, max_wait, observe
        self._thread = ThreadPoolExecutor(1, "detector")
        self._jobs: list[_Job] = []  # that wait
        self._ended = False

    @property
    def running(self) -> bool:
        return not self._loop.done()

    async def detect(self, image: UInt8[Tensor, "3 height width"], threshold: float) -> Detections:
        """What `Detector.predict` gives of the image. Raises what it raises for this image alone."""
        job = _Job(image, threshold, _shape(self._detector, image), asyncio.get_running_loop().create_future())
        async with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return await job.done

    async def call(self, function: Callable[[], Result]) -> Result:
        """What another function returns that uses the detector, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def __aenter__(self) -> "Batcher":
        self._changed = asyncio.Condition()
        self._loop = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._changed:
            self._ended = True
            self._changed.notify()
        await self._loop
        self._thread.shutdown()

    async def _work(self) -> None:
        while await self._until(lambda: self._ended or bool(self._jobs)) and self._jobs:
            with suppress(asyncio.TimeoutError):
                full = self._until(lambda: self._ended or len(self._next()) == self._batch_size)
                await asyncio.wait_for(full, self._max_wait)
            batch = self._next()
            self._jobs = [job for job in self._jobs if job not in batch]
            self._observe(len(batch))
            outcomes = await self.call(partial(self._run, batch))
            for job, outcome in zip(batch, outcomes, strict=True):
                if job.done.done():  # its request was given up
                    continue
                if isinstance(outcome, Exception):
                    job.done.set_exception(outcome)
                else:
                    job.done.set_result(outcome)

    async def _until(self, condition: Callable[[], bool]) -> bool:
        async with self._changed:
            return await self._changed.wait_for(condition)

    def _next(self) -> list[_Job]:
        """The job that has waited longest, and those that go with it."""
        return [job for job in self._jobs if job.shape == self._jobs[0].shape][: self._batch_size]

    def _run(self, jobs: Sequence[_Job]) -> list[Detections | Exception]:
        """Of each; where they fail together, of each alone, so that one image spoils no other."""
        lowest = min(job.threshold for job in jobs)
        try:
            found = self._detector.predict([job.image for job in jobs], lowest, len(jobs))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer to its request alone
            if len(jobs) == 1:
                return [error]
            return [self._run([job])[0] for job in jobs]
        return [one.above(job.threshold) for one, job in zip(found, jobs, strict=True)]


def _shape(detector: Detector, image: UInt8[Tensor, "3 height width"]) -> tuple[int, int]:
    """(height, width) of an image for the model; its own where the detector does not say how it resizes."""
    size = image.shape[1], image.shape[2]
    if not isinstance(detector, Detector):
        return size
    return model_size(*size, detector.size, detector.max_size, square=detector.square)
