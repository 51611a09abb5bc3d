"""The engine behind the HTTP routes: an encoder, an index, and one batcher for each. Knows nothing of HTTP or Ray.

    texts -> tokeniser threads -> token ids -> batcher (token budget, over all requests) -> vectors
    vectors -> batcher (same k and filter) -> index -> hits
    documents -> see `writer`

Errors are `RequestError`s, so that each carries its status; the routes only pass them on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from serve.batching import Batcher, Closed, Overloaded
from serve.cache import VectorCache, text_key
from serve.guard import RequestError
from serve.reload import ModelFolder
from serve.schemas import Limits
from serve.texts import TextError, check_count, check_task, check_texts, number, tokenize
from serve.writer import Merger, Writer
from tdro_ray.errors import ConfigError, DataError, TdroError
from tdro_ray.index import versions
from tdro_ray.index.base import Hit, RetrievalIndex, unit_rows
from tdro_ray.index.changes import StaleError
from tdro_ray.index.filters import FilterError
from tdro_ray.model.load import Backend, Dtype, load_apart

SEARCH_BATCH = 64  # vectors per FAISS call
TOKENIZER_THREADS = 2
STALE_TRIES = 5  # newer versions opened for one request; each of them was removed within milliseconds before
FRESH_S = 10.0  # a forward this recent shows that the model works

T = TypeVar("T")

log = logging.getLogger(__name__)


class Engine:
    """Answers embedding and search requests from one event loop. `index` None serves embeddings only."""

    def __init__(
        self,
        encoder: Any,
        index: RetrievalIndex | None = None,
        *,
        name: str = "tdro",
        model_hash: str = "",
        limits: Limits | None = None,
        index_folder: Path | None = None,
        cache_bytes: int = 0,
        threads: int = 0,
        merger: Merger | None = None,
        index_device: str = "cpu",
    ) -> None:
        self.encoder, self.index, self.name, self.model_hash = encoder, index, name, model_hash
        self.limits, self.index_folder = limits or Limits(), index_folder
        if index is not None:
            self._check_fits(index)
        self.index_device = index_device
        self.started = time.time()
        self.closing = False
        self.cache = VectorCache(cache_bytes)
        self.source: ModelFolder | None = None  # where the encoder came from, if it may be replaced there
        self._inside, self._reloading = 0, False  # requests under way; whether others wait for a new model
        self._last_forward = 0.0
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenize")
        # OpenMP's number of threads belongs to the thread that asks for them; Ray starts a replica with one.
        begin = functools.partial(_use_threads, threads)
        self.embedder = Batcher(self._forward, self.limits.batch_tokens, self.limits.max_waiting, "embed", begin)
        self.searcher = Batcher(self._find, SEARCH_BATCH, self.limits.max_waiting, "search", begin)
        self._refreshing = threading.Lock()  # one opens a version at a time
        self._replacing = threading.Lock()  # held for the moment in which model or index is replaced
        self.writer = Writer(self, merger)

    @classmethod
    def open(
        cls,
        model_folder: str | Path,
        index_folder: str | Path | None = None,
        device: str = "cpu",
        limits: Limits | None = None,
        *,
        backend: Backend = "auto",
        dtype: Dtype = "auto",
        threads: int = 0,
        compile: bool = False,
        cache_bytes: int = 0,
        merger: Merger | None = None,
        index_device: str = "cpu",
    ) -> Engine:
        """Load a model folder and the current index version; `backend`, `dtype`, `threads`, `compile` as in `load_encoder`,
        `cache_bytes` of vectors of texts seen before.
        Raises CheckpointError, DataError, or ConfigError for a model that is not the index's."""
        model_folder = Path(model_folder)
        source = ModelFolder(
            model_folder, functools.partial(load_apart, model_folder, device, backend, dtype, threads, compile)
        )
        index = RetrievalIndex.open(index_folder, index_device) if index_folder else None
        engine = cls(
            source.load(),
            index,
            name=index.manifest["model"]["name"] if index else model_folder.name,
            model_hash=source.hash(),
            limits=limits,
            index_folder=Path(index_folder) if index_folder else None,
            cache_bytes=cache_bytes,
            threads=threads,
            merger=merger,
            index_device=index_device,
        )
        engine.source = source
        return engine

    # ------------------------------------------------------------ requests

    async def embed(
        self,
        texts: Sequence[str],
        kind: str,
        task: str = "",
        dimensions: int | None = None,
        normalise: bool = True,
        truncate: str = "end",
        cached: bool = True,
    ) -> tuple[np.ndarray, int]:
        """Return vectors, float32 (texts, dimensions), and the number of tokens read.

        They are of unit length; the first `dimensions` of them only with `normalise`. A text beyond the model's length
        is cut at its end, or with `truncate="error"` refused. `cached` False asks the model in any case.
        """
        async with self.turn():
            rows, tokens = await self._vectors(texts, kind, task, truncate, cached, dimensions)
        vectors = np.stack(rows)
        if dimensions is not None and dimensions < vectors.shape[1]:
            vectors = vectors[:, :dimensions]
            if normalise:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors, sum(tokens)

    async def _vectors(
        self,
        texts: Sequence[str],
        kind: str,
        task: str,
        truncate: str = "end",
        cached: bool = True,
        dimensions: int | None = None,
    ) -> tuple[list[np.ndarray], list[int]]:
        """Return each text's whole vector and its token count. Needs a `turn`."""
        check_texts(texts, self.limits)
        check_task(task, self.encoder.spec)
        if dimensions is not None and dimensions > self.encoder.dim:
            raise RequestError(
                422, "invalid_request", f"dimensions must be at most {self.encoder.dim}, got {number(dimensions)}."
            )
        self._check_open()
        if cached and self.cache.max_bytes:
            return await self._embed_cached(texts, kind, task, truncate)
        return await self.embed_anew(texts, kind, task, truncate)

    async def _embed_cached(
        self, texts: Sequence[str], kind: str, task: str, truncate: str
    ) -> tuple[list[np.ndarray], list[int]]:
        """As `embed_anew`, of the distinct texts that the cache lacks."""
        keys = [text_key(text, self.model_hash, kind, task, truncate) for text in texts]
        found = {key: self.cache.get(key) for key in keys}
        missing = {key: place for place, key in reversed(list(enumerate(keys))) if found[key] is None}
        if missing:
            places = sorted(missing.values())
            try:
                anew = await self.embed_anew([texts[p] for p in places], kind, task, truncate)
            except TextError as err:
                raise err.at(places[err.place]) from err
            for place, vector, tokens in zip(places, *anew, strict=True):
                found[keys[place]] = (vector, tokens)
                self.cache.put(keys[place], vector, tokens)
        rows = [entry for key in keys if (entry := found[key]) is not None]
        return [vector for vector, _ in rows], [tokens for _, tokens in rows]

    async def embed_anew(
        self, texts: Sequence[str], kind: str, task: str, truncate: str = "end"
    ) -> tuple[list[np.ndarray], list[int]]:
        """Tokenise beside the event loop and run the model; return vectors and token counts. Needs a `turn`."""
        loop = asyncio.get_running_loop()
        sequences = await loop.run_in_executor(self._tokenizers, tokenize, self.encoder, texts, kind, task, truncate)
        costs = [len(sequence) for sequence in sequences]
        return await self._wait(self.embedder, None, sequences, costs), costs

    async def search(
        self,
        queries: Sequence[str] | None = None,
        vectors: Sequence[Sequence[float]] | None = None,
        k: int = 10,
        filter: dict[str, Any] | None = None,
        task: str = "",
    ) -> tuple[list[list[Hit]], str]:
        """Return the hits of every query (or vector), best first, and the index version that gave them."""
        if self.index is None:
            raise RequestError(404, "no_index", "This server was started without an index; it only embeds.")
        if k > self.limits.max_k:
            raise RequestError(422, "invalid_request", f"k must be at most {self.limits.max_k}, got {number(k)}.")
        key = (k, json.dumps(filter, sort_keys=True) if filter is not None else None)
        async with self.turn():
            if queries is not None:
                unit = (await self._vectors(queries, "query", task))[0]
            else:
                assert vectors is not None, "the body holds queries or vectors"
                check_count("vectors", len(vectors), self.limits)
                unit = list(_unit_vectors(vectors, self.encoder.dim))
            found = await self._wait(self.searcher, key, unit, [1] * len(unit))
        return [hits for hits, _ in found], found[0][1]

    async def check(self) -> None:
        """Return when the model works: it answered lately, or answers now. Raises RequestError (503) otherwise."""
        self._check_open()
        if not (self.embedder.alive and self.searcher.alive and self.writer.batcher.alive):
            raise RequestError(503, "not_running", "A worker thread has ended.")
        if time.monotonic() - self._last_forward > FRESH_S:
            await self.embed(["health"], "query", cached=False)

    def check_ready(self) -> None:
        """Raise RequestError (503) unless the server takes new requests."""
        self._check_open()
        if self.embedder.waiting >= self.limits.max_waiting:
            raise RequestError(503, "overloaded", "The queue is full.", {"Retry-After": "1"})

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A request's time inside: model and index do not change in it, so that a query meets its own model's index."""
        while self._reloading:
            await asyncio.sleep(0.002)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def reload(self) -> bool:
        """Serve the model that has taken the place of the served one in its folder, if another has, with its index.

        An index is needed only by a server that has one: until the current version is the new model's, the old pair stays.
        Requests wait for as long as those under way take. Raises ConfigError (index of another model), CheckpointError.
        """
        source = self.source
        if source is None or not await asyncio.to_thread(source.changed):
            return False
        opened = await asyncio.to_thread(self._open_anew, source)
        source.take()
        if opened is None:
            return False
        self._reloading = True
        try:
            while self._inside:
                await asyncio.sleep(0.002)
            with self._replacing:
                self.encoder, self.index, self.model_hash = opened
        finally:
            self._reloading = False
        log.info("Serving the model that was put into %s (hash %s)", source.folder, self.model_hash[:12])
        return True

    def _open_anew(self, source: ModelFolder) -> tuple[Any, RetrievalIndex | None, str] | None:
        """Return the folder's encoder, its index and its hash; None for the same weights again."""
        model_hash = source.hash()
        if model_hash == self.model_hash:
            return None
        index = None
        if self.index_folder is not None:
            folder = versions.current(self.index_folder)
            versions.check_same_model(versions.manifest(folder), self.name, model_hash)
            index = RetrievalIndex.open(self.index_folder, self.index_device)
            versions.check_same_model(index.manifest, self.name, model_hash)  # another may be current by now
        encoder = source.load()
        if index is not None:
            self._check_dimensions(index, encoder)
        return encoder, index, model_hash

    def refresh(self) -> bool:
        """Open the index version that has become current, if another has, and serve it from the next batch on."""
        if self.index is None or self.index_folder is None:
            return False
        with self._refreshing:
            if versions.current(self.index_folder).name == self.index.version:
                return False
            index = RetrievalIndex.open(self.index_folder, self.index_device)
            with self._replacing:  # a new model may have come with its own index while this one was opened
                self._check_fits(index)
                self.index = index
        log.info("Serving index version %s (%d documents)", index.version, len(index))
        return True

    def on_index(self, work: Callable[[RetrievalIndex], T]) -> T:
        """Return `work` of the served version, or of the current one where that is no longer kept."""
        for _ in range(STALE_TRIES):
            assert self.index is not None, "there is an index"
            try:
                return work(self.index)
            except StaleError:
                self.refresh()
        return work(self.index)

    def documents(self) -> int:
        """Number of documents that a search sees."""
        return self.on_index(len) if self.index is not None else 0

    def info(self) -> dict[str, Any]:
        """What is served: model, index, limits."""
        spec = self.encoder.spec
        index = None
        if self.index is not None:
            keys = ("version", "documents", "factory", "metric", "search", "recall@10", "fields", "created")
            index = {key: self.index.manifest.get(key) for key in keys}
            index |= {"documents": self.documents(), "changes": self.writer.info()}
        model = {
            "name": self.name,
            "hash": self.model_hash,
            "dimensions": self.encoder.dim,
            "backend": getattr(self.encoder, "backend", "other"),
            "query_length": spec.query_length,
            "passage_length": spec.passage_length,
            "tasks": sorted({*spec.task_prompts, *spec.task_lengths}),
        }
        return {
            "model": model,
            "index": index,
            "limits": self.limits.model_dump(),
            "uptime_s": round(time.time() - self.started, 1),
        }

    def close(self) -> None:
        """Take no further request, finish what waits, stop the threads."""
        self.closing = True
        self.embedder.close()
        self.searcher.close()
        self.writer.close()
        self._tokenizers.shutdown(wait=False)

    # ------------------------------------------------------------ worker threads

    def _forward(self, _: None, sequences: list[Sequence[int]]) -> np.ndarray:
        vectors = self.encoder.embed_ids(sequences, self.limits.batch_tokens)
        self._last_forward = time.monotonic()
        return vectors

    def _find(self, key: tuple[int, str | None], vectors: list[np.ndarray]) -> list[tuple[list[Hit], str]]:
        k, filter = key
        asked = json.loads(filter) if filter is not None else None

        def search(index: RetrievalIndex) -> list[tuple[list[Hit], str]]:  # one version answers the whole batch
            return [(row, index.version) for row in index.search(np.stack(vectors), k, asked)]

        return self.on_index(search)

    # ------------------------------------------------------------ checks

    async def _wait(self, batcher: Batcher, key: Any, values: Sequence[Any], costs: Sequence[int]) -> list[Any]:
        try:
            future: Future[list[Any]] = batcher.submit(key, values, costs)
            return await asyncio.wrap_future(future)
        except Overloaded as err:
            raise RequestError(
                429,
                "overloaded",
                f"{self.limits.max_waiting} texts are waiting already; try again in a second.",
                {"Retry-After": "1"},
            ) from err
        except Closed:
            self._check_open()
            raise
        except FilterError as err:
            raise RequestError(422, "invalid_filter", str(err)) from err

    def _check_open(self) -> None:
        if self.closing:
            raise RequestError(503, "not_running", "The server is shutting down.", {"Retry-After": "1"})

    def _check_fits(self, index: RetrievalIndex) -> None:
        versions.check_same_model(index.manifest, self.name, self.model_hash)
        self._check_dimensions(index, self.encoder)

    def _check_dimensions(self, index: RetrievalIndex, encoder: Any) -> None:
        if index.dim != encoder.dim:
            raise ConfigError(
                f"Index version {index.folder} holds vectors of {index.dim} dimensions, model {self.name!r} makes "
                f"{encoder.dim}. Serve the model that it was built with, or build the index again."
            )


