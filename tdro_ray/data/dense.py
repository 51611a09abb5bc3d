"""Hard negatives by an encoder's vectors: exact search (FAISS Flat) and margins against false negatives. Knows no Ray.

Q queries, P passages of a task, D dimensions; vectors have unit length, scores are inner products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdro_ray.config import MineSettings
from tdro_ray.data.collection import Collection

QUERIES_PER_SEARCH = 1024  # bounds the memory of the score blocks that FAISS makes
EXAMPLES, EXAMPLE_TEXT = 5, 200  # in the report: rows of a task, characters of a text


@dataclass(frozen=True)
class DenseHits:
    """What the search found for each query, best first: what the margins left, and how much they took."""

    passages: list[np.ndarray]  # ranks first_rank to last_rank within the margins
    scores: list[np.ndarray]
    positive_Q: np.ndarray  # score of each query's least similar positive
    num_ranked: int  # hits in the ranks, the query's own positives aside
    filtered: list[np.ndarray]  # of these, too near to the positive

    @property
    def num_filtered(self) -> int:
        return sum(map(len, self.filtered))


def dense_hits(
    query_QD: np.ndarray,
    passage_PD: np.ndarray,
    positives: Sequence[Sequence[int]],
    settings: MineSettings,
    use_gpu: bool = False,
) -> DenseHits:
    """Search every query and filter its hits by the margins of `settings`, against its least similar positive."""
    index = _index(passage_PD, use_gpu)
    depth = min(settings.last_rank, len(passage_PD))
    passages, kept_scores, filtered, ranked = [], [], [], 0
    positive_Q = np.array([float((passage_PD[list(p)] @ q).min()) for q, p in zip(query_QD, positives)], np.float32)
    for start in range(0, len(query_QD), QUERIES_PER_SEARCH):
        block_QD = np.ascontiguousarray(query_QD[start : start + QUERIES_PER_SEARCH], np.float32)
        for at, (scores, found) in enumerate(zip(*index.search(block_QD, depth)), start):
            scores, found = scores[settings.first_rank - 1 :], found[settings.first_rank - 1 :]
            other = ~np.isin(found, positives[at])
            keep = other & within_margins(scores, positive_Q[at], settings.margin_absolute, settings.margin_relative)
            ranked += int(other.sum())
            filtered.append(found[other & ~keep])
            passages.append(found[keep])
            kept_scores.append(scores[keep])
    return DenseHits(passages, kept_scores, positive_Q, ranked, filtered)


def within_margins(scores: np.ndarray, positive: float, absolute: float | None, relative: float | None) -> np.ndarray:
    """Return which negatives are far enough below the positive: score <= positive - absolute, and score <= relative *
    positive (NV-Retriever, arXiv 2407.15831, "TopK-PercPos"). Of a positive below zero its distance to zero counts.
    """
    keep = np.ones(len(scores), bool)
    if absolute is not None:
        keep &= scores <= positive - absolute
    if relative is not None:
        keep &= scores <= positive - (1 - relative) * abs(positive)
    return keep


def _index(passage_PD: np.ndarray, use_gpu: bool) -> Any:
    import faiss

    index = faiss.IndexFlatIP(passage_PD.shape[1])
    if use_gpu and hasattr(faiss, "StandardGpuResources"):
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(np.ascontiguousarray(passage_PD, np.float32))
    return index


def mined_margins(hits: DenseHits, negatives: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the score of each query's positive less those of what was mined for it."""
    return [
        positive - scores[np.isin(found, kept)]
        for positive, found, scores, kept in zip(hits.positive_Q, hits.passages, hits.scores, negatives, strict=True)
    ]


def mined_examples(
    hits: DenseHits, negatives: Sequence[Sequence[int]], collection: Collection, records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the first queries with a mined negative: texts and scores of the positive and the best of the negatives."""
    examples: list[dict[str, Any]] = []
    for at, (found, scores) in enumerate(zip(hits.passages, hits.scores, strict=True)):
        if len(examples) == EXAMPLES:
            break
        mined = np.flatnonzero(np.isin(found, negatives[at]))
        if not len(mined):
            continue
        positive, negative = collection.take_texts([records[at]["positives"][0], int(found[mined[0]])])
        examples.append(
            {
                "query": records[at]["query"][:EXAMPLE_TEXT],
                "positive": positive[:EXAMPLE_TEXT],
                "negative": negative[:EXAMPLE_TEXT],
                "positive_score": round(float(hits.positive_Q[at]), 4),
                "negative_score": round(float(scores[mined[0]]), 4),
            }
        )
    return examples


def mining_report(margins: Sequence[np.ndarray], examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mining report: 5th, 50th and 95th percentile of the margins, and examples."""
    margin_X = np.concatenate(margins) if margins else np.zeros(0)
    percentiles = np.percentile(margin_X, [5, 50, 95]) if len(margin_X) else []
    return {"margin_percentiles": [round(float(v), 4) for v in percentiles], "examples": examples}
