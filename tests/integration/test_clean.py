"""Cleaning on a real Ray: what is dropped leaves training, ingest does not bring it back, a kill changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from tdro_ray.config import CleanSettings, Recipe
from tdro_ray.data import clean as clean_module
from tdro_ray.data import ingest as ingest_module
from tdro_ray.data.audit import audit
from tdro_ray.data.clean import clean
from tdro_ray.data.collection import Collection, CollectionStore, write_beir
from tdro_ray.data.ingest import ingest
from tdro_ray.data.mine import mine
from tdro_ray.errors import DataError
from tdro_ray.types import Passage, RetrievalTest

QUESTION = "how do I convert a list of strings to a list of integers in python"
ASKED = "日本で一番高い山は何という名前の山ですか教えてください"


pytestmark = pytest.mark.usefixtures("small_ray")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """(source, store): `ask` has near queries, `zh` one near the test query of `ask`, both share a query."""
    source = tmp_path / "source"
    fillers = [f"{hex(n * 7919**4)} unlike any other {n * 104729**3}" for n in range(15)]
    rows = {
        "ask": [QUESTION, QUESTION + "?", "what is the shared question of both", *fillers],
        "zh": ["What is the shared question of both", ASKED + "。", "别的问题"],
    }
    for name, queries in rows.items():
        (source / name).mkdir(parents=True)
        lines = [json.dumps([query, f"{name} passage {n}"]) for n, query in enumerate(queries)]
        (source / name / "train.jsonl").write_text("\n".join(lines))
    test = RetrievalTest((Passage("d", "a passage"),), {"q1": ASKED}, {"q1": {"d": 1}})
    write_beir(source / "ask", test)
    ingest(recipe(source), tmp_path / "store")
    return source, tmp_path / "store"


def recipe(source: Path) -> Recipe:
    return Recipe.model_validate(
        {"data": {"sources": [str(source)], "dev_queries": 0}, "mine": {"num_negatives": 2}, "seed": 1}
    )


def cleaned(store: Path, out: Path, key: str = "k", extra: tuple[Path, ...] = (), **settings: Any) -> dict[str, Any]:
    return clean(CleanSettings(**settings), store, ["ask", "zh"], extra, key, out)


def queries(store: Path, name: str) -> list[str]:
    task = CollectionStore(store)[name]
    return task.take_rows(range(len(task)), ["query"])["query"].to_pylist()


@pytest.mark.parametrize("small", [0, 1000], ids=["on Ray", "in this process"])
def test_each_policy_drops_its_rows_and_says_so(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(ingest_module, "SMALL", small)
    _, store = made
    before = {name: CollectionStore(store)[name].manifest for name in ("ask", "zh")}
    report = cleaned(store, tmp_path / "out")
    assert queries(store, "zh") == ["What is the shared question of both", "别的问题"]
    assert CollectionStore(store)["ask"].manifest.hash == before["ask"].hash, "what loses nothing stays as it is"
    assert report["ask"]["counts"] == {"contaminated": 0, "near_duplicates": 1, "across_tasks": 1}
    assert report["zh"] == json.loads((tmp_path / "out" / "clean.json").read_text())["tasks"]["zh"]
    found = [json.loads(line) for line in (tmp_path / "out" / "found" / "zh.jsonl").read_text().splitlines()]
    assert [(f["reason"], f["dropped"], f["row"], f["other"], f["other_id"]) for f in found] == [
        ("contaminated", True, 1, "ask/test", "q1")
    ]
    assert found[0]["query"] == ASKED + "。" and found[0]["other_query"] == ASKED

    cleaned(store, tmp_path / "out", near_duplicates="drop", across_tasks="drop")
    left = queries(store, "ask")
    assert len(left) == 16 and QUESTION in left and QUESTION + "?" not in left
    assert "what is the shared question of both" not in left, "the smaller task keeps it"
    cleaned(store, tmp_path / "out", contaminated="keep")
    assert {name: len(queries(store, name)) for name in before} == {"ask": 18, "zh": 3}, "every cleaning starts anew"
    assert {n: CollectionStore(store)[n].manifest.hash for n in before} == {n: m.hash for n, m in before.items()}


def test_extra_tests_and_the_threshold_count(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, store = made
    write_beir(tmp_path / "mine", RetrievalTest((Passage("d", "p"),), {"x": QUESTION[:-3]}, {"x": {"d": 1}}))
    assert cleaned(store, tmp_path / "out", extra=(tmp_path / "mine",))["ask"]["counts"]["contaminated"] == 2
    strict = cleaned(store, tmp_path / "out", extra=(tmp_path / "mine",), threshold=1.0)
    assert strict["ask"]["counts"]["contaminated"] == strict["zh"]["counts"]["contaminated"] == 0
    with pytest.raises(DataError, match=r"1 rows of zh.*test query 'q1' of ask/test"):
        cleaned(store, tmp_path / "out", contaminated="fail")
    assert len(queries(store, "zh")) == 3, "a refusal changes nothing"


def test_a_task_is_not_emptied(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, store = made
    texts = {f"q{n}": text for n, text in enumerate(queries(store, "zh"))}
    write_beir(tmp_path / "all", RetrievalTest((Passage("d", "p"),), texts, {q: {"d": 1} for q in texts}))
    with pytest.raises(DataError, match="drop all 3 rows of task 'zh'"):
        cleaned(store, tmp_path / "out", extra=(tmp_path / "all",))


def test_ingest_and_mining_keep_what_was_cleaned(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, store = made
    cleaned(store, tmp_path / "out")
    ingest(recipe(source), store)
    (source / "zh" / "train.jsonl").touch()  # read again, same content
    assert ingest(recipe(source), store)["zh"].rows == 2
    mine(recipe(source), store, ["ask", "zh"])
    task = CollectionStore(store)["zh"]
    rows = task.take_rows(range(2)).to_pylist()
    assert [r["query"] for r in rows] == ["What is the shared question of both", "别的问题"]
    assert all(len(r["negatives"]) == 2 for r in rows)
    cleaned(store, tmp_path / "out", key="other", near_duplicates="keep")
    assert CollectionStore(store)["zh"].manifest.negatives["num"] == 2, "same rows: nothing is mined again"
    cleaned(store, tmp_path / "out", contaminated="keep")
    mine(recipe(source), store, ["ask", "zh"])
    assert len(CollectionStore(store)["zh"].take_rows(range(3))["negatives"]) == 3


def test_a_cut_between_rows_and_manifest_changes_nothing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = made

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clean_module, "_tag", lambda *_: None)
        patch.setattr(clean_module, "write_manifest", lambda folder, _: cut() if folder.name == "zh" else None)
        with pytest.raises(KeyboardInterrupt):
            cleaned(store, tmp_path / "out")
    assert len(queries(store, "zh")) == 3
    mine(recipe(source), store, ["zh"])
    assert len(CollectionStore(store)["zh"].take_rows(range(3))["negatives"]) == 3
    cleaned(store, tmp_path / "out")
    assert len(queries(store, "zh")) == 2


def test_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "SMALL", 0)
    folder = tmp_path / "source" / "task"
    folder.mkdir(parents=True)
    rows = [
        {"_id": "1", "query": "Wo liegt die Stadt Berlin", "positive_passages": [{"docid": "a", "text": "eins"}]},
        {"_id": "1", "query": "Wie heißt der höchste Berg", "positive_passages": [{"docid": "a", "text": "zwei"}]},
        {"_id": "2", "query": "Wie heißt der  höchste Berg", "positive_passages": [{"docid": "b", "text": "eins"}]},
        {"_id": "3", "query": "Gleicher Text überall", "positive_passages": [{"docid": "c", "text": "gleicher Text überall"}]},
    ]  # fmt: skip
    for row in rows[:2]:
        row["negative_passages"] = [{"docid": "n", "text": "x" * 100}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ingest(recipe(tmp_path / "source"), tmp_path / "store")
    found = audit(tmp_path / "store", ["task"])["task"]
    assert found["rows"] == 4 and found["passages"] == Collection(tmp_path / "store" / "task").manifest.passages
    assert found["repeated_queries"] == 1 and found["query_is_passage"] == 1
    assert found["rows_with_shared_positive"] == 0.5 and found["rows_without_negatives"] == 0.5
    assert found["ids_with_two_queries"] == 1 and found["docids_with_two_texts"] == 1
    assert found["query_characters"]["max"] == 27 and sum(found["query_characters"]["histogram"]) == 4
    assert found["passage_characters"]["histogram"][6] == 1 and found["passage_characters"]["max"] == 100
    assert next(iter(found["query_languages"])) == "de"
