"""How good an index is: queries near its own vectors, their exact answers, and the search width that finds enough of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

RECALL_AT = 10
RECALL_QUERIES = 200
RECALL_NOISE = 2.0  # 2-norm of what is added to a document's vector to make a query: cosine about 0.45, as of questions
TIE = 1e-6  # scores this near to the tenth best count as the tenth best: equal documents have equal vectors

Blocks = Callable[[], Iterator[np.ndarray]]  # a fresh pass over all vectors in row order, float32 (n, D) at a time


def sample(blocks: Blocks, count: int, seed: int, train_rows: int) -> tuple[np.ndarray, np.ndarray]:
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


class Exact:
    """Exact best rows of a few queries, over blocks as they pass."""

    def __init__(self, queries: np.ndarray, depth: int = RECALL_AT + 40) -> None:
        self.queries, self.depth = queries, depth
        self.scores = np.zeros((len(queries), 0), np.float32)
        self.rows = np.zeros((len(queries), 0), np.int64)

    def add(self, block: np.ndarray, start: int) -> None:
        import faiss

        scores, rows = faiss.knn(self.queries, block, min(self.depth, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        self.merge(scores, rows + start)

    def merge(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Take in the best scores and rows of other vectors, both (Q, n)."""
        scores, rows = np.hstack([self.scores, scores]), np.hstack([self.rows, rows])
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


def widen(
    index: Any, owner: Any, name: str, widths: tuple[int, ...], queries: np.ndarray, truth: Exact, target: float
) -> tuple[float, dict[str, int]]:
    """Set the narrowest search that reaches `target`, or comes within 0.005 of the best; return recall and setting.

    `name` is the attribute of `owner` that holds the width; without `widths` there is nothing to set.
    """
    if not widths:
        return truth.recall(index.search(queries, RECALL_AT)[1]), {}
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
