"""Evaluation of a model on stored tests: a corpus that is streamed through Ray gives what one pass in memory gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tdro_ray.config import ModelSettings, TinyModel
from tdro_ray.data.collection import write_beir
from tdro_ray.data.layouts import open_test
from tdro_ray.errors import DataError
from tdro_ray.evaluate import benchmark, encode
from tdro_ray.evaluate.benchmark import evaluate_task
from tdro_ray.evaluate.encode import evaluate_model
from tdro_ray.model.build import build_base
from tdro_ray.model.encoder import Encoder
from tdro_ray.types import Passage, RetrievalTest, RetrieverSpec

WORDS = ["alpha", "beta", "gamma", "delta", "parse", "read", "write", "file", "date", "time", "list"]


pytestmark = pytest.mark.usefixtures("small_ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=300)
    spec = RetrieverSpec(pooling="mean", query_length=16, passage_length=16)
    build_base(ModelSettings(tiny=tiny, pooling="mean"), spec, iter(WORDS), folder, 0)
    return folder


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RetrievalTest]:
    """Two stored tests, the larger of several blocks, and one in memory."""
    rng, made = np.random.default_rng(0), {}
    for name, documents in (("large", 1500), ("small", 7), ("in memory", 40)):
        corpus = tuple(Passage(f"d{n}", " ".join(rng.choice(WORDS, 5)), "T" * (n % 2)) for n in range(documents))
        queries = {f"q{n}": " ".join(rng.choice(WORDS, 3)) for n in range(300 if name == "large" else 3)}
        qrels = {q: {f"d{rng.integers(documents)}": 1} for q in queries}
        made[name] = RetrievalTest(corpus, queries, qrels)
        if name != "in memory":
            folder = tmp_path_factory.mktemp("tests") / name
            write_beir(folder, made[name])
            made[name] = open_test(folder)
    return made


def settings(num_actors: int) -> dict:
    return {
        "num_actors": num_actors, "cpus": 1.0, "use_gpu": False, "batch_tokens": 2048, "ndcg_at": 10, "recall_at": 20,
        "name": "evaluate:test",
    }  # fmt: skip


@pytest.mark.parametrize("num_actors", [0, 2])
def test_streamed_as_in_one_pass(
    model: Path, tests: dict[str, RetrievalTest], num_actors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "SMALL", 0)
    encoder, seen = Encoder.load(model), []
    metrics, queries, runs = evaluate_model(
        model, tests, **settings(num_actors), progress=lambda done, total: seen.append((done, total))
    )
    assert list(metrics) == list(tests) and seen[-1] == (1853, 1853)
    for name, test in tests.items():
        corpus = list(test.corpus)
        expected, values, run = evaluate_task(
            encoder.encode(list(test.queries.values()), "query", name), list(test.queries),
            encoder.encode([p.full_text for p in corpus], "passage", name), [p.docid for p in corpus],
            test.qrels, 10, 20,
        )  # fmt: skip
        assert metrics[name] == pytest.approx(expected, abs=0.02) and len(runs[name]) == len(run)
        for query in list(run)[:20]:
            assert list(runs[name][query].values()) == pytest.approx(list(run[query].values()), abs=1e-5)
        assert set(queries[name]) == set(values["ndcg@10"])
    if num_actors == 0:
        monkeypatch.setattr(benchmark, "BLOCK_DOCUMENTS", 300)
        again = evaluate_model(model, tests, **settings(0))[2]
        for query, hits in runs["large"].items():
            assert list(again["large"][query].values()) == pytest.approx(list(hits.values()), abs=1e-6)


@pytest.mark.parametrize("num_actors", [0, 1])
def test_a_bad_document_is_one_message(
    model: Path, tmp_path: Path, num_actors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "SMALL", 0)
    write_beir(tmp_path, RetrievalTest((Passage("d", "text"),), {"q": "asked"}, {"q": {"d": 1}}))
    (tmp_path / "corpus.jsonl.gz").unlink()
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "d", "text": "t"}) + '\n{"_id": "e"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:2: field 'text' must be a string") as error:
        evaluate_model(model, {"t": open_test(tmp_path)}, **settings(num_actors))
    assert "Traceback" not in str(error.value)


def test_an_empty_corpus_and_repeated_ids(model: Path) -> None:
    test = RetrievalTest((), {"q": "asked"}, {"q": {"d": 1}})
    with pytest.raises(DataError, match="no corpus vectors"):
        evaluate_model(model, {"t": test}, **settings(0))
    twice = replace(test, corpus=tuple(Passage("d", f"text {n}") for n in range(2)))
    with pytest.raises(DataError, match="corpus ids hold 'd' more than once"):
        evaluate_model(model, {"t": twice}, **settings(0))
