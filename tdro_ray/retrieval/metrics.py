"""Retrieval metrics of a run against qrels, equal to trec_eval's to the last digit. Knows numpy only.

A run is `{query id: {document id: score}}`, qrels are `{query id: {document id: grade}}`; a grade above 0 is
relevant, 0 and below are not. Measures are named `ndcg@k`, `recall@k`, `acc@k` and `mrr@k`.

Rules taken from trec_eval, which differ from a naive reading:
- scores are compared in float32, so scores that differ only in float64 tie;
- ties go to the larger document id, by code point;
- unjudged documents and negative grades add nothing, they do not subtract;
- a judged query without results, or without any relevant document, counts as 0 in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tdro_ray.errors import ConfigError, DataError, nearest

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]


def ndcg(ranked: list[int], judged: list[int], k: int) -> float:
    """Return nDCG@k with linear gain: DCG = sum over ranks r <= k of max(grade, 0) / log2(r + 1), over the best possible.

    `ranked` holds the grades of the hits in rank order (0 for unjudged), `judged` all grades of the query.
    """
    ideal = _dcg(sorted(judged, reverse=True)[:k])
    return _dcg(ranked[:k]) / ideal if ideal > 0 else 0.0


def recall(ranked: list[int], judged: list[int], k: int) -> float:
    """Return the share of the relevant documents that are among the first k hits."""
    relevant = sum(grade > 0 for grade in judged)
    return sum(grade > 0 for grade in ranked[:k]) / relevant if relevant else 0.0


def accuracy(ranked: list[int], judged: list[int], k: int) -> float:
    """Return 1 when any of the first k hits is relevant, else 0 (trec_eval: success@k; MKQA: Acc@k)."""
    return float(any(grade > 0 for grade in ranked[:k]))


def reciprocal_rank(ranked: list[int], judged: list[int], k: int) -> float:
    """Return 1 / rank of the first relevant hit, 0 when it is not among the first k."""
    return next((1.0 / rank for rank, grade in enumerate(ranked[:k], 1) if grade > 0), 0.0)


METRICS: dict[str, Callable[[list[int], list[int], int], float]] = {
    "ndcg": ndcg,
    "recall": recall,
    "acc": accuracy,
    "mrr": reciprocal_rank,
}


def parse_measure(measure: str) -> tuple[str, int]:
    """Return (metric name, k) of a measure such as "ndcg@10". Raises ConfigError for anything else."""
    name, _, k = measure.partition("@")
    if name not in METRICS:
        raise ConfigError(f"No measure {measure!r}.{nearest(name, METRICS)} Write it as name@k, e.g. ndcg@10.")
    if not (k.isascii() and k.isdigit() and int(k) >= 1):
        raise ConfigError(f"Measure {measure!r} needs a cut-off of at least 1, e.g. {name}@10.")
    return name, int(k)


def rank(scores: Mapping[str, float]) -> list[str]:
    """Return the document ids of one query from best to worst: by float32 score, ties by larger id first.

    Raises DataError when a score is not a number.
    """
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores)).astype(np.float32).tolist()
    for docid, value in zip(scores, values, strict=True):
        if value != value:
            raise DataError(f"Score of document {docid!r} is not a number (nan); the model's vectors are not finite.")
    return [docid for _, docid in sorted(zip(values, scores, strict=True), reverse=True)]


def per_query(run: Run, qrels: Qrels, measures: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return `{measure: {query id: value}}` for every judged query, in the order of the qrels.

    Queries of the run that are not judged are left out. Raises ConfigError for an unknown measure.
    """
    parsed = {measure: parse_measure(measure) for measure in measures}
    values: dict[str, dict[str, float]] = {measure: {} for measure in parsed}
    for query, grades in qrels.items():
        judged = list(grades.values())
        ranked = [grades.get(docid, 0) for docid in rank(run.get(query, {}))]
        for measure, (name, k) in parsed.items():
            values[measure][query] = METRICS[name](ranked, judged, k)
    return values


def means(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over queries of each measure that `per_query` gave. Raises DataError where no query is judged."""
    for measure, scores in values.items():
        if not scores:
            raise DataError(f"No judged query to take the mean of {measure} over; the qrels are empty.")
    return {measure: float(np.mean(list(scores.values()))) for measure, scores in values.items()}


def _dcg(grades: list[int]) -> float:
    gains = np.maximum(np.asarray(grades, dtype=np.float64), 0.0)
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())
