"""Exact search against a naive one, BEIR's own-id rule, the summary's shape, run files there and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tdro_ray.errors import DataError
from tdro_ray.evaluate import benchmark
from tdro_ray.evaluate.benchmark import evaluate_task, read_run, search, summarise, write_run


def unit_vectors(rng: np.random.Generator, count: int, dim: int = 16) -> np.ndarray:
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_search_equals_a_naive_one_in_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, corpus = unit_vectors(rng, 23), unit_vectors(rng, 300)
    query_ids, corpus_ids = [f"q{i}" for i in range(23)], [f"d{i}" for i in range(300)]
    run = search(queries, query_ids, corpus, corpus_ids, 7)
    for query, vector in zip(query_ids, queries, strict=True):
        scores = corpus @ vector
        best = np.argsort(-scores)[:7]
        assert list(run[query]) == [corpus_ids[i] for i in best]
        assert list(run[query].values()) == pytest.approx(scores[best].tolist(), abs=1e-6)
    monkeypatch.setattr(benchmark, "QUERIES_PER_SEARCH", 5)
    assert {q: list(hits) for q, hits in search(queries, query_ids, corpus, corpus_ids, 7).items()} == {
        q: list(hits) for q, hits in run.items()
    }


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 16])
def test_a_corpus_in_parts_gives_the_hits_of_the_whole(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    rng = np.random.default_rng(1)
    queries, corpus = unit_vectors(rng, 9), unit_vectors(rng, 250)
    query_ids, corpus_ids = [f"d{i}" for i in range(9)], [f"d{i}" for i in range(250)]
    whole = search(queries, query_ids, corpus, corpus_ids, 12)
    monkeypatch.setattr(benchmark, "BLOCK_DOCUMENTS", block)
    found = benchmark.ExactSearch(queries, query_ids, 12)
    for start in range(0, 250, 13):
        found.add(corpus[start : start + 13], corpus_ids[start : start + 13])
    for query, hits in found.run().items():
        assert list(hits.values()) == pytest.approx(list(whole[query].values()), abs=1e-6)
        assert query not in hits and len(hits) == 12


def test_a_query_is_never_its_own_hit_and_loses_no_other() -> None:
    corpus = np.eye(4, dtype=np.float32)
    run = search(corpus[:2], ["a", "x"], corpus, ["a", "b", "c", "d"], 3)
    assert set(run["a"]) == {"b", "c", "d"}
    assert len(run["x"]) == 3
    assert next(iter(run["x"])) == "b"  # the document of vector 1, another id


def test_metrics_of_a_task() -> None:
    vectors = np.eye(3, dtype=np.float32)
    qrels = {"q0": {"d0": 1}, "q1": {"d0": 1, "d1": 0}, "lost": {"d2": 1}}
    metrics, values, run = evaluate_task(
        vectors[:2], ["q0", "q1"], vectors, ["d0", "d1", "d2"], qrels, ndcg_at=1, recall_at=2
    )
    assert values == {"ndcg@1": {"q0": 1.0, "q1": 0.0, "lost": 0.0}, "recall@2": values["recall@2"]}
    assert metrics["ndcg@1"] == pytest.approx(1 / 3)
    assert {len(hits) for hits in run.values()} == {2}


def test_bad_vectors_are_refused_by_id() -> None:
    good, bad = np.ones((2, 3)), np.ones((2, 3))
    bad[1, 2] = np.nan
    with pytest.raises(DataError, match="'d1' is not finite"):
        search(good, ["a", "b"], bad, ["d0", "d1"], 1)
    with pytest.raises(DataError, match=r"shape \(2, D\)"):
        search(np.ones((3, 3)), ["a", "b"], good, ["d0", "d1"], 1)
    with pytest.raises(DataError, match="'d0' more than once"):
        search(good, ["a", "b"], good, ["d0", "d0"], 1)
    with pytest.raises(DataError, match="3 dimensions, corpus vectors 4"):
        search(good, ["a", "b"], np.ones((1, 4)), ["d0"], 1)
    with pytest.raises(DataError, match="no corpus vectors"):
        search(good, ["a", "b"], np.ones((0, 3)), [], 1)


def test_summary_has_the_shape_that_others_rely_on() -> None:
    tasks = {"b": {"ndcg@10": 0.2, "recall@100": 0.9}, "a": {"ndcg@10": 0.4, "recall@100": 0.5}}
    summary = summarise(tasks)
    assert summary["tasks"] == tasks
    assert summary["mean"] == pytest.approx({"ndcg@10": 0.3, "recall@100": 0.7})
    assert summary["worst"] == {"ndcg@10": 0.2, "recall@100": 0.5}
    assert json.loads(json.dumps(summary)) == summary
    with pytest.raises(DataError, match="held-out test"):
        summarise({})
    with pytest.raises(DataError, match="'a'"):
        summarise({"b": {"ndcg@10": 0.1}, "a": {"ndcg@5": 0.1}})


def test_run_files_come_back_as_they_were(tmp_path) -> None:
    rng = np.random.default_rng(1)
    run = {f"q{i}": {f"d{j}": float(np.float32(rng.normal())) for j in range(5)} for i in range(3)}
    path = tmp_path / "runs" / "task.trec"
    write_run(path, run, tag="uniform")
    assert read_run(path) == run
    assert path.read_text().splitlines()[0].split()[:4] == ["q0", "Q0", "d0", "1"]
    assert [p.name for p in path.parent.iterdir()] == ["task.trec"]


def test_bad_run_files_are_refused_by_line(tmp_path) -> None:
    path = tmp_path / "bad.trec"
    for text, says in [
        ("q Q0 d 1 0.5 t\nq Q0 d 2 x t\n", ":2: expected"),
        ("q Q0 d 1 1 t\nq Q0 d 2 0 t\n", ":2: document 'd'"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            read_run(path)
    with pytest.raises(DataError, match="white space"):
        write_run(path, {"q 1": {"d": 1.0}})
