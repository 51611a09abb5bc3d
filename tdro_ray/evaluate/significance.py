"""Is the difference between two models more than chance? Paired tests over queries. Knows numpy and scipy only.

Every p-value here asks about the test queries: would another sample of queries agree? It says nothing about
training noise; another seed of the same run can move a score by more than the interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tdro_ray.errors import DataError

RESAMPLES = 10_000
CHUNK = 4_000_000  # random numbers held at once


@dataclass(frozen=True, slots=True)
class Comparison:
    """Model A minus model B over the same queries."""

    mean_diff: float
    low: float  # lower end of the interval of the mean difference
    high: float
    p: float  # two-sided paired randomisation test
    p_t: float  # two-sided paired t-test, for comparison; nan where it does not exist
    queries: int


def compare(
    a: Mapping[str, float], b: Mapping[str, float], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Return the paired comparison of two models' scores `{query id: score}` on one task.

    The interval is the percentile bootstrap of the mean difference over queries. Raises DataError when the
    models did not answer the same queries.
    """
    return compare_mean({"": a}, {"": b}, confidence, resamples, seed)


def compare_mean(
    a: Mapping[str, Mapping[str, float]],
    b: Mapping[str, Mapping[str, float]],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Return the paired comparison of the mean over tasks of `{task: {query id: score}}`, every task weighing the same.

    Tasks are taken as given, queries are drawn anew within each task. The statistic is D = mean_g mean_i d_gi.
    - p: each d_gi gets a random sign (exact over all 2^n signs where these are no more than `resamples`), as
      scipy.stats.permutation_test(permutation_type="samples") does.
    - low, high: percentiles of D over queries drawn with replacement within each task.
    - p_t: t = D / sqrt(sum_g var_g / n_g) / G with Welch-Satterthwaite degrees of freedom; for one task that is
      the paired t-test.
    Raises DataError when the models did not answer the same queries of the same tasks.
    """
    differences = [_differences(a, b, task) for task in _same(a, b, "tasks")]
    observed = float(np.mean([d.mean() for d in differences]))
    rng = np.random.default_rng(seed)
    bootstrap = np.mean([_bootstrap_means(d, resamples, rng) for d in differences], axis=0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(bootstrap, [tail, 1 - tail])
    return Comparison(
        mean_diff=observed,
        low=float(low),
        high=float(high),
        p=_sign_flip_p(np.concatenate([d / len(d) for d in differences]) / len(differences), resamples, rng),
        p_t=_t_test_p(differences),
        queries=sum(len(d) for d in differences),
    )


def compare_tasks(
    a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]], **options: float
) -> dict[str, tuple[Comparison, float]]:
    """Return `{task: (comparison, p after Holm's correction over the tasks)}` of `{task: {query id: score}}`."""
    found = {task: compare(a[task], b[task], **options) for task in _same(a, b, "tasks")}  # type: ignore[arg-type]
    adjusted = holm({task: comparison.p for task, comparison in found.items()})
    return {task: (comparison, adjusted[task]) for task, comparison in found.items()}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values after Holm's step-down correction: p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j))."""
    adjusted, highest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def _same(a: Mapping[str, object], b: Mapping[str, object], what: str) -> list[str]:
    if set(a) != set(b) or not a:
        odd = sorted(set(a) ^ set(b))
        raise DataError(
            f"A paired comparison needs the same {what} on both sides and at least one; "
            f"{len(a)} against {len(b)}, on one side only: {', '.join(odd[:5]) or 'none'}. Evaluate both models on the same tests."
        )
    return sorted(a)


def _differences(a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]], task: str) -> np.ndarray:
    queries = _same(a[task], b[task], f"queries of task {task}" if task else "queries")
    return np.array([a[task][q] - b[task][q] for q in queries], dtype=np.float64)


def _bootstrap_means(d: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `resamples` samples of d with replacement, in chunks that bound the memory."""
    rows = max(1, CHUNK // len(d))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([d[rng.integers(0, len(d), (size, len(d)))].mean(axis=1) for size in sizes])


def _sign_flip_p(parts: np.ndarray, resamples: int, rng: np.random.Generator) -> float:
    """Share of sign patterns whose |sum of parts| is at least the observed one."""
    parts = parts[parts != 0]  # a zero has no sign to flip
    if parts.size == 0:
        return 1.0
    observed = abs(parts.sum()) * (1 - 1e-12)  # a sum in another order must not fall below itself
    exact = parts.size < 60 and 2**parts.size <= resamples
    total = 2**parts.size if exact else resamples
    rows, reached = max(1, CHUNK // parts.size), 0
    for start in range(0, total, rows):
        size = min(rows, total - start)
        if exact:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(parts.size)) & 1
        else:
            bits = rng.integers(0, 2, (size, parts.size), dtype=np.int8)
        reached += int((np.abs((2.0 * bits - 1.0) @ parts) >= observed).sum())
    return reached / total if exact else (reached + 1) / (total + 1)


def _t_test_p(differences: list[np.ndarray]) -> float:
    from scipy.stats import t as student

    if any(len(d) < 2 for d in differences):
        return float("nan")
    variances = np.array([d.var(ddof=1) / len(d) for d in differences])
    if variances.sum() == 0:
        return 1.0 if all(d.mean() == 0 for d in differences) else 0.0
    freedom = variances.sum() ** 2 / sum(v**2 / (len(d) - 1) for v, d in zip(variances, differences, strict=True))
    statistic = sum(d.mean() for d in differences) / np.sqrt(variances.sum())
    return float(2 * student.sf(abs(statistic), freedom))
