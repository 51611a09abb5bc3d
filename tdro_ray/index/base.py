"""`RetrievalIndex`: vectors in, documents out. The one way in which the other rooms search.

An open index is one immutable version; a new version is opened beside it and takes its place (see `versions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import DataError
from tdro_ray.index import faiss_index, versions
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


class RetrievalIndex:
    """One opened version; safe to search from several threads."""

    def __init__(self, version_folder: Path) -> None:
        self.folder = Path(version_folder)
        self.version = self.folder.name
        self.manifest = versions.manifest(self.folder)
        self.dim: int = self.manifest["dim"]
        self.store = DocumentStore(self.folder / "documents.lance")
        self.faiss = faiss_index.load(self.folder / "index.faiss")
        if not self.faiss.ntotal == len(self.store) == self.manifest["documents"]:
            raise DataError(
                f"Index version {self.folder} does not fit together: {self.faiss.ntotal} vectors, {len(self.store)} documents, "
                f"{self.manifest['documents']} in the manifest. Build the index again with `tdro index`."
            )

    @classmethod
    def open(cls, out_folder: str | Path) -> RetrievalIndex:
        """Open the current version under `out_folder`. Raises DataError where none is complete."""
        return cls(versions.current(out_folder))

    def __len__(self) -> int:
        return len(self.store)

    def search(self, vectors: np.ndarray, k: int, filter: dict[str, Any] | None = None) -> list[list[Hit]]:
        """Return the k documents nearest to each vector, best first; fewer where fewer exist or pass the filter.

        `vectors` (Q, D) of any length but zero: they are brought to unit length, so that scores are cosines.
        Raises DataError for vectors of a wrong shape, FilterError for a filter that cannot be applied.
        """
        scores, rows = self.search_rows(vectors, k, filter)
        documents = iter(self.store.take(rows[rows >= 0]))
        return [
            [Hit(score=float(score), **next(documents)) for score, row in zip(*pair, strict=True) if row >= 0]
            for pair in zip(scores, rows, strict=True)
        ]

    def search_rows(
        self, vectors: np.ndarray, k: int, filter: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and row numbers, both (Q, min(k, documents)); row -1 where there is no further hit."""
        unit, k = unit_rows(vectors, self.dim), min(k, len(self))
        if filter is None:
            return faiss_index.search(self.faiss, unit, k)
        allowed = self.store.where(filter)
        if len(allowed) <= EXACT_ROWS:
            return faiss_index.search_exact(unit, self.store.vectors(allowed), allowed, k)
        return faiss_index.search(self.faiss, unit, k, allowed)


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
