"""The unmerged changes of one opened version, in memory: what they hide of the version, and their own documents.

    base rows, less `hidden`  +  live overlay documents  =  the documents that a search sees

A `View` is one state, which never changes; a search takes one and is consistent. Buffers grow by appending behind what
older views see, so that a write costs what it brings, not what there is.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tdro_ray.index import filters
from tdro_ray.index.changes import ChangeLog

FindRows = Callable[[Sequence[str]], dict[str, int]]  # ids -> row numbers of the version, of those it has
MASKS = 32  # filters whose answers are kept


class _Buffer:
    """Overlay documents in order of arrival, superseded ones included."""

    def __init__(self, dim: int) -> None:
        self.vectors = np.empty((64, dim), np.float32)
        self.documents: list[dict[str, Any]] = []
        self.masks: OrderedDict[str, np.ndarray] = OrderedDict()
        self.lock = threading.Lock()  # of the masks

    def add(self, document: dict[str, Any], vector: np.ndarray) -> int:
        place = len(self.documents)
        if place == len(self.vectors):
            larger = np.empty((2 * place, self.vectors.shape[1]), np.float32)
            larger[:place] = self.vectors  # views keep the array that they were made with
            self.vectors = larger
        self.vectors[place] = vector
        self.documents.append(document)
        return place

    def mask(self, filter: dict[str, Any], fields: dict[str, str], count: int) -> np.ndarray:
        """Which of the first `count` documents satisfy `filter`; only those that came since the last call are looked at."""
        key = json.dumps(filter, sort_keys=True)
        with self.lock:
            known = self.masks.pop(key, np.zeros(0, bool))
            if len(known) < count:
                test = filters.predicate(filter, fields)
                known = np.concatenate([known, np.array([test(d) for d in self.documents[len(known) : count]], bool)])
            self.masks[key] = known
            if len(self.masks) > MASKS:
                self.masks.popitem(last=False)
        return known[:count]


@dataclass(frozen=True)
class View:
    """One consistent state of an overlay."""

    seq: int  # of the last change that it holds
    hidden: np.ndarray  # base rows that are deleted or replaced, ascending int64
    live: np.ndarray  # (n,) bool: the documents in force, of the buffer's first n
    vectors: np.ndarray  # (n, D) float32
    oldest: float  # time of the first unmerged change, seconds since 1970; 0 where there is none
    _buffer: _Buffer

    @property
    def documents(self) -> int:
        """Number of live overlay documents."""
        return int(self.live.sum())

    def document(self, place: int) -> dict[str, Any]:
        """``{"id", "title", "text", "metadata"}`` of a place."""
        return self._buffer.documents[place]

    def search(
        self, unit: np.ndarray, k: int, filter: dict[str, Any] | None, fields: dict[str, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and places, both (Q, min(k, candidates)), best first, by comparing with every live document."""
        allowed = self.live
        if filter is not None:
            allowed = allowed & self._buffer.mask(filter, fields, len(self.live))
        k = min(k, int(allowed.sum()))
        if not k:
            return np.zeros((len(unit), 0), np.float32), np.zeros((len(unit), 0), np.int64)
        scores = unit @ self.vectors.T
        scores[:, ~allowed] = -np.inf
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k] if k < scores.shape[1] else np.argsort(-scores, axis=1)
        found = np.take_along_axis(scores, best, 1)
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(found, order, 1), np.take_along_axis(best, order, 1)


class Overlay:
    """Follows the change log of a version that has merged everything up to `merged_seq`; safe from several threads."""

    def __init__(self, log: ChangeLog | None, merged_seq: int, dim: int, model: str, find_rows: FindRows) -> None:
        self.merged_seq, self.model = merged_seq, model
        self._tail = log.follow(merged_seq) if log else None  # None: a version by itself, without changes
        self._unapplied: list[pa.Table] = []
        self._find_rows, self._lock = find_rows, threading.Lock()
        self._latest: dict[str, int | None] = {}  # id -> place in the buffer, None where deleted; of all that changed
        self.foreign: dict[str, dict[str, Any]] = {}  # upserts by another model, whose vectors do not compare
        empty = np.empty((0, dim), np.float32)
        self._view = View(merged_seq, np.zeros(0, np.int64), np.zeros(0, bool), empty, 0.0, _Buffer(dim))

    def view(self) -> View:
        """Return the state after every change acknowledged before this call. Raises StaleError (see `changes.Tail`)."""
        with self._lock:
            if self._tail and (table := self._tail.news()) is not None:
                self._unapplied.append(table)
            while self._unapplied:  # one stays where looking up its ids fails, since the log gives each change once
                self._apply(self._unapplied[0])
                del self._unapplied[0]
            return self._view

    def has(self, ids: Sequence[str]) -> dict[str, bool]:
        """Tell of each id whether the documents in force have it."""
        with self._lock:
            known = {id: self._latest[id] is not None for id in ids if id in self._latest}
        unchanged = [id for id in ids if id not in known]
        found = self._find_rows(unchanged) if unchanged else {}
        return known | {id: id in found for id in unchanged}

    def _apply(self, table: pa.Table) -> None:
        before, buffer = self._view, self._view._buffer
        vectors = table["vector"].to_numpy()  # an array a row: Python's numbers would take a hundred times as long
        changes = [
            (change, vector)
            for change, vector in zip(table.drop_columns(["vector"]).to_pylist(), vectors, strict=True)
            if not self._is_foreign(change)
        ]
        changed = list(dict.fromkeys(c["id"] for c, _ in changes if c["id"] not in self._latest))
        hidden = sorted(self._find_rows(changed).values()) if changed else []
        live = np.concatenate([before.live, np.ones(sum(c["op"] == "upsert" for c, _ in changes), bool)])
        for change, vector in changes:
            replaced = self._latest.get(change["id"])
            if replaced is not None:
                live[replaced] = False
            self._latest[change["id"]] = None
            if change["op"] == "upsert":
                document = {key: change[key] for key in ("id", "title", "text")}
                document["metadata"] = json.loads(change["metadata"])
                self._latest[change["id"]] = buffer.add(document, vector)
        self._view = View(
            int(table["seq"][-1].as_py()),
            np.union1d(before.hidden, np.array(hidden, np.int64)),
            live,
            buffer.vectors[: len(live)],
            before.oldest or table["time"][0].as_py() / 1e6,
            buffer,
        )

    def _is_foreign(self, change: dict[str, Any]) -> bool:
        self.foreign.pop(change["id"], None)
        if change["op"] == "delete" or change["model"] == self.model:
            return False
        self.foreign[change["id"]] = change
        return True
