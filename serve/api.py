"""The HTTP routes over an `Engine`. Knows HTTP and the engine; knows neither Ray nor how vectors are made.

POST /embed  POST /search  GET /search?q=&k=  POST /v1/embeddings   need a key where keys are set
POST /documents  DELETE /documents/{id}                             need a key where keys are set
GET /info  GET /metrics                                             need a key where keys are set
GET /health  GET /ready  GET /  GET /docs  GET /openapi.json        open
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Annotated, Any, TypeVar

import numpy as np
import pydantic_core
from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

import tdro_ray
from serve import schemas
from serve.bodies import JsonRoute
from serve.engine import Engine, watching
from serve.guard import Guard, RequestError
from serve.metrics import CONTENT_TYPE, Measure, Metrics

T = TypeVar("T")

CODES = {400: "bad_request", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorResponse, "description": text}
    for status, text in {
        400: "The body is not JSON.",
        401: "The API key is missing or wrong.",
        404: "No such path, model or index.",
        413: "The body, the batch or a text is too large.",
        422: "A value is not valid.",
        429: "Too many requests are waiting; try again after `Retry-After` seconds.",
        500: "A defect of the server.",
        503: "Not ready, or shutting down, or too many changes wait for a merge.",
        504: "The answer took too long.",
    }.items()
}


READ_ONLY: dict[int | str, dict[str, Any]] = {
    403: {"model": schemas.ErrorResponse, "description": "This server takes no changes."}
}


def create_app(
    engine: Engine | Callable[[], Engine], key_digests: tuple[str, ...] = (), limits: schemas.Limits | None = None
) -> FastAPI:
    """Return the app. An engine given as a function is made at start-up; either is closed at shut-down.

    `key_digests` are the SHA-256 digests of the API keys (`guard.parse_keys`); none lets everybody in, which
    `guard.check_binding` allows on loopback only. `limits` are the engine's, needed here for the body size.
    """
    limits = limits or (engine.limits if isinstance(engine, Engine) else schemas.Limits())

    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = engine if isinstance(engine, Engine) else await asyncio.to_thread(engine)
        metrics.observe(app.state.engine)
        async with watching(app.state.engine):
            yield
        await asyncio.to_thread(app.state.engine.close)

    app = FastAPI(
        title="tdro retriever",
        summary="Embeddings and search by a retriever trained with tdro-ray.",
        version=tdro_ray.__version__,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        responses=ERRORS,
    )
    app.router.route_class = JsonRoute
    app.state.metrics, app.state.timeout_s = metrics, limits.timeout_s
    _add_model_routes(app)
    _add_document_routes(app)
    _add_operation_routes(app)
    _add_error_handlers(app)
    app.add_middleware(Guard, key_digests=key_digests, max_body_bytes=limits.max_body_bytes)
    app.add_middleware(Measure, metrics=metrics)
    return app


def _add_model_routes(app: FastAPI) -> None:
    @app.post("/embed", response_model=schemas.EmbedResponse, tags=["model"])
    async def embed(body: schemas.EmbedRequest, request: Request) -> Response:
        """Embed texts as queries or passages; the vectors are of unit length."""
        engine = _engine(request)
        work = engine.embed(body.texts, body.kind, body.task, body.dimensions, body.normalise, body.truncate)
        vectors, tokens = await _in_time(request, work)
        return _json(
            {
                "embeddings": _encode(vectors, body.encoding),
                "model": engine.name,
                "dimensions": vectors.shape[1],
                "tokens": tokens,
            }
        )

    @app.post("/search", response_model=schemas.SearchResponse, tags=["model"])
    async def search(body: schemas.SearchRequest, request: Request) -> Response:
        """Find the documents nearest to each query or vector, best first."""
        engine = _engine(request)
        work = engine.search(body.queries, body.vectors, body.k, body.filter, body.task)
        return _found(engine, *await _in_time(request, work))

    @app.get("/search", response_model=schemas.SearchResponse, tags=["model"])
    async def search_one(
        request: Request, q: Annotated[str, Query(min_length=1)], k: Annotated[int, Query(ge=1)] = 10, task: str = ""
    ) -> Response:
        """Find the documents nearest to one query, best first."""
        engine = _engine(request)
        return _found(engine, *await _in_time(request, engine.search([q], k=k, task=task)))

    @app.post("/v1/embeddings", response_model=schemas.OpenAIResponse, tags=["model"])
    async def openai_embeddings(body: schemas.OpenAIRequest, request: Request) -> Response:
        """Embed texts in the shape of OpenAI's API. `model` may end in `:query`; without it texts are passages."""
        engine = _engine(request)
        name, _, kind = body.model.partition(":")
        if name not in ("", engine.name) or kind not in ("", "query", "passage"):
            valid = f"{engine.name!r}, {engine.name + ':query'!r} and {engine.name + ':passage'!r}"
            raise RequestError(
                404, "model_not_found", f"Model {body.model!r:.80} is not served here; valid are {valid}."
            )
        texts = [body.input] if isinstance(body.input, str) else body.input
        vectors, tokens = await _in_time(request, engine.embed(texts, kind or "passage", "", body.dimensions))
        data = [
            {"object": "embedding", "index": i, "embedding": e}
            for i, e in enumerate(_encode(vectors, body.encoding_format))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": body.model or engine.name, "usage": usage})


def _add_document_routes(app: FastAPI) -> None:
    @app.post("/documents", response_model=schemas.DocumentsResponse, tags=["documents"], responses=READ_ONLY)
    async def upsert(body: schemas.DocumentsRequest, request: Request) -> Response:
        """Add documents, or replace those of the same id: all of them or, where one is not valid, none.

        With the answer they are on the disk, and every search that begins from then on sees them, on every replica.
        """
        written, version = await _in_time(request, _engine(request).writer.upsert(body.documents))
        return _json({"upserted": written.count, "seq": written.seq, "index_version": version})

    # Ids may hold slashes: the rest of the path is the id.
    @app.delete("/documents/{id:path}", response_model=schemas.DeleteResponse, tags=["documents"], responses=READ_ONLY)
    async def delete(
        id: Annotated[str, Path(description="URL-encoded; slashes may stay")], request: Request
    ) -> Response:
        """Delete a document. `deleted` is false where there was none of this id."""
        written, version = await _in_time(request, _engine(request).writer.delete(id))
        return _json({"deleted": written.count > 0, "seq": written.seq, "index_version": version})


def _add_operation_routes(app: FastAPI) -> None:
    page = resources.files("serve").joinpath("page/index.html").read_bytes()
    page_headers = _page_headers(page)

    @app.get("/info", tags=["operation"])
    async def info(request: Request) -> Response:
        """Model, index, limits and versions."""
        return _json({**_engine(request).info(), "tdro_ray": tdro_ray.__version__})

    @app.get("/health", tags=["operation"])
    async def health(request: Request) -> Response:
        """200 while the model answers."""
        await _in_time(request, _engine(request).check())
        return _json({"status": "ok"})

    @app.get("/ready", tags=["operation"])
    async def ready(request: Request) -> Response:
        """200 while new requests are taken."""
        _engine(request).check_ready()
        return _json({"status": "ready"})

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics of this replica."""
        return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)


def _page_headers(page: bytes) -> dict[str, str]:
    """Headers under which the page runs its own style and script, fetches from this server only, and is not framed."""

    def own(tag: bytes) -> str:
        found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        assert found, "the page has one style and one script"
        return "'sha256-" + base64.b64encode(hashlib.sha256(found.group(1)).digest()).decode("ascii") + "'"

    policy = f"default-src 'none'; style-src {own(b'style')}; script-src {own(b'script')}; connect-src 'self'; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def _add_error_handlers(app: FastAPI) -> None:
    async def request_error(_: Request, err: Exception) -> Response:
        assert isinstance(err, RequestError)
        return Response(err.body(), err.status_code, err.headers, "application/json")

    async def http_error(request: Request, err: Exception) -> Response:
        assert isinstance(err, HTTPException)
        message = f"{err.detail}: {request.method} {request.url.path[:200]}. The paths are listed in /docs."
        if err.status_code == 400:
            message = "The body cannot be read as JSON."
        own = RequestError(err.status_code, CODES.get(err.status_code, "error"), message, dict(err.headers or {}))
        return await request_error(request, own)

    async def validation_error(request: Request, err: Exception) -> Response:
        assert isinstance(err, RequestValidationError)
        return await request_error(request, _explain(list(err.errors())))

    app.add_exception_handler(RequestError, request_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def _explain(errors: list[Any]) -> RequestError:
    """The first few faults of a body or a query string; the values themselves are not repeated, they may be huge."""
    if errors and errors[0]["type"] == "json_invalid":
        return RequestError(
            400, "invalid_json", f"The body is not JSON: {errors[0].get('ctx', {}).get('error', '')!s:.200}"
        )
    lines = []
    for error in errors[:5]:
        where = ".".join(str(part)[:80] for part in error["loc"][1:8]) or "the body"
        lines.append(f"{where}: {error['msg'].removeprefix('Value error, ')[:200]}")
    more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
    return RequestError(422, "invalid_request", "; ".join(lines) + more)


def _engine(request: Request) -> Engine:
    engine: Engine | None = getattr(request.app.state, "engine", None)
    if engine is None:
        raise RequestError(503, "not_running", "The model is still loading.", {"Retry-After": "1"})
    return engine


async def _in_time(request: Request, work: Awaitable[T]) -> T:
    limit = request.app.state.timeout_s
    try:
        async with asyncio.timeout(limit):
            return await work
    except TimeoutError as err:
        raise RequestError(
            504, "timeout", f"The answer took longer than {limit:g} s; send fewer or shorter texts."
        ) from err


def _found(engine: Engine, results: list[list[Any]], version: str) -> Response:
    body = [
        [{"id": h.id, "score": h.score, "text": h.text, "title": h.title, "metadata": h.metadata} for h in hits]
        for hits in results
    ]
    return _json({"results": body, "model": engine.name, "index_version": version})


def _encode(vectors: np.ndarray, encoding: str) -> list[Any]:
    if encoding == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in vectors]
    # Eight decimals lose less than float32's own rounding of a unit vector and halve the text.
    return np.round(vectors.astype(np.float64), 8).tolist()


def _json(value: Any) -> Response:
    return Response(pydantic_core.to_json(value), media_type="application/json")