async def watch(engine: Engine, every_s: float) -> None:
    """Look for a new model and a new index version every `every_s` seconds; what cannot be served leaves the old in place."""
    said = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            if not await engine.reload():
                await asyncio.to_thread(engine.refresh)
        except Exception as err:  # whatever it is, the next look may find it mended
            if str(err) != said:
                said = str(err)
                log.error(
                    "The new model or index version is not served: %s", said, exc_info=not isinstance(err, TdroError)
                )


@contextlib.asynccontextmanager
async def watching(engine: Engine, every_s: float = 2.0) -> Any:
    """Follow the model folder and the index's current version while the context lasts."""
    task = asyncio.create_task(watch(engine, every_s))
    engine.writer.start(every_s)
    try:
        yield
    finally:
        task.cancel()


def _unit_vectors(vectors: Sequence[Sequence[float]], dim: int) -> np.ndarray:
    for place, vector in enumerate(vectors):
        if len(vector) != dim:
            raise RequestError(
                422, "invalid_request", f"vectors[{place}] has {len(vector)} dimensions, the index has {dim}."
            )
    try:
        return unit_rows(np.array(vectors, np.float64), dim)
    except DataError as err:
        raise RequestError(422, "invalid_request", str(err)) from err


def _use_threads(threads: int) -> None:
    """Set how many threads torch and FAISS use for what the calling thread asks of them; 0 leaves it."""
    if threads:
        import faiss
        import torch

        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
