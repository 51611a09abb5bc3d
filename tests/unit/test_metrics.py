"""Our metrics against a public evaluator (ir-measures over pytrec_eval), and their rules by hand."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdro_ray.errors import ConfigError, DataError
from tdro_ray.retrieval.metrics import means, parse_measure, per_query, rank

THEIRS = {
    "ndcg@1": "nDCG@1",
    "ndcg@3": "nDCG@3",
    "ndcg@10": "nDCG@10",
    "recall@2": "R@2",
    "recall@100": "R@100",
    "acc@1": "Success@1",
    "acc@5": "Success@5",
    "mrr@1000": "RR",  # pytrec_eval has no cut-off; the runs here are shorter than 1000
}


def assert_equal_to_public_evaluator(run, qrels) -> None:
    names = {ir_measures.parse_measure(theirs): ours for ours, theirs in THEIRS.items()}
    ours = per_query(run, qrels, THEIRS)
    # pytrec_eval writes outside its arrays (and may crash) on negative grades; trec_eval gives them no gain
    qrels = {q: {d: max(grade, 0) for d, grade in judged.items()} for q, judged in qrels.items()}
    theirs: dict[str, dict[str, float]] = {name: {} for name in THEIRS}
    for metric in ir_measures.iter_calc(names, qrels, run):
        theirs[names[metric.measure]][metric.query_id] = metric.value
    for measure in THEIRS:
        assert ours[measure] == pytest.approx(theirs[measure], rel=1e-12, abs=1e-12), measure
    aggregate = {names[m]: v for m, v in ir_measures.calc_aggregate(names, qrels, run).items()}
    assert means(ours) == pytest.approx(aggregate, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_random_runs_equal_the_public_evaluator(seed: int) -> None:
    """Ties, graded and negative judgments, judged queries without results, results without judgments."""
    rng = np.random.default_rng(seed)
    docs = [f"d{i}" for i in range(160)] + ["ä", "Z", "z", "日本", "\U0001f600"]
    qrels, run = {}, {}
    for q in range(40):
        judged = rng.choice(docs, size=rng.integers(1, 30), replace=False)
        qrels[f"q{q}"] = {str(d): int(rng.integers(-2, 4)) for d in judged}
        if q % 7:
            hits = rng.choice(docs, size=rng.integers(1, 140), replace=False)
            run[f"q{q}"] = {str(d): float(rng.integers(0, 12)) / 3 for d in hits}
    run["unjudged"] = {"d1": 1.0}
    assert_equal_to_public_evaluator(run, qrels)


docids = st.sampled_from([f"d{i}" for i in range(9)] + ["é", "Z", "10", "9"])


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abc"), st.dictionaries(docids, st.integers(-1, 3), min_size=1), min_size=1, max_size=3
    ),
    st.dictionaries(
        st.sampled_from("abcd"), st.dictionaries(docids, st.floats(-2, 2, width=64), min_size=1), min_size=1
    ),
)
def test_any_run_equals_the_public_evaluator(qrels, run) -> None:
    assert_equal_to_public_evaluator(run, qrels)


def test_scores_that_differ_only_in_float64_tie_and_go_to_the_larger_id() -> None:
    scores = {"a": 0.1 + 1e-12, "b": 0.1, "c": 0.1 - 1e-12, "d": -5.0}
    assert rank(scores) == ["c", "b", "a", "d"]


def test_values_by_hand() -> None:
    qrels = {"q": {"a": 2, "b": 1, "x": -1}, "silent": {"a": 1}, "hopeless": {"a": 0}}
    run = {"q": {"x": 3.0, "b": 2.0, "u": 1.0, "a": 0.5}, "hopeless": {"a": 1.0}}
    values = per_query(run, qrels, ["ndcg@10", "recall@2", "acc@1", "acc@2", "mrr@10", "mrr@1"])
    dcg, ideal = 1 / math.log2(3) + 2 / math.log2(5), 2 + 1 / math.log2(3)
    assert values["ndcg@10"] == pytest.approx({"q": dcg / ideal, "silent": 0.0, "hopeless": 0.0})
    assert values["recall@2"]["q"] == 0.5
    assert (values["acc@1"]["q"], values["acc@2"]["q"]) == (0.0, 1.0)
    assert (values["mrr@10"]["q"], values["mrr@1"]["q"]) == (0.5, 0.0)
    assert means(values)["mrr@10"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(
    ("measure", "says"), [("ncdg@10", "'ndcg'"), ("ndcg", "cut-off"), ("ndcg@0", "cut-off"), ("mrr@x", "cut-off")]
)
def test_unknown_measures_are_refused_with_the_valid_ones(measure: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_measure(measure)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(DataError, match="'b'"):
        rank({"a": 1.0, "b": float("nan")})


def test_the_mean_of_no_query_is_refused() -> None:
    with pytest.raises(DataError, match="recall@5"):
        means(per_query({}, {}, ["recall@5"]))
