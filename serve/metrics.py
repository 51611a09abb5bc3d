"""Prometheus metrics of one server, in a registry of its own so that several apps can live in one process."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of requests, and gauges that read the engine when they are scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("tdro_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "tdro_request_seconds", "Time from request to answer.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.ongoing = Gauge("tdro_requests_ongoing", "Requests under way.", registry=self.registry)

    def observe(self, engine: Any) -> None:
        """Export the engine's counters."""

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            Gauge(name, text, registry=self.registry).set_function(read)

        for name, batcher in (
            ("embed", engine.embedder),
            ("search", engine.searcher),
            ("write", engine.writer.batcher),
        ):
            gauge(f"tdro_{name}_waiting", "Items that no batch has taken yet.", lambda b=batcher: b.waiting)
            gauge(f"tdro_{name}_batches", "Batches run since the start.", lambda b=batcher: b.batches)
            gauge(f"tdro_{name}_items", "Items run since the start.", lambda b=batcher: b.batched_items)
        for name, text in (("hits", "Texts whose vector was kept."), ("misses", "Texts that went to the model.")):
            gauge(f"tdro_embed_cache_{name}", text, lambda n=name: getattr(engine.cache, n))
        gauge("tdro_embed_cache_bytes", "Bytes of kept vectors.", lambda: engine.cache.bytes)
        gauge("tdro_index_documents", "Documents in the served index.", engine.documents)
        gauge("tdro_index_unmerged_changes", "Changes that no index version has merged yet.", engine.writer.unmerged)
        gauge("tdro_index_version", "Served index version.", lambda: int(engine.index.version) if engine.index else 0)

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)


class Measure:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        self.metrics.ongoing.inc()
        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.ongoing.dec()
            route = getattr(scope.get("route"), "path", "other")  # the pattern: paths made up by clients are not labels
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)
