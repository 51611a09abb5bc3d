"""A small index that changes: documents with given vectors, and what a reader must then find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.index import store, versions
from tdro_ray.index.base import RetrievalIndex
from tdro_ray.index.changes import Change

DIM = 16
MODEL = "m" * 64


def vector_of(number: int) -> np.ndarray:
    """A unit vector of its own for every number."""
    vector = np.random.default_rng(number).standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def document(number: int, id: str = "") -> store.Document:
    """Document `number`: its vector, text and metadata follow from the number."""
    metadata = {"task": ("nq", "fever")[number % 2], "year": number % 7, "number": number}
    return id or f"d{number}", f"title {number}", f"text {number}", metadata


def make_version(
    out: Path,
    docs: list[store.Document],
    vectors: np.ndarray,
    factory: str = "Flat",
    merged_seq: int = 0,
    model: str = MODEL,
) -> str:
    """What `build_index` does, with given vectors in place of a model and Ray; returns the version's name."""
    from tdro_ray.index.build import complete

    with versions.new_version(out) as (name, folder):
        _, fields = store.write_documents(folder / "documents.lance", docs)
        mapped = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, vectors.shape)
        mapped[:] = vectors
        record = {"version": name, "model": {"name": "fake", "hash": model}, "merged_seq": merged_seq}
        rules = {"factory": factory, "target_recall": 0.98, "min_recall": 0.0}
        complete(folder, record, mapped, fields, rules, 0.0)
    return name


def make_index(out: Path, count: int, factory: str = "Flat") -> RetrievalIndex:
    """An index of documents 0 .. count-1."""
    make_version(out, [document(n) for n in range(count)], np.stack([vector_of(n) for n in range(count)]), factory)
    return RetrievalIndex.open(out)


def upsert(number: int, id: str = "") -> Change:
    """The change that makes `id` document `number`."""
    id, title, text, metadata = document(number, id)
    return Change("upsert", id, title, text, json.dumps(metadata), vector_of(number))


def delete(id: str) -> Change:
    return Change("delete", id)


def write(index: RetrievalIndex, *changes: Change) -> int:
    """Write one request and return its seq."""
    return index.write([changes], 10_000)[0].seq


def contents(index: RetrievalIndex) -> dict[str, tuple[int, float]]:
    """Id -> (number, score) of every document that a search finds."""
    hits = index.search(vector_of(10**6)[None], len(index) + 5)[0]
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    found = {hit.id: (hit.metadata["number"], hit.score) for hit in hits}
    assert len(found) == len(hits) == len(index)
    return found


def expected(state: dict[str, int]) -> dict[str, tuple[int, Any]]:
    """What `contents` must give where `state` maps each id to its document's number."""
    from pytest import approx

    query = vector_of(10**6)
    return {id: (number, approx(float(vector_of(number) @ query), abs=1e-5)) for id, number in state.items()}
