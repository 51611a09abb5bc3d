"""FAISS by factory string, inner product on unit vectors. Knows nothing of documents, versions or Ray.

The kinds of index differ in how a search is widened (`efSearch`, `nprobe`), whether it takes a selector of rows,
and whether it must be trained; these three questions are answered here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import ConfigError, DataError
from tdro_ray.index.filters import FilterError

EF_CONSTRUCTION = 200  # HNSW: candidates per inserted vector
EF_SEARCH = (32, 64, 128, 256, 512)  # tried in turn at build until the recall is reached
REFINE_FACTOR = 8  # "…,RFlat": candidates compared exactly, times k
MAX_TRAIN_ROWS = 262_144  # vectors a trained kind sees; FAISS itself takes at most 256 per centroid
RECALL_AT = 10
RECALL_QUERIES = 200
RECALL_NOISE = 1.0  # 2-norm of what is added to a document's vector to make a query: cosine about 0.7
TIE = 1e-6  # scores this near to the tenth best count as the tenth best: equal documents have equal vectors

Blocks = Callable[[], Iterator[np.ndarray]]  # a fresh pass over all vectors in row order, float32 (n, D) at a time


def preset(count: int) -> str:
    """Return the factory string for a corpus of `count` vectors: exact while that is fast, then a graph, then cells."""
    if count <= 50_000:
        return "Flat"
    if count <= 5_000_000:
        return "HNSW32"
    return f"IVF{int(4 * count**0.5)}_HNSW32,SQ8"


def make(dim: int, factory: str, count: int) -> Any:
    """Return an empty index for `count` vectors; costs nothing, so it can be tried before the vectors exist.

    Raises ConfigError for a factory string that FAISS cannot make with inner product, or for more cells than vectors.
    """
    import faiss

    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as err:
        reason = str(err).rpartition(": ")[2]
        raise ConfigError(
            f"index.factory {factory!r} is not a FAISS index with inner product over {dim} dimensions ({reason}). "
            "Valid are for example Flat, SQ8, HNSW32, IVF1024,Flat, IVF1024,PQ48 and auto."
        ) from err
    cells = _find(index, faiss.IndexIVF)
    if cells is not None and cells.nlist > count:
        raise ConfigError(
            f"index.factory {factory!r} wants {cells.nlist} cells, but there are only {count} documents. "
            "Choose fewer cells (about 4 times the square root of the documents), or Flat, which needs none."
        )
    graph = _find(index, faiss.IndexHNSW)
    if graph is not None:
        graph.hnsw.efConstruction = EF_CONSTRUCTION
    refine = _find(index, faiss.IndexRefine)
    if refine is not None:
        refine.k_factor = REFINE_FACTOR
    return index


def build(
    blocks: Blocks,
    count: int,
    dim: int,
    factory: str,
    *,
    target_recall: float = 0.98,
    min_recall: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Return the index over `count` vectors and ``{"factory", "recall@10", "search"}``.

    The first pass takes a sample to train with and to make queries from, the second adds the vectors and searches
    the queries exactly beside it. The search is then widened until `target_recall` (or what the kind can reach).
    Raises ConfigError for a factory string that FAISS refuses or that wants more vectors than there are, DataError
    where the recall stays below `min_recall`.
    """
    index = make(dim, factory, count)
    train, queries = _sample(blocks, count, seed, MAX_TRAIN_ROWS if not index.is_trained else 0)
    if not index.is_trained:
        try:
            index.train(train)
        except RuntimeError as err:
            reason = str(err).rpartition("failed: ")[2]
            raise ConfigError(
                f"index.factory {factory!r} cannot be trained on {len(train)} vectors ({reason}). "
                "Choose fewer cells or codes, or Flat, which needs no training."
            ) from err
    truth = _Exact(queries, RECALL_AT + 40)
    done = 0
    for block in blocks():
        index.add(block)
        truth.add(block, done)
        done += len(block)
        if progress:
            progress(done, count)
    if done != count:
        raise DataError(f"{count} vectors were expected, {done} came; the documents changed while they were embedded.")
    recall, width = _widen(index, queries, truth, target_recall)
    if recall < min_recall:
        raise DataError(
            f"The index reaches recall@{RECALL_AT} {recall:.3f}, below the floor {min_recall:.3f}: {factory!r} is too coarse for "
            "these vectors. Choose a finer factory (HNSW32, SQ8, Flat) or lower the floor."
        )
    return index, {"factory": factory, "recall@10": round(recall, 4), "search": width}


