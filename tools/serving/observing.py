"""What a server measures of itself, in Prometheus' form, and what it says in the header of every answer."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Metrics:
    """Those of one server. Memory and processor time of its process are there too, where the system has /proc."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("detr_requests", "Answered requests.", ("endpoint", "status"), registry=self.registry)
        self.seconds = Histogram(
            "detr_request_seconds",
            "Time from the head of a request to the end of its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "detr_batch_size", "Images that the model ran on together.", buckets=_BATCHES, registry=self.registry
        )
        self.images = Counter("detr_images", "Images that the model ran on.", registry=self.registry)
        self.queue = Gauge(
            "detr_queue_length", "Requests with an image that were taken and not answered yet.", registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def batch(self, images: int) -> None:
        self.batches.observe(images)
        self.images.inc(images)


class Observed:
    """Middleware that counts and times requests, and adds headers that keep browsers strict."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            # Of known endpoints: each further label would take memory for good.
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - began)
