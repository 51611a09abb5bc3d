"""Writes to the served index, and the merges that they lead to. Knows neither HTTP nor Ray.

documents -> the engine's embedder -> batcher (one commit for what waits) -> change log
a thread of its own: new versions, documents of another model, merges when they are due
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic_core

from serve.batching import Batcher
from serve.guard import RequestError
from serve.schemas import MAX_ID, DocumentBody
from serve.texts import TextError, check_count
from tdro_ray.errors import DataError, TdroError
from tdro_ray.index import store
from tdro_ray.index.base import ChangesFullError, RetrievalIndex, Written
from tdro_ray.index.changes import Change
from tdro_ray.index.filters import TYPES, fitting, is_unicode
from tdro_ray.index.versions import BusyError

if TYPE_CHECKING:
    from serve.engine import Engine

COMMIT_CHANGES = 2048  # changes per commit, over all requests
MAX_DEPTH = 32  # nested lists and objects of metadata: an answer must be able to hold them
FIRST_WAIT_S, LONGEST_WAIT_S = 10.0, 600.0  # between tries of a merge that fails

Merger = Callable[
    [Path], dict[str, Any] | None
]  # merges an index folder; the manifest, or None where nothing was to merge

log = logging.getLogger(__name__)


class Writer:
    """Writes of one replica. Several replicas may write: the log orders them, and one of them merges."""

    def __init__(self, engine: Engine, merger: Merger | None = None) -> None:
        self.engine, self.merger = engine, merger
        self.batcher = Batcher(self._commit, COMMIT_CHANGES, engine.limits.max_waiting, "write")
        self.last_merge: dict[str, Any] | None = None
        self.merge_error = ""
        self._full = False  # a write was refused
        self._wait_s, self._next_try = FIRST_WAIT_S, 0.0
        self._stop = threading.Event()

    async def upsert(self, documents: Sequence[DocumentBody]) -> tuple[Written, str]:
        """Add or replace documents; on return they are on the disk and the next search of any replica sees them.

        Gives what was written and the index version that it was written beside. A document's vector is what
        `tdro index` would give it. Raises RequestError for what cannot be taken; then nothing of the request is.
        """
        self._check_writable()
        async with self.engine.turn():  # a vector goes beside the index of the model that made it
            records = self._check_documents(documents)
            vectors = await self._embed(records)
            changes = [
                Change("upsert", r["id"], r["title"], r["text"], r["metadata"], v)
                for r, v in zip(records, vectors, strict=True)
            ]
            return await self._write(changes)

    async def delete(self, id: str) -> tuple[Written, str]:
        """Delete a document; what was written counts 0 where there was none."""
        self._check_writable()
        if problem := _id_problem(id):
            raise RequestError(422, "invalid_request", f"The id {problem}.")
        async with self.engine.turn():
            return await self._write([Change("delete", id)])

    def start(self, every_s: float) -> None:
        """Look after the index every `every_s` seconds until `close`."""
        # A daemon: a merge under way does not hold up the end of the process, and an unfinished one leaves no trace.
        threading.Thread(target=self._maintain, args=(every_s,), name="maintain", daemon=True).start()

    def close(self) -> None:
        """Commit what waits, take nothing more."""
        self._stop.set()
        self.batcher.close()

    def info(self) -> dict[str, Any]:
        """Changes and merges, for people."""
        view, merged_seq = self.engine.on_index(lambda index: (index.overlay.view(), index.overlay.merged_seq))
        return {
            "writable": self.engine.limits.writable,
            "seq": view.seq,
            "unmerged": view.seq - merged_seq,
            "last_merge": self.last_merge,
            "merge_error": self.merge_error or None,
        }

    def unmerged(self) -> int:
        """Number of changes that the served version has not merged; 0 without an index."""
        return int(self.info()["unmerged"]) if self.engine.index is not None else 0

    def tend(self) -> None:
        """Do what is due: take on documents of another model, merge. Errors of a merge are kept for `info`."""
        if not self.engine.limits.writable or self.engine.index_folder is None:
            return
        self.engine.on_index(self._adopt)
        if time.monotonic() >= self._next_try and self.engine.on_index(self._due):
            self._merge()

    # ------------------------------------------------------------ worker threads

    def _commit(self, _: None, requests: list[list[Change]]) -> list[tuple[Written, str]]:
        self.engine.refresh()  # what is written beside an old version of another model would not be searched
        limit = self.engine.limits.max_unmerged

        def write(index: RetrievalIndex) -> list[tuple[Written, str]]:
            return [(written, index.version) for written in index.write(requests, limit)]

        return self.engine.on_index(write)

    def _maintain(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                self.tend()
            except TdroError as err:
                log.error("The index could not be looked after: %s", err)
            except Exception:
                log.exception("The index could not be looked after")

    def _due(self, index: RetrievalIndex) -> bool:
        view, limits = index.overlay.view(), self.engine.limits
        unmerged = view.seq - index.overlay.merged_seq
        old = bool(unmerged) and time.time() - view.oldest > limits.merge_age_s
        return unmerged >= limits.merge_after or old or (self._full and unmerged > 0)

    def _merge(self) -> None:
        from tdro_ray.index.merge import merge

        folder = self.engine.index_folder
        assert folder is not None, "nothing is due without a folder"
        try:
            made = (self.merger or merge)(folder)
        except BusyError:  # another replica merges, or a build runs
            return
        except Exception as err:
            self.merge_error = str(err).strip()[:1000] or type(err).__name__
            self._next_try = time.monotonic() + self._wait_s
            log.error("The changes could not be merged, again in %.0f s: %s", self._wait_s, self.merge_error)
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
            return
        self.merge_error, self._wait_s, self._full = "", FIRST_WAIT_S, False
        if made is not None:
            self.last_merge = {key: made.get(key) for key in ("version", "documents", "created", "seconds")}
            log.info("Merged the changes into version %s in %s s", made["version"], made.get("seconds"))
        self.engine.refresh()

    def _adopt(self, index: RetrievalIndex) -> None:
        if index.overlay.foreign:
            from tdro_ray.index.build import embed_records

            count = index.adopt(
                lambda records: embed_records(self.engine.encoder, records, self.engine.limits.batch_tokens)
            )
            log.info("Embedded %d documents that were written under another model", count)

    # ------------------------------------------------------------ steps of a request

    async def _embed(self, records: list[dict[str, str]]) -> list[np.ndarray]:
        """Unit vectors of documents, made as `index.build.embed_records` makes them, in the engine's batches."""
        places: dict[str, list[int]] = {}  # by task, whose prompt a symmetric one puts in front
        for place, record in enumerate(records):
            places.setdefault(str(json.loads(record["metadata"]).get("task") or ""), []).append(place)
        vectors: list[Any] = [None] * len(records)

        async def embed(task: str, at: list[int]) -> None:
            try:
                found, _ = await self.engine.embed_anew([store.full_text(records[i]) for i in at], "passage", task)
            except TextError as err:
                raise RequestError(422, "invalid_request", f"documents[{at[err.place]}] {err.reason}") from err
            for i, vector in zip(at, found, strict=True):
                vectors[i] = vector

        await asyncio.gather(*(embed(task, at) for task, at in places.items()))
        return vectors

    async def _write(self, changes: list[Change]) -> tuple[Written, str]:
        try:
            return (await self.engine._wait(self.batcher, None, [changes], [len(changes)]))[0]
        except ChangesFullError as err:
            self._full = True
            raise RequestError(503, "merge_pending", str(err), {"Retry-After": "5"}) from err
        except PermissionError as err:
            raise RequestError(403, "read_only", "The index folder cannot be written to by this server.") from err
        except OSError as err:  # a full disk, or storage that is gone
            message = f"The change could not be written to the disk: {err.strerror or err}. Send it again once there is room; a repeated write does no harm."
            raise RequestError(503, "not_writable_now", message, {"Retry-After": "30"}) from err
        except TdroError as err:
            # The current version is not this server's to write to: it was built with another model, or is damaged.
            raise RequestError(503, "not_writable_now", str(err), {"Retry-After": "30"}) from err

    # ------------------------------------------------------------ checks

    def _check_writable(self) -> None:
        self.engine._check_open()
        if self.engine.index is None:
            raise RequestError(404, "no_index", "This server was started without an index; it only embeds.")
        if not self.engine.limits.writable or self.engine.index_folder is None:
            raise RequestError(403, "read_only", "This server takes no changes (limits.writable is off).")

    def _check_documents(self, documents: Sequence[DocumentBody]) -> list[dict[str, str]]:
        """Return the documents as stored, metadata as JSON. Raises RequestError that names the first fault."""
        limits, index = self.engine.limits, self.engine.index
        assert index is not None, "checked before"
        check_count("documents", len(documents), limits)
        if len(documents) > limits.max_unmerged:
            raise RequestError(
                413,
                "batch_too_large",
                f"{len(documents)} documents were sent, at most {limits.max_unmerged} may be unmerged.",
            )
        ids: set[str] = set()
        records = []
        for place, document in enumerate(documents):
            where = f"documents[{place}]"
            problem = _id_problem(document.id)
            if problem or document.id in ids:
                raise RequestError(422, "invalid_request", f"{where}.id {problem or 'occurs twice in the request'}.")
            ids.add(document.id)
            record = {"id": document.id, "title": document.title, "text": document.text}
            length = len(store.full_text(record))
            if length > limits.max_characters:
                raise RequestError(
                    413, "text_too_long", f"{where} has {length} characters, at most {limits.max_characters} are taken."
                )
            if not store.full_text(record).strip():
                raise RequestError(422, "invalid_request", f"{where} is empty.")
            if problem := _metadata_problem(document.metadata, index.store.fields):
                raise RequestError(422, "invalid_request", f"{where}.metadata{problem}")
            try:
                records.append(store.checked(**record, metadata=document.metadata, where=where))
            except DataError as err:
                raise RequestError(422, "invalid_request", str(err)) from err
        return records


