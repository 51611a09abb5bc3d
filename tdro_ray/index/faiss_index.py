"""FAISS by factory string, inner product on unit vectors. Knows nothing of documents, versions or Ray.

The kinds of index differ in how a search is widened (`efSearch`, `nprobe`), whether it takes a selector of rows,
and whether it must be trained; these three questions are answered here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import ConfigError, DataError
from tdro_ray.index.filters import FilterError
from tdro_ray.index.recall import RECALL_AT, Blocks, Exact, sample, widen

EF_CONSTRUCTION = 200  # HNSW: candidates per inserted vector
EF_SEARCH = (64, 128, 192, 256, 384, 512)  # tried in turn at build until the recall is reached
REFINE_FACTOR = 8  # "…,RFlat": candidates compared exactly, times k
MAX_TRAIN_ROWS = 262_144  # vectors a trained kind sees; FAISS itself takes at most 256 per centroid

Add = Callable[[Any, Exact], int]  # adds all vectors to a trained index, and to the exact answers; returns how many


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
    device: str = "cpu",
    add: Add | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Return the index over `count` vectors and ``{"factory", "recall@10", "search"}``.

    The first pass takes a sample to train with and to make queries from, the second adds the vectors and searches
    the queries exactly beside it; `add` does the second otherwise, for a kind that is `shardable`. The search is then
    widened until `target_recall` (or what the kind can reach). `device` "cuda" trains and adds on a GPU.
    Raises ConfigError for a factory string that FAISS refuses or that wants more vectors than there are, or a device
    that is not there; DataError where the recall stays below `min_recall`.
    """
    index = to_device(make(dim, factory, count), device)
    train, queries = sample(blocks, count, seed, MAX_TRAIN_ROWS if not index.is_trained else 0)
    if not index.is_trained:
        try:
            index.train(train)
        except RuntimeError as err:
            reason = str(err).rpartition("failed: ")[2]
            raise ConfigError(
                f"index.factory {factory!r} cannot be trained on {len(train)} vectors ({reason}). "
                "Choose fewer cells or codes, or Flat, which needs no training."
            ) from err
    truth = Exact(queries)
    if add is not None and shardable(index):
        done = add(index, truth)
    else:
        done = 0
        for block in blocks():
            index.add(block)
            truth.add(block, done)
            done += len(block)
            if progress:
                progress(done, count)
    if done != count:
        raise DataError(f"{count} vectors were expected, {done} came; the documents changed while they were embedded.")
    index = to_cpu(index, device)
    recall, width = widen(index, *_width(index), queries, truth, target_recall)
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


def shardable(index: Any) -> bool:
    """True for kinds whose parts, trained as one and filled apart, can be put together: plain cells."""
    import faiss

    return type(faiss.downcast_index(index)) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)


def to_device(index: Any, device: str) -> Any:
    """Return the index on `device`: itself for "cpu", a copy on the first GPU for "cuda".

    Raises ConfigError where FAISS or the machine has no GPU, or where the kind of index runs on CPUs only.
    """
    import faiss

    if device == "cpu":
        return index
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        found = "sees no GPU" if hasattr(faiss, "StandardGpuResources") else "is built for CPUs"
        raise ConfigError(
            f"index.device={device} needs FAISS for GPUs; FAISS {faiss.__version__} here {found}. Install the extra `gpu` in place "
            "of `cpu` on a machine with a GPU, or set index.device=cpu."
        )
    resources = faiss.StandardGpuResources()
    try:
        copy = faiss.index_cpu_to_gpu(resources, 0, index)
    except RuntimeError as err:
        kind = type(faiss.downcast_index(index)).__name__
        raise ConfigError(
            f"An index of kind {kind} runs on CPUs only; choose Flat or IVF…, or index.device=cpu."
        ) from err
    copy.referenced_objects = [resources]  # they must live as long as the index
    return copy


def to_cpu(index: Any, device: str) -> Any:
    """Undo `to_device`."""
    import faiss

    return index if device == "cpu" else faiss.index_gpu_to_cpu(index)


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


def _width(index: Any) -> tuple[Any, str, tuple[int, ...]]:
    """What widens the search of a kind: the object, its attribute, and the values to try in turn."""
    import faiss

    graph, cells = _find(index, faiss.IndexHNSW), _find(index, faiss.IndexIVF)
    if graph is not None:
        return graph.hnsw, "efSearch", EF_SEARCH
    if cells is not None:
        return cells, "nprobe", tuple(2**i for i in range(cells.nlist.bit_length()) if 2**i <= cells.nlist)
    return None, "", ()


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
