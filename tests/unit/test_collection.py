"""The writer and the reader of one task, without Ray."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdro_ray.config import PolicySettings
from tdro_ray.data import publish as publish_module
from tdro_ray.data.collection import Collection, CollectionStore, TaskManifest, write_beir
from tdro_ray.data.formats import Reject
from tdro_ray.data.layouts import open_test
from tdro_ray.data.parsed import parsed_table
from tdro_ray.data.publish import read_manifest, store_lock
from tdro_ray.data.split import dev_rows
from tdro_ray.data.writer import TaskWriter, WriteSettings
from tdro_ray.errors import DataError
from tdro_ray.types import Passage, RetrievalTest, Row, TaskInfo

SETTINGS = WriteSettings(max_reject_share=0.1, dev_queries=0, dev_corpus=10)


def row(n: int, query: str | None = None, positive: str | None = None, negatives: tuple[str, ...] = ()) -> Row:
    return Row(
        f"r{n}",
        query or f"query {n}",
        (Passage(f"d{n}", positive or f"text {n}"),),
        tuple(Passage(f"n{n}-{i}", text) for i, text in enumerate(negatives)),
    )


def write(
    store: Path,
    items: list,
    settings: WriteSettings = SETTINGS,
    test: RetrievalTest | None = None,
    info: TaskInfo | None = None,
) -> TaskManifest:
    writer = TaskWriter(store, "task", info or TaskInfo(), "key", test, settings)
    for start in range(0, len(items), 7):
        writer.add(parsed_table(items[start : start + 7]))
    return writer.finish()


def test_round_trip(tmp_path: Path) -> None:
    rows = [
        row(0, negatives=("n", "text 1")),
        row(1, negatives=("n",)),
        Row("r2", "q", (Passage("a", "text 0"), Passage("b", "x", "T"))),
    ]
    manifest = write(tmp_path, rows)
    collection = CollectionStore(tmp_path)["task"]
    assert (manifest.rows, manifest.passages, len(collection)) == (3, 4, 3)
    table = collection.take_rows([0, 1, 2])
    assert table["positives"].to_pylist() == [[0], [2], [0, 3]]
    assert table["given_negatives"].to_pylist() == [[1, 2], [1], []]
    assert collection.take_texts([3, 0, 3, 1, 2]) == ["T x", "text 0", "T x", "n", "text 1"]
    assert collection.take_rows([2, 0, 2])["id"].to_pylist() == ["r2", "r0", "r2"]
    assert collection.manifest == manifest and collection.test() is None


def in_memory(test: RetrievalTest | None) -> RetrievalTest:
    assert test is not None
    return dataclasses.replace(test, corpus=tuple(test.corpus))


def test_duplicates_contamination_and_self_negatives(tmp_path: Path) -> None:
    test = RetrievalTest((Passage("t", "test text"),), {"q": "A test  query"}, {"q": {"t": 1}})
    rows = [
        row(0, "Q", "p"),
        row(1, "q ", "p"),
        row(2, "q", "other"),
        row(3, "a TEST query", "z"),
        row(4, negatives=("text 4", "n")),
    ]
    manifest = write(tmp_path, rows, test=test)
    assert manifest.counts == {"lines": 5, "duplicates": 1, "decontaminated": 1, "self_negatives": 1, "dev_rows": 0}
    collection = Collection(tmp_path / "task")
    assert collection.take_rows(range(3))["id"].to_pylist() == ["r0", "r2", "r4"]
    assert collection.take_texts(collection.take_rows([2])["given_negatives"].to_pylist()[0]) == ["n"]
    assert in_memory(collection.test()) == test and manifest.test_queries == 1


def test_rejects_are_listed_and_limited(tmp_path: Path) -> None:
    items: list = [row(n) for n in range(20)] + [Reject("f.jsonl", 21, "not JSON", "why")]
    manifest = write(tmp_path, items)
    assert manifest.rejects == {"not JSON": 1}
    assert json.loads((tmp_path / "task" / "rejects.jsonl").read_text()) == {
        "file": "f.jsonl",
        "line": 21,
        "reason": "not JSON",
        "detail": "why",
    }
    with pytest.raises(
        DataError,
        match=r"2 of 3 input lines were refused \(66.67%.*f.jsonl:21: not JSON \(why\).*max_reject_share=0.667",
    ):
        write(tmp_path, [row(0), items[-1], items[-1]])
    assert read_manifest(tmp_path, "task") == manifest, "the task that was there stays"
    assert len((tmp_path / "task.rejects.jsonl").read_text().splitlines()) == 2
    assert not list(tmp_path.glob(".tmp-*"))


def test_empty_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training row left"):
        write(tmp_path, [])
    assert CollectionStore(tmp_path).names() == []


def test_hash_depends_on_content_alone(tmp_path: Path) -> None:
    rows = [row(n, negatives=(f"n{n % 5}",)) for n in range(30)]
    first = write(tmp_path / "a", rows)
    writer = TaskWriter(tmp_path / "b", "task", TaskInfo(), "key", None, SETTINGS)
    writer.add(parsed_table(rows))
    assert writer.finish() == first
    assert write(tmp_path / "c", [*rows[:-1], row(29, negatives=("other",))]).hash != first.hash
    assert write(tmp_path / "d", [rows[1], rows[0], *rows[2:]]).hash != first.hash


def test_many_flushes_write_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(n) for n in range(6)]
    whole = write(tmp_path / "a", rows)
    monkeypatch.setattr("tdro_ray.data.writer.FLUSH_BYTES", 0)  # every table is one, the last leaves nothing to the end
    parts = write(tmp_path / "b", rows)
    assert parts == whole
    texts = [Collection(tmp_path / s / "task").take_texts(range(whole.passages)) for s in "ab"]
    assert texts[0] == texts[1] and len(texts[0]) == whole.passages


def test_same_content_keeps_mined_negatives(tmp_path: Path) -> None:
    rows = [row(n) for n in range(3)]
    manifest = write(tmp_path, rows)
    publish_module.write_manifest(tmp_path / "task", dataclasses.replace(manifest, negatives={"key": "k"}))
    again = write(tmp_path, rows, info=TaskInfo(language="de"))
    assert again.negatives == {"key": "k"} and again.info.language == "de" and again == read_manifest(tmp_path, "task")
    assert write(tmp_path, [*rows, row(3)]).negatives == {}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.integers(0, 30), min_size=1, max_size=3)), min_size=1, max_size=120
    ),
    st.integers(0, 20),
)
def test_dev_rows_share_nothing_with_training(
    tmp_path_factory: pytest.TempPathFactory, spec: list, wanted: int
) -> None:
    rows = [
        Row(f"r{n}", f"q{query}", tuple(Passage(f"d{p}", f"text {p}") for p in positives))
        for n, (query, positives) in enumerate(spec)
    ]
    store = tmp_path_factory.mktemp("store")
    manifest = write(store, rows, dataclasses.replace(SETTINGS, dev_queries=wanted))
    collection = Collection(store / "task")
    assert manifest.dev_queries <= min(wanted, len(spec) // 10)
    dev = collection.test("dev")
    assert (dev is None) == (manifest.dev_queries == 0)
    if dev:
        train = collection.take_rows(range(manifest.rows)).to_pylist()
        train_positives = set(collection.take_texts([p for r in train for p in r["positives"]]))
        texts = {p.docid: p.full_text for p in dev.corpus}
        assert not {texts[d] for judged in dev.qrels.values() for d in judged} & train_positives
        assert not set(dev.queries.values()) & {r["query"] for r in train}
        assert len(dev.queries) == manifest.dev_queries


def test_dev_split_fills_what_is_wanted(tmp_path: Path) -> None:
    manifest = write(tmp_path, [row(n) for n in range(200)], dataclasses.replace(SETTINGS, dev_queries=15))
    dev = Collection(tmp_path / "task").test("dev")
    assert (manifest.rows, manifest.dev_queries) == (185, 15) and dev is not None and len(dev.corpus) == 25


def test_beir_round_trip(tmp_path: Path) -> None:
    test = RetrievalTest(
        (Passage("1", "a", "T"), Passage("2", "b\u2028c")), {"x": "q", "y": "r"}, {"x": {"1": 2, "2": 0}, "y": {"2": 1}}
    )
    write_beir(tmp_path, test)
    found = open_test(tmp_path)
    assert in_memory(found) == test and len(found.corpus) == 2


def test_lock_is_exclusive_and_says_who_holds_it(tmp_path: Path) -> None:
    import os

    with (
        store_lock(tmp_path),
        pytest.raises(DataError, match=f"written by process {os.getpid()}"),
        store_lock(tmp_path),
    ):
        pass
    with store_lock(tmp_path):
        pass


def test_lock_clears_leftovers_and_restores_a_task_put_aside(tmp_path: Path) -> None:
    (tmp_path / ".tmp-task-1").mkdir(parents=True)
    write(tmp_path, [row(0)])
    (tmp_path / "task").rename(tmp_path / ".tmp-old-task")
    with store_lock(tmp_path):
        assert CollectionStore(tmp_path).names() == ["task"] and not list(tmp_path.glob(".tmp-*"))


def test_unknown_task_and_empty_store(tmp_path: Path) -> None:
    write(tmp_path, [row(0)])
    with pytest.raises(DataError, match="Did you mean 'task'"):
        CollectionStore(tmp_path)["taks"]
    with pytest.raises(DataError, match="holds no task"):
        CollectionStore(tmp_path / "nowhere").collections()


def test_dev_rows_of_nothing() -> None:
    import pyarrow as pa

    assert dev_rows(pa.table({"positives": pa.array([[0]]), "query_key": [b"x"]}), [b"k"], 5).dtype == np.int64


CONTRADICTIONS = [
    row(0),
    Row("r0", "another query", (Passage("d1", "text 1"),)),  # id of the first row
    Row("r2", "third query", (Passage("d0", "not text 0"),)),  # docid of the first row's passage
    row(3, negatives=("text 3", "n")),
    row(4, query="Text  4"),
]


@pytest.mark.parametrize(
    ("policy", "lost", "says"),
    [
        ("duplicated_id", 1, "row 'r0': an earlier row has this id"),
        ("docid_with_two_texts", 2, "row 'r2': one of its docids stood for another text"),
        ("query_is_passage", 4, "row 'r4': the query is its own positive"),
        ("positive_in_negatives", None, "row 'r3': a positive is among its negatives"),
    ],
)
def test_policies_for_rows_that_contradict_themselves(tmp_path: Path, policy: str, lost: int | None, says: str) -> None:
    queries = [r.query for r in CONTRADICTIONS]
    assert write(tmp_path / "default", CONTRADICTIONS).rows == 5
    asked = dataclasses.replace(SETTINGS, policies=PolicySettings.model_validate({policy: "drop"}))
    manifest = write(tmp_path / "drop", CONTRADICTIONS, asked)
    kept = Collection(tmp_path / "drop" / "task").take_rows(range(manifest.rows))["query"].to_pylist()
    assert kept == [query for n, query in enumerate(queries) if n != lost]
    assert manifest.counts.get(policy, 0) == (lost is not None) and manifest.counts["self_negatives"] == 1
    asked = dataclasses.replace(SETTINGS, policies=PolicySettings.model_validate({policy: "fail"}))
    with pytest.raises(DataError, match=f"{says}.*data.policies.{policy}=drop"):
        write(tmp_path / "fail", CONTRADICTIONS, asked)


def test_policies_that_drop_every_row_are_refused(tmp_path: Path) -> None:
    asked = dataclasses.replace(SETTINGS, policies=PolicySettings(query_is_passage="drop"))
    with pytest.raises(DataError, match=r"no training row left .*1 query_is_passage"):
        write(tmp_path, [row(0, "text 0")], asked)