def _id_problem(id: str) -> str:
    """What is wrong with an id beyond its type; "" where nothing is."""
    if not is_unicode(id):
        return "holds a lone surrogate; it is not valid Unicode"
    if {".", ".."} & set(id.split("/")):
        return "must not have '.' or '..' between slashes: clients resolve them, so that no URL names the document"
    if any(c < " " or c == "\x7f" for c in id):
        return "must not have control characters"
    return "" if 0 < len(id) <= MAX_ID else f"must have 1 to {MAX_ID} characters"


def _metadata_problem(metadata: dict[str, Any], fields: dict[str, str]) -> str:
    for name, value in metadata.items():
        kind = fields.get(name) if name != "id" else None
        if kind and value is not None and fitting(value, kind) is None:
            return f".{name} must be {TYPES[kind]}, as in the other documents."
    if _depth(metadata, MAX_DEPTH) > MAX_DEPTH:
        return f" is nested deeper than {MAX_DEPTH} levels."
    try:
        pydantic_core.to_json(metadata)  # as an answer will write it
    except (ValueError, TypeError) as err:
        return f" cannot be written as JSON: {str(err)[:200]}"
    return ""


def _depth(value: Any, most: int) -> int:
    """Levels of nesting, counted no further than one beyond `most`."""
    if most < 0 or not isinstance(value, dict | list):
        return 0
    children = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(child, most - 1) for child in children), default=0)
