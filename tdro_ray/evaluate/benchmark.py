"""Exact retrieval on one test from vectors, the summary over tasks, and TREC run files.

Knows numpy, Arrow for ids (a million strings as Python objects weigh more), and FAISS, imported at first search. Where vectors come from is none of its business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdro_ray.errors import DataError
from tdro_ray.retrieval.metrics import means, per_query

QUERIES_PER_SEARCH = 1024  # bounds the memory of the score blocks that FAISS makes
BLOCK_DOCUMENTS = 1 << 16  # searched at a time: 256 MiB of vectors at 1,024 dimensions


def evaluate_task(
    query_vectors: np.ndarray,
    query_ids: Sequence[str],
    corpus_vectors: np.ndarray,
    corpus_ids: Sequence[str],
    qrels: Mapping[str, Mapping[str, int]],
    ndcg_at: int = 10,
    recall_at: int = 100,
) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Return (metrics, values per query, run) of an exact inner-product search.

    `query_vectors` is (queries, D), `corpus_vectors` (documents, D), both float. `metrics` is
    `{"ndcg@10": x, "recall@100": x}`, per query `{measure: {query id: value}}`, the run
    `{query id: {document id: score}}` with max(ndcg_at, recall_at) hits a query. A judged query without a vector
    counts as 0. Raises DataError for vectors that do not fit their ids or are not finite.
    """
    run = search(query_vectors, query_ids, corpus_vectors, corpus_ids, max(ndcg_at, recall_at))
    return *measured(run, qrels, ndcg_at, recall_at), run


def measured(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]], ndcg_at: int, recall_at: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return (metrics, values per query) of a run."""
    values = per_query(run, qrels, [f"ndcg@{ndcg_at}", f"recall@{recall_at}"])
    return means(values), values


def search(
    query_vectors: np.ndarray, query_ids: Sequence[str], corpus_vectors: np.ndarray, corpus_ids: Sequence[str], k: int
) -> dict[str, dict[str, float]]:
    """Return the k best documents of each query by inner product, `{query id: {document id: score}}`, best first.

    A document with the query's own id is never a hit (BEIR's rule: in duplicate-question tests the queries are
    part of the corpus), and k others are returned all the same.
    """
    found = ExactSearch(query_vectors, query_ids, k)
    found.add(corpus_vectors, corpus_ids)
    return found.run()


class ExactSearch:
    """The k best documents of each query, of a corpus that comes in parts: only one block of vectors is held at a time."""

    def __init__(self, query_vectors: np.ndarray, query_ids: Sequence[str], k: int) -> None:
        self.queries_BD, self.query_ids, self.k = _checked(query_vectors, query_ids, "query"), list(query_ids), k
        _refuse_repeats(pa.array(self.query_ids, pa.string()), "query")
        depth = k + 1  # one more, in case the query itself is among them
        self._best_BK = np.full((len(self.query_ids), depth), -np.inf, np.float32)
        self._place_BK = np.full((len(self.query_ids), depth), -1, np.int64)
        self._ids: list[pa.Array] = []
        self._parts: list[np.ndarray] = []
        self._pending = self._done = 0  # documents whose vectors wait, and that were searched

    def add(self, vectors: np.ndarray, ids: Sequence[str]) -> None:
        """Take the next documents. Raises DataError for vectors that do not fit their ids, or the queries, or are not finite."""
        part_PD = _checked(vectors, ids, "corpus")
        if part_PD.shape[1] != self.queries_BD.shape[1]:
            raise DataError(
                f"Query vectors have {self.queries_BD.shape[1]} dimensions, corpus vectors {part_PD.shape[1]}; encode both with one model."
            )
        self._ids.append(pa.array(ids, pa.string()))
        self._parts.append(part_PD)
        self._pending += len(part_PD)
        if self._pending >= BLOCK_DOCUMENTS:
            self._search()

    def run(self) -> dict[str, dict[str, float]]:
        """Return `{query id: {document id: score}}`, best first. Raises DataError for an id that two documents have."""
        self._search()
        if not self._done:
            raise DataError("The test has no corpus vectors; a test needs at least one query and one document.")
        ids = pa.chunked_array(self._ids)
        _refuse_repeats(ids, "corpus")
        run: dict[str, dict[str, float]] = {}
        for query, scores, places in zip(self.query_ids, self._best_BK, self._place_BK, strict=True):
            found = places >= 0
            docids = ids.take(pa.array(places[found])).to_pylist()
            hits = [hit for hit in zip(docids, scores[found].tolist(), strict=True) if hit[0] != query]
            run[query] = dict(hits[: self.k])
        return run

    def _search(self) -> None:
        """Search what waits, and merge it into the best so far."""
        import faiss

        if not self._pending:
            return
        block_PD = np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0]
        depth = min(self.k + 1, len(block_PD))
        for start in range(0, len(self.query_ids), QUERIES_PER_SEARCH):
            rows = slice(start, start + QUERIES_PER_SEARCH)
            scores, places = faiss.knn(self.queries_BD[rows], block_PD, depth, metric=faiss.METRIC_INNER_PRODUCT)
            scores = np.concatenate([self._best_BK[rows], scores], axis=1)
            places = np.concatenate([self._place_BK[rows], places + self._done], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, : self.k + 1]
            self._best_BK[rows] = np.take_along_axis(scores, order, axis=1)
            self._place_BK[rows] = np.take_along_axis(places, order, axis=1)
        self._done, self._pending, self._parts = self._done + len(block_PD), 0, []


def summarise(per_task: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return `{"tasks": {name: {measure: x}}, "mean": {measure: x}, "worst": {measure: x}}`, what `eval/<model>.json` holds.

    The mean gives every task the same weight; the worst is the lowest task, measure by measure.
    Raises DataError when there is no task, or the tasks do not share their measures.
    """
    if not per_task:
        raise DataError(
            "No task was evaluated: none of the tasks has a held-out test. Add a BEIR test to at least one."
        )
    tasks = {name: dict(metrics) for name, metrics in per_task.items()}
    measures = list(next(iter(tasks.values())))
    for name, metrics in tasks.items():
        if set(metrics) != set(measures):
            raise DataError(
                f"Task {name!r} has the measures {sorted(metrics)}, the first task {sorted(measures)}; they must agree."
            )
    columns = {m: [metrics[m] for metrics in tasks.values()] for m in measures}
    return {
        "tasks": tasks,
        "mean": {m: float(np.mean(column)) for m, column in columns.items()},
        "worst": {m: min(column) for m, column in columns.items()},
    }