def search(index: Any, vectors: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (Q, k) and row numbers (Q, k), best first; row -1 where fewer than k were found.

    `vectors` float32 (Q, D). `rows` restricts the hits to these row numbers; raises FilterError where the kind of
    index takes no selector.
    """
    import faiss

    if rows is None:
        return index.search(vectors, k)
    mask = np.zeros(-(-index.ntotal // 8) * 8, bool)
    mask[rows] = True
    selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    try:
        return index.search(vectors, k, params=_parameters(index, selector))
    except RuntimeError as err:
        raise FilterError(
            f"An index of kind {type(faiss.downcast_index(index)).__name__} cannot search under a filter that selects "
            f"{len(rows)} documents; build the index as Flat, SQ8, HNSW or IVF, or filter more narrowly."
        ) from err


def search_without(index: Any, vectors: np.ndarray, k: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (Q, k) and row numbers (Q, k) as `search` does, of rows that are not among `hidden` (ascending).

    Any kind of index: more hits are fetched than asked for and hidden ones dropped, until k are left or all are seen.
    That is exact where the index is, and a selector over all rows would take Flat's fast path away.
    """
    if not len(hidden):
        return index.search(vectors, k)
    most = min(k + len(hidden), index.ntotal)
    fetch = min(2 * k + 16, most)
    while True:
        scores, rows = index.search(vectors, fetch)
        nearest = hidden[np.minimum(np.searchsorted(hidden, rows), len(hidden) - 1)]
        good = (rows >= 0) & (nearest != rows)
        if fetch == most or ((good.sum(axis=1) >= k) | (rows[:, -1] < 0)).all():
            break
        fetch = min(4 * fetch, most)
    order = np.argsort(~good, axis=1, kind="stable")[:, :k]  # hits in their order, then the dropped ones
    scores, rows, good = (np.take_along_axis(a, order, 1) for a in (scores, rows, good))
    return np.where(good, scores, 0), np.where(good, rows, -1)


def search_exact(
    vectors: np.ndarray, candidates: np.ndarray, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (Q, k) and row numbers (Q, k) by comparing with every vector of `candidates` (n, D), as `search` does."""
    import faiss

    if not len(rows):
        return np.zeros((len(vectors), k), np.float32), np.full((len(vectors), k), -1, np.int64)
    scores, places = faiss.knn(vectors, candidates, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    found = np.asarray(rows, np.int64)[places]
    missing = k - found.shape[1]
    return np.pad(scores, ((0, 0), (0, missing))), np.pad(found, ((0, 0), (0, missing)), constant_values=-1)


def is_exact(index: Any) -> bool:
    """True for a Flat index, which compares with every vector."""
    import faiss

    return isinstance(faiss.downcast_index(index), faiss.IndexFlat)


def save(index: Any, path: str | Path) -> None:
    """Write the index with its search width."""
    import faiss

    faiss.write_index(index, str(path))


def load(path: str | Path) -> Any:
    """Return the index in `path`. Raises DataError where it is missing or damaged."""
    import faiss

    try:
        return faiss.read_index(str(path))
    except RuntimeError as err:
        reason = str(err).rpartition(": ")[2]
        raise DataError(
            f"The FAISS index {path} cannot be read ({reason}). Build the index again with `tdro index`."
        ) from err


def _sample(blocks: Blocks, count: int, seed: int, train_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeded sample of vectors to train with, and queries near sampled vectors: (n, D) and (Q, D)."""
    rng = np.random.default_rng(seed)
    train_at = np.sort(rng.choice(count, min(count, train_rows), replace=False))
    query_at = np.sort(rng.choice(count, min(count, RECALL_QUERIES), replace=False))
    train, near, start = [], [], 0
    for block in blocks():
        inside = lambda at: at[(at >= start) & (at < start + len(block))] - start  # noqa: B023, E731
        train.append(block[inside(train_at)])
        near.append(block[inside(query_at)])
        start += len(block)
    base = np.concatenate(near)
    queries = base + rng.standard_normal(base.shape) * (RECALL_NOISE / base.shape[1] ** 0.5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return np.concatenate(train), queries.astype(np.float32)


class _Exact:
    """Exact best rows of a few queries, over blocks as they pass."""

    def __init__(self, queries: np.ndarray, depth: int) -> None:
        self.queries, self.depth = queries, depth
        self.scores = np.zeros((len(queries), 0), np.float32)
        self.rows = np.zeros((len(queries), 0), np.int64)

    def add(self, block: np.ndarray, start: int) -> None:
        import faiss

        scores, rows = faiss.knn(self.queries, block, min(self.depth, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = np.hstack([self.scores, scores]), np.hstack([self.rows, rows + start])
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.depth]
        self.scores, self.rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def recall(self, found: np.ndarray) -> float:
        """Mean share of the ten best that `found` (Q, 10) holds; rows that tie with the tenth stand for it."""
        depth = min(RECALL_AT, self.rows.shape[1])
        shares = []
        for scores, rows, answer in zip(self.scores, self.rows, found, strict=True):
            good = rows[scores >= scores[depth - 1] - TIE]
            shares.append(min(len(np.intersect1d(good, answer)), depth) / depth)
        return float(np.mean(shares))


def _widen(index: Any, queries: np.ndarray, truth: _Exact, target: float) -> tuple[float, dict[str, int]]:
    """Set the narrowest search that reaches `target`, or comes within 0.005 of the best; return recall and setting."""
    import faiss

    graph, cells = _find(index, faiss.IndexHNSW), _find(index, faiss.IndexIVF)
    if graph is None and cells is None:
        return truth.recall(index.search(queries, RECALL_AT)[1]), {}
    name = "efSearch" if graph is not None else "nprobe"
    owner = graph.hnsw if graph is not None else cells
    widths = (
        EF_SEARCH if graph is not None else tuple(2**i for i in range(cells.nlist.bit_length()) if 2**i <= cells.nlist)
    )
    tried: list[tuple[float, int]] = []
    for width in widths:
        setattr(owner, name, width)
        tried.append((truth.recall(index.search(queries, RECALL_AT)[1]), width))
        if tried[-1][0] >= target:
            break
    best = max(recall for recall, _ in tried)
    enough = target if best >= target else best - 0.005
    recall, width = next((r, w) for r, w in tried if r >= enough)
    setattr(owner, name, width)
    return recall, {name: width}


def _inner(index: Any) -> Any | None:
    """The index that a wrapper (a pre-transform, a refinement) stands around, or None."""
    import faiss

    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_index(index.index)
    if isinstance(index, faiss.IndexRefine):
        return faiss.downcast_index(index.base_index)
    return None


def _find(index: Any, kind: type) -> Any | None:
    """The index of `kind` inside any wrappers, or None."""
    import faiss

    index = faiss.downcast_index(index)
    while index is not None and not isinstance(index, kind):
        index = _inner(index)
    return index


def _parameters(index: Any, selector: Any) -> Any:
    """Search parameters with a selector for the index and what it wraps; the search width stays as built."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(index.index, selector))
    if isinstance(index, faiss.IndexRefine):
        return faiss.IndexRefineSearchParameters(
            k_factor=index.k_factor, base_index_params=_parameters(index.base_index, selector)
        )
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)
