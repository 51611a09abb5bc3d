"""`RetrievalIndex`: vectors in, documents out. The one way in which the other rooms search and write.

An open index is one immutable version (see `versions`) and the changes that it has not merged (see `changes`, `overlay`).
A new version is opened beside it and takes its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import DataError, ResourceError
from tdro_ray.index import faiss_index, versions
from tdro_ray.index.changes import Change, ChangeLog, StaleError
from tdro_ray.index.overlay import Overlay, View
from tdro_ray.index.store import DocumentStore

# A filter that leaves at most this many rows is answered exactly from the stored vectors: a graph or cell index
# searches badly among few allowed rows, and comparing with them all costs about a millisecond.
EXACT_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Hit:
    """One found document. `score` is the cosine of the query's and the document's vector."""

    id: str
    score: float
    text: str
    title: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one request's changes."""

    count: int  # that changed something
    seq: int  # of the last change committed before or with it


class ChangesFullError(ResourceError):
    """Too many changes wait to be merged."""


class RetrievalIndex:
    """One opened version with the changes made since; safe to use from several threads."""

    def __init__(self, version_folder: Path, log: ChangeLog | None = None, device: str = "cpu") -> None:
        self.folder, self.log = Path(version_folder), log
        self.version = self.folder.name
        self.manifest = versions.manifest(self.folder)
        self.dim: int = self.manifest["dim"]
        self.store = DocumentStore(self.folder / "documents.lance")
        self.faiss = faiss_index.to_device(faiss_index.load(self.folder / "index.faiss"), device)
        if not self.faiss.ntotal == len(self.store) == len(self.store.lookup) == self.manifest["documents"]:
            raise DataError(
                f"Index version {self.folder} does not fit together: {self.faiss.ntotal} vectors, {len(self.store)} documents, "
                f"{self.manifest['documents']} in the manifest. Build the index again with `tdro index`."
            )
        self.model_hash: str = self.manifest.get("model", {}).get("hash", "")
        self.overlay = Overlay(log, self.manifest.get("merged_seq", 0), self.dim, self.model_hash, self.store.find)
        self.overlay.view()

    @classmethod
    def open(cls, out_folder: str | Path, device: str = "cpu") -> RetrievalIndex:
        """Open the current version under `out_folder`, and follow its changes.

        `device` "cuda" holds the vectors on a GPU. Raises DataError where no version is complete, ConfigError where the
        device is not there.
        """
        while True:
            folder = versions.current(out_folder)
            try:
                return cls(folder, ChangeLog(out_folder), device)
            except (DataError, OSError, ValueError):  # two merges later its files are gone
                if versions.current(out_folder) == folder:
                    raise

    def __len__(self) -> int:
        view = self.overlay.view()
        return len(self.store) - len(view.hidden) + view.documents

    def search(self, vectors: np.ndarray, k: int, filter: dict[str, Any] | None = None) -> list[list[Hit]]:
        """Return the k documents nearest to each vector, best first; fewer where fewer exist or pass the filter.

        Every change acknowledged before the call is seen. `vectors` (Q, D) of any length but zero: they are brought to
        unit length, so that scores are cosines. Raises DataError for vectors of a wrong shape, FilterError for a filter
        that cannot be applied, StaleError where the version must be opened again.
        """
        unit = unit_rows(vectors, self.dim)
        with self._while_it_is_kept():
            return self._search(unit, k, filter)

    def _search(self, unit: np.ndarray, k: int, filter: dict[str, Any] | None) -> list[list[Hit]]:
        view = self.overlay.view()
        scores, rows = self._search_base(unit, k, filter, view)
        documents = iter(self.store.take(rows[rows >= 0]))
        found = [
            [Hit(score=float(score), **next(documents)) for score, row in zip(*pair, strict=True) if row >= 0]
            for pair in zip(scores, rows, strict=True)
        ]
        if not view.documents:
            return found
        for hits, scores_k, places in zip(found, *view.search(unit, k, filter, self.store.fields), strict=True):
            hits += [Hit(score=float(s), **view.document(p)) for s, p in zip(scores_k, places, strict=True)]
            hits.sort(key=lambda hit: -hit.score)
            del hits[k:]
        return found

    def _search_base(
        self, unit: np.ndarray, k: int, filter: dict[str, Any] | None, view: View
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and row numbers, both (Q, k or fewer), of rows that are not hidden; row -1 where there is no further hit."""
        if filter is None:
            return faiss_index.search_without(self.faiss, unit, min(k, len(self.store)), view.hidden)
        allowed = self.store.where(filter)
        if len(view.hidden):
            at = np.searchsorted(allowed, view.hidden)
            at = at[at < len(allowed)]
            allowed = np.delete(allowed, at[np.isin(allowed[at], view.hidden)])
        k = min(k, len(self.store))
        if len(allowed) <= EXACT_ROWS:
            return faiss_index.search_exact(unit, self.store.vectors(allowed), allowed, k)
        return faiss_index.search(self.faiss, unit, k, allowed)

    def adopt(self, embed: Callable[[list[dict[str, Any]]], np.ndarray]) -> int:
        """Write documents that came in under another model again, with this one's vectors; return how many.

        They are what a server wrote while the index was being built anew with this model. `embed` gives unit vectors,
        float32 (n, D), of records with title, text and metadata.
        """
        assert self.log is not None, "a version opened by itself has no log"
        waiting = list(self.overlay.foreign.values())
        vectors = embed(waiting)
        with self.log.locked():
            view = self.overlay.view()
            rows = [
                Change("upsert", c["id"], c["title"], c["text"], c["metadata"], vector)
                for c, vector in zip(waiting, vectors, strict=True)
                if self.overlay.foreign.get(c["id"]) == c  # neither changed nor taken on by another replica meanwhile
            ]
            if rows:
                self.log.append(rows, view.seq + 1, self.model_hash)
        return len(rows)

    @contextlib.contextmanager
    def _while_it_is_kept(self) -> Iterator[None]:
        """Turn a failure to read into StaleError where the version has been removed, two merges after it was current."""
        try:
            yield
        except (OSError, ValueError) as err:
            if self.folder.exists():
                raise
            raise StaleError(f"Index version {self.folder} is no longer kept; open the current version.") from err

    def write(self, requests: Sequence[Sequence[Change]], max_unmerged: int) -> list[Written]:
        """Commit the changes of several requests at once and return what became of each; on return all are on the disk.

        A delete of an id that is not there changes nothing. Vectors must be the model's, of unit length.
        Raises ChangesFullError where more than `max_unmerged` changes would wait for a merge, StaleError as `search`.
        """
        assert self.log is not None, "a version opened by itself has no log"
        with self.log.locked(), self._while_it_is_kept():
            view = self.overlay.view()
            there = self.overlay.has([c.id for changes in requests for c in changes if c.op == "delete"])
            rows: list[Change] = []
            written: list[Written] = []
            for changes in requests:
                effective = 0
                for change in changes:
                    if change.op == "upsert" or there[change.id]:
                        rows.append(change)
                        effective += 1
                    there[change.id] = change.op == "upsert"
                written.append(Written(effective, view.seq + len(rows)))
            if view.seq + len(rows) - self.overlay.merged_seq > max_unmerged:
                raise ChangesFullError(
                    f"{view.seq - self.overlay.merged_seq} changes wait to be merged into the index, at most {max_unmerged} may. "
                    "A merge is due; try again in a few seconds."
                )
            if rows:
                self.log.append(rows, view.seq + 1, self.model_hash)
        return written


def unit_rows(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Return `vectors` as float32 (Q, dim) of unit length. Raises DataError for another shape, NaN, infinity or zero rows."""
    rows = np.asarray(vectors, np.float64)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise DataError(f"Vectors must have {dim} dimensions each, got an array of shape {rows.shape}.")
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    if not np.isfinite(largest).all() or not (largest > 0).all():
        bad = int(np.flatnonzero(~(np.isfinite(largest) & (largest > 0))[:, 0])[0])
        raise DataError(f"Vector {bad} is zero or holds NaN or infinity; a vector needs a direction.")
    rows = rows / largest  # squares of very large or small numbers would leave the range of a float
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