def write_run(path: Path, run: Mapping[str, Mapping[str, float]], tag: str = "tdro") -> None:
    """Write a TREC run file, `qid Q0 docid rank score tag`, hits in the order in which the run holds them.

    Scores are written so that reading gives back the same float. Raises DataError for an id or tag that the
    format cannot hold (empty, or with white space).
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as file:
        for query, hits in run.items():
            for rank, (docid, score) in enumerate(hits.items(), 1):
                fields = [query, "Q0", docid, str(rank), repr(float(score)), tag]
                if any(len(field.split()) != 1 for field in fields):
                    raise DataError(
                        f"A TREC run file cannot hold {fields}: ids and tag must not be empty or hold white space."
                    )
                file.write(" ".join(fields) + "\n")
    temporary.replace(path)


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Return the run of a TREC run file. Raises DataError that names the first bad line."""
    run: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.split()
            if not parts:
                continue
            score = _number(parts[4]) if len(parts) == 6 else math.nan
            if math.isnan(score):
                raise DataError(f"{path}:{number}: expected `qid Q0 docid rank score tag`, got {line.rstrip()!r:.120}.")
            hits = run.setdefault(parts[0], {})
            if parts[2] in hits:
                raise DataError(f"{path}:{number}: document {parts[2]!r} is listed twice for query {parts[0]!r}.")
            hits[parts[2]] = score
    return run


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _checked(vectors: np.ndarray, ids: Sequence[str], what: str) -> np.ndarray:
    """Return the vectors as contiguous float32, one finite row per id."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if len(ids) == 0:
        raise DataError(f"The test has no {what} vectors; a test needs at least one query and one document.")
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise DataError(f"{len(ids)} {what} ids need vectors of shape ({len(ids)}, D), got {vectors.shape}.")
    # a float64 sum is finite exactly when every float32 entry is, without a mask as large as the vectors
    if not np.isfinite(vectors.sum(dtype=np.float64)):
        bad = ids[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
        raise DataError(f"The {what} vector of {bad!r} is not finite; the model has diverged. Look at its loss curve.")
    return vectors


def _refuse_repeats(ids: pa.Array | pa.ChunkedArray, what: str) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
    raise DataError(f"The {what} ids hold {repeated!r} more than once; ids must be unique within a test.")
