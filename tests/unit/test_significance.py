"""Paired comparisons against scipy's, Holm's correction by hand, and error rates on simulated models."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tdro_ray.errors import DataError
from tdro_ray.evaluate.significance import compare, compare_mean, compare_tasks, holm


def scores(rng: np.random.Generator, queries: int, gain: float = 0.0) -> tuple[dict[str, float], dict[str, float]]:
    """Two models' nDCG-like scores on the same queries; the first is better by `gain` on average."""
    base = rng.beta(0.6, 0.8, queries)
    a = np.clip(base + gain + rng.normal(0, 0.15, queries), 0, 1)
    b = np.clip(base + rng.normal(0, 0.15, queries), 0, 1)
    names = [f"q{i}" for i in range(queries)]
    return dict(zip(names, a.tolist(), strict=True)), dict(zip(names, b.tolist(), strict=True))


@pytest.mark.parametrize(("queries", "gain"), [(8, 0.1), (13, 0.0), (150, 0.02), (150, 0.0)])
def test_one_task_agrees_with_scipy(queries: int, gain: float) -> None:
    a, b = scores(np.random.default_rng(queries), queries, gain)
    d = np.array([a[q] - b[q] for q in a])
    ours = compare(a, b)
    assert ours.mean_diff == pytest.approx(d.mean())
    assert ours.p_t == pytest.approx(stats.ttest_rel(list(a.values()), list(b.values())).pvalue)
    theirs = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=10_000, vectorized=True, rng=np.random.default_rng(7)
    )
    exact = 2**queries <= 10_000
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-12 if exact else 0.02)
    interval = stats.bootstrap((d,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(7))
    width = ours.high - ours.low
    assert ours.low == pytest.approx(interval.confidence_interval.low, abs=0.04 * width)
    assert ours.high == pytest.approx(interval.confidence_interval.high, abs=0.04 * width)


def test_chunks_do_not_change_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = scores(np.random.default_rng(1), 12, 0.1)
    whole = compare(a, b)
    monkeypatch.setattr("tdro_ray.evaluate.significance.CHUNK", 50)
    parts = compare(a, b)
    assert parts == whole


def test_mean_over_tasks_weighs_tasks_not_queries() -> None:
    rng = np.random.default_rng(3)
    large_a, large_b = scores(rng, 900)
    small_a, small_b = scores(rng, 40, 0.3)
    both = compare_mean({"large": large_a, "small": small_a}, {"large": large_b, "small": small_b})
    large, small = compare(large_a, large_b), compare(small_a, small_b)
    assert both.mean_diff == pytest.approx((large.mean_diff + small.mean_diff) / 2)
    # half-widths of independent means add in quadrature
    half = np.hypot(large.high - large.low, small.high - small.low) / 2
    assert both.high - both.low == pytest.approx(half, rel=0.05)
    assert both.p == pytest.approx(both.p_t, abs=0.01)
    assert both.queries == 940


def test_p_values_are_uniform_when_nothing_differs() -> None:
    """Of 300 comparisons of equal models about 5 % are below 0.05, and about 95 % of the intervals hold 0."""
    rng = np.random.default_rng(11)
    found = [compare(*scores(rng, 60), resamples=500) for _ in range(300)]
    assert 0.02 <= np.mean([c.p < 0.05 for c in found]) <= 0.09
    assert 0.90 <= np.mean([c.low <= 0 <= c.high for c in found]) <= 0.98


def test_a_real_gain_is_found_and_swapping_the_models_turns_the_sign() -> None:
    a, b = scores(np.random.default_rng(5), 200, 0.08)
    forward, backward = compare(a, b), compare(b, a)
    assert forward.p < 0.001
    assert forward.low > 0
    assert backward.mean_diff == -forward.mean_diff
    assert backward.p == pytest.approx(forward.p, abs=1e-3)


def test_equal_scores_are_no_difference() -> None:
    a, _ = scores(np.random.default_rng(5), 20)
    same = compare(a, a)
    assert (same.mean_diff, same.low, same.high, same.p, same.p_t) == (0, 0, 0, 1, 1)


def test_holm_by_hand_in_any_order() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    expected = {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    assert holm(p) == pytest.approx(expected)
    assert holm(dict(reversed(p.items()))) == pytest.approx(expected)
    assert holm({"x": 0.7, "y": 0.9}) == {"x": 1.0, "y": 1.0}


def test_tasks_are_corrected_together() -> None:
    rng = np.random.default_rng(2)
    pairs = {"same": scores(rng, 80), "better": scores(rng, 80, 0.2)}
    found = compare_tasks({t: a for t, (a, _) in pairs.items()}, {t: b for t, (_, b) in pairs.items()})
    comparison, adjusted = found["better"]
    assert adjusted == pytest.approx(2 * comparison.p)
    assert found["same"][1] >= found["same"][0].p


def test_different_queries_or_tasks_are_refused_and_named() -> None:
    with pytest.raises(DataError, match="q2"):
        compare({"q1": 1.0, "q2": 0.0}, {"q1": 1.0})
    with pytest.raises(DataError, match="same tasks"):
        compare_mean({"t": {"q": 1.0}}, {"u": {"q": 1.0}})
    with pytest.raises(DataError, match="at least one"):
        compare({}, {})
