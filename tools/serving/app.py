"""The endpoints of a server that detects on images."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from torch import Tensor

from detr import Detections, Detector, UserError
from detr.drawing import class_color, draw_detections
from detr.images import jpeg
from detr.reporting.attention import overlay
from detr.text import printable
from tools.serving.batching import Batcher
from tools.serving.intake import decode_image, receive_image
from tools.serving.observing import Metrics, Observed
from tools.serving.options import Options

logger = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"
_QUALITY = 92  # of JPEG
_SIDE = 1024  # pixels, of pictures of attention at most: their maps are coarse
_CLOSED = 499  # nginx's status for a client that is gone: nobody sees it but the metrics


@dataclass(frozen=True)
class _Abilities:
    """What a detector can do besides boxes."""

    masks: bool
    attention: bool


def build_app(detector: Detector, name: str, options: Options) -> ASGIApp:
    """An ASGI application that serves a detector.

    name: of the detector, to be shown. Its lifespan starts and ends the thread that the detector runs in.
    """
    service = _Service(detector, name, options)
    routes = [
        Route("/detect", service.detect, methods=["POST"]),
        Route("/attention", service.attention, methods=["POST"]),
        Route("/healthz", service.healthz),
        Route("/info", service.info),
        Route("/metrics", service.metrics),
        *(Route(path, service.page) for path in ("/", "/page.css", "/page.js", "/icon.svg")),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, ClientDisconnect: _gone, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=service.lifespan)
    return Observed(app, service.measured)


class _Service:
    def __init__(self, detector: Detector, name: str, options: Options) -> None:
        self._detector, self._name, self._options = detector, name, options
        self.measured = Metrics()
        self._abilities = _abilities(detector)
        self._batcher = Batcher(
            detector, batch_size=options.batch_size, max_wait=options.max_wait / 1000, observe=self.measured.batch
        )
        self._taken = 0  # requests with an image that are not answered yet
        self.measured.queue.set_function(lambda: self._taken)
        # Images take megabytes each once they are decoded: the next batch is, while the model runs on another.
        self._decoded = asyncio.Semaphore(2 * options.batch_size)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._batcher:
            yield

    async def detect(self, request: Request) -> Response:
        _check_parameters(request, ("threshold", "format"))
        threshold, form = self._threshold(request), request.query_params.get("format", "json")
        if form not in ("json", "image"):
            raise HTTPException(422, f"format: wanted json or image, got '{printable(form)}'.")
        async with self._image(request) as image:
            with _failures():
                found = await self._batcher.detect(image, threshold)
            if form == "image":
                return Response(await asyncio.to_thread(_drawn, image, found), media_type="image/jpeg")
            return JSONResponse({"image": _size(image), "threshold": threshold, "detections": self._rows(found)})

    async def attention(self, request: Request) -> Response:
        _check_parameters(request, ("threshold", "index"))
        if not self._abilities.attention:
            raise HTTPException(501, "This model does not show where it looks.")
        threshold, text = self._threshold(request), request.query_params.get("index", "")
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise HTTPException(422, "index: wanted the number of a detection, counted from 0, best score first.")
        async with self._image(request) as image:
            with _failures():
                maps = await self._batcher.call(lambda: self._detector.attention(image, threshold=threshold))
            if int(text) >= len(maps.detections):
                raise HTTPException(
                    422, f"index: there are {len(maps.detections)} detections of at least {threshold:g}, got {text}."
                )
            picture = await asyncio.to_thread(_looked_at, image, maps.decoder[int(text)])
            return Response(picture, media_type="image/jpeg")

    async def healthz(self, request: Request) -> Response:
        ready = self._batcher.running
        names = [category.name for category in self._detector.categories]
        return JSONResponse({"ready": ready, "model": self._name, "classes": names}, 200 if ready else 503)

    async def info(self, request: Request) -> Response:
        classes = [
            {"name": category.name, "category_id": category.id, "color": "#" + bytes(class_color(label)).hex()}
            for label, category in enumerate(self._detector.categories)
        ]
        return JSONResponse(
            {
                "model": self._name,
                "classes": classes,
                "size": getattr(self._detector, "resizing", None),
                "masks": self._abilities.masks,
                "attention": self._abilities.attention,
                "threshold": self._options.threshold,
                "max_bytes": self._options.max_bytes,
                "max_pixels": self._options.max_pixels,
            }
        )

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.measured.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self, request: Request) -> Response:
        return FileResponse(_PAGE / (request.url.path.rpartition("/")[2] or "index.html"))

    def _threshold(self, request: Request) -> float:
        text = request.query_params.get("threshold")
        try:
            threshold = self._options.threshold if text is None else float(text)
        except ValueError:
            threshold = float("nan")
        if not 0 <= threshold <= 1:
            raise HTTPException(422, f"threshold: wanted a number from 0 to 1, got '{printable(text)}'.")
        return threshold

    @asynccontextmanager
    async def _image(self, request: Request) -> AsyncIterator[UInt8[Tensor, "3 height width"]]:
        """That of a request, which inside has one of the places of the queue. Raises HTTPException."""
        options = self._options
        if self._taken >= options.max_queue:
            raise HTTPException(
                503, f"{self._taken} images are waiting already. Try again soon.", headers={"Retry-After": "1"}
            )
        self._taken += 1
        try:
            content = await receive_image(request, options.max_bytes, options.timeout)
            async with self._decoded:
                yield await asyncio.to_thread(decode_image, content, options.max_pixels)
        finally:
            self._taken -= 1

    def _rows(self, found: Detections) -> list[dict[str, Any]]:
        masks = [{}] * len(found) if found.masks is None else [{"segmentation": row} for row in found.masks.rows()]
        categories = self._detector.categories
        return [
            {**one._asdict(), "category_id": categories[one.label].id, **mask}
            for one, mask in zip(found, masks, strict=True)
        ]


def _abilities(detector: Detector) -> _Abilities:
    """By a try, which warms the model up too."""
    blank = torch.zeros((3, 64, 64), dtype=torch.uint8)
    [found] = detector.predict(blank, 0.0)
    try:
        detector.attention(blank)
    except (UserError, AttributeError):
        return _Abilities(masks=found.masks is not None, attention=False)
    return _Abilities(masks=found.masks is not None, attention=True)


def _check_parameters(request: Request, known: Collection[str]) -> None:
    for name in request.query_params:
        if name not in known:
            raise HTTPException(422, f"There is no parameter '{printable(name)}' here, but {' and '.join(known)}.")


@contextmanager
def _failures() -> Iterator[None]:
    """What the detector raises, as an answer: for damaged weights in its own words."""
    try:
        yield
    except UserError as error:
        logger.warning("The detector failed on an image: %s", error)
        raise HTTPException(500, str(error)) from error
    except Exception as error:
        logger.exception("The detector failed on an image.")
        raise HTTPException(500, "The model failed on this image. The log of the server says why.") from error


def _size(image: Tensor) -> dict[str, int]:
    return {"width": image.shape[2], "height": image.shape[1]}


def _photograph(image: UInt8[Tensor, "3 height width"]) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _drawn(image: UInt8[Tensor, "3 height width"], found: Detections) -> bytes:
    return jpeg(draw_detections(_photograph(image), found), _QUALITY)


def _looked_at(image: UInt8[Tensor, "3 height width"], weights: Tensor) -> bytes:
    photograph = _photograph(image)
    photograph.thumbnail((_SIDE, _SIDE))
    return jpeg(overlay(photograph, weights), _QUALITY)


async def _refused(request: Request, error: HTTPException) -> Response:
    sentence, path = error.detail, printable(request.url.path)
    if error.status_code == 404:
        sentence = f"There is no {path} here."
    if error.status_code == 405:
        sentence = f"{path} takes {dict(error.headers or {}).get('Allow')}, not {request.method}."
    return JSONResponse({"error": sentence}, error.status_code, headers=error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_CLOSED)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed. Its log says why."}, 500)
