"""Live changes: what is searched equals an index built from scratch, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_index import contents, delete, document, expected, make_index, make_version, upsert, vector_of, write

from tdro_ray.__main__ import main
from tdro_ray.errors import ConfigError, DataError
from tdro_ray.index import base, filters, snapshots, store, versions
from tdro_ray.index.base import ChangesFullError, RetrievalIndex
from tdro_ray.index.changes import ChangeLog, StaleError
from tdro_ray.index.merge import merge


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


# ---------------------------------------------------------------- overlay


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW32", "IVF4,Flat", "PQ8x4fs"])
def test_changes_are_seen_at_once_whatever_the_kind_of_index(factory: str, tmp_path: Path) -> None:
    count = 60 if factory != "PQ8x4fs" else 700
    index = make_index(tmp_path, count, factory)
    other = RetrievalIndex.open(tmp_path)  # another replica
    write(index, upsert(1000), upsert(1001, "d3"), delete("d4"), delete("d5"))
    for opened in (index, other, RetrievalIndex.open(tmp_path)):
        assert len(opened) == count - 1
        assert opened.search(vector_of(1000)[None], 1)[0][0].id == "d1000"
        hit = opened.search(vector_of(1001)[None], 1)[0][0]
        assert (hit.id, hit.title, hit.text, hit.metadata) == document(1001, "d3")
        found = {h.id for h in opened.search(vector_of(4)[None], count)[0]}
        assert not found & {"d4", "d5"}
    write(other, upsert(4), delete("d1000"))
    assert index.search(vector_of(4)[None], 1)[0][0].id == "d4"
    assert index.search(vector_of(1000)[None], 1)[0][0].id != "d1000"


FILTERS = [
    None,
    {"task": "nq"},
    {"year": {"gte": 3}},
    {"not": {"or": [{"task": "fever"}, {"year": 0}]}},
    {"id": {"in": ["d1", "d2", "d30"]}},
]
steps = st.lists(
    st.tuples(st.sampled_from(["upsert", "upsert", "delete", "merge", "reopen"]), st.integers(0, 15), st.integers(100, 140)),
    min_size=1,
    max_size=12,
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps, filter=st.sampled_from(FILTERS), selector=st.booleans())
def test_any_sequence_equals_an_index_built_from_scratch(
    steps: list, filter: dict | None, selector: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out, count = tmp_path_factory.mktemp("live"), 10
    index = make_index(out, count)
    state = {f"d{n}": n for n in range(count)}
    for what, key, number in steps:
        id = f"d{key}"
        if what == "merge":
            if state:
                merge(out)
        elif what == "upsert":
            write(index, upsert(number, id))
            state[id] = number
        elif what == "delete":
            written = index.write([[delete(id)]], 1000)[0]
            assert written.count == (id in state)
            state.pop(id, None)
        if what in ("merge", "reopen"):
            index = RetrievalIndex.open(out)
    assert contents(index) == expected(state)
    if not state:
        return
    fresh = out / "fresh"
    make_version(fresh, [document(n, id) for id, n in state.items()], np.stack([vector_of(n) for n in state.values()]))
    queries = np.stack([vector_of(5000 + i) for i in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        if selector:
            patch.setattr(base, "EXACT_ROWS", 0)
        for k in (1, 3, 50):
            found, scratch = index.search(queries, k, filter), RetrievalIndex.open(fresh).search(queries, k, filter)
            # Two ids may have the same document: then either comes first.
            numbers = [[[h.metadata["number"] for h in row] for row in hits] for hits in (found, scratch)]
            assert numbers[0] == numbers[1]
            if k == 50:
                assert [{h.id for h in row} for row in found] == [{h.id for h in row} for row in scratch]
            np.testing.assert_allclose(
                [h.score for row in found for h in row], [h.score for row in scratch for h in row], atol=1e-5
            )


def test_hidden_rows_are_left_out_however_many_stand_in_front(tmp_path: Path) -> None:
    index = make_index(tmp_path, 300)
    near = [h.id for h in index.search(vector_of(7777)[None], 300)[0]]
    write(index, *(delete(id) for id in near[:280]))
    assert [h.id for h in index.search(vector_of(7777)[None], 5)[0]] == near[280:285]
    assert [h.id for h in index.search(vector_of(7777)[None], 50)[0]] == near[280:]
    write(index, *(delete(id) for id in near[280:]))
    assert len(index) == 0 and index.search(vector_of(7777)[None], 5) == [[]]


# ---------------------------------------------------------------- filters in memory

FIELDS = {"id": "string", "s": "string", "n": "int64", "x": "double", "b": "bool"}
values = {
    "s": st.sampled_from(["", "a", "B", "ä", "a'b", "z"]) | st.none(),
    "n": st.integers(-3, 3) | st.none() | st.sampled_from([2**53 + 1, -(2**62)]),
    "x": st.sampled_from([-1.5, -0.0, 0.0, 0.1, 3, 2**53 + 1, 1e300]) | st.none(),
    "b": st.booleans() | st.none(),
}
misfits = st.sampled_from(["text", 1, 1.5, True, [1], {"a": 1}])
metadata = st.fixed_dictionaries({}, optional={key: value for key, value in values.items()})


@st.composite
def conditions(draw):
    name = draw(st.sampled_from(["id", *values]))
    value = (values[name] if name != "id" else st.sampled_from(["d0", "d1", "d9"])).filter(lambda v: v is not None)
    operator = draw(st.sampled_from(["plain", "eq", "ne", "gt", "gte", "lt", "lte", "in", "null", "not null"]))
    if operator == "in":
        return {name: {"in": draw(st.lists(value, min_size=1, max_size=3))}}
    if operator in ("plain", "null"):
        return {name: draw(value) if operator == "plain" else None}
    return {name: {"ne": None} if operator == "not null" else {operator: draw(value)}}


wholes = st.recursive(
    conditions(),
    lambda inner: (
        st.builds(lambda f: {"not": f}, inner)
        | st.builds(lambda key, fs: {key: fs}, st.sampled_from(["and", "or"]), st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda a, b: {**a, **b}, inner, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    records=st.lists(metadata, min_size=1, max_size=12), tests=st.lists(wholes, min_size=1, max_size=10), misfit=misfits
)
def test_a_filter_on_a_document_is_the_stores_filter(
    records: list[dict], tests: list[dict], misfit: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("filters") / "d.lance"
    records = [*records, dict.fromkeys(values, misfit)]  # values of a wrong type count as none
    docs = [(f"d{i}", "", "t", record) for i, record in enumerate(records)]
    _, fields = store.write_documents(folder, docs, {key: FIELDS[key] for key in values})
    store.add_vectors(folder, np.stack([vector_of(i) for i in range(len(docs))]), fields)
    opened = store.DocumentStore(folder)
    assert opened.fields == FIELDS
    for filter in tests:
        test = filters.predicate(filter, FIELDS)
        found = [i for i, (id, _, _, m) in enumerate(docs) if test({"id": id, "metadata": m})]
        assert found == opened.where(filter).tolist(), filter


# ---------------------------------------------------------------- log


def test_a_followed_log_gives_every_change_once_and_in_order(tmp_path: Path) -> None:
    index = make_index(tmp_path, 3)
    log = ChangeLog(tmp_path)
    early = log.follow(0)
    assert early.news() is None and log.last_seq() == 0
    for n in range(300):  # enough for the log to be tidied
        assert write(index, upsert(n)) == n + 1
        if n % 7 == 0:
            assert early.news()["seq"].to_pylist()[-1] == n + 1
        assert early.seq <= n + 1 and (n % 7 or early.news() is None)
    assert log.last_seq() == 300 and log.follow(290).news()["id"].to_pylist() == [f"d{n}" for n in range(290, 300)]


def test_a_writer_killed_in_its_very_first_commit_leaves_no_obstacle(tmp_path: Path) -> None:
    index = make_index(tmp_path, 3)
    for folder in ("data", "_versions", "_transactions"):
        (tmp_path / "changes.lance" / folder).mkdir(parents=True)
    (tmp_path / "changes.lance" / "data" / "half.lance").write_bytes(b"half")
    assert len(index) == 3 and index.log.last_seq() == 0
    assert write(index, upsert(10)) == 1 and len(index) == 4 and len(RetrievalIndex.open(tmp_path)) == 4


def test_many_ids_are_found_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_index(tmp_path, 20)
    ids = ["d3", "nothing", "d19", "o'brien"]
    assert index.store.find(ids) == {"d3": 3, "d19": 19}
    monkeypatch.setattr(store, "MAX_LOOKUPS", 1)
    assert index.store.find(ids) == {"d3": 3, "d19": 19}


def test_two_processes_number_their_changes_without_a_gap(tmp_path: Path) -> None:
    make_index(tmp_path, 3)
    code = (
        "import sys; sys.path.insert(0, sys.argv[3])\n"
        "from pathlib import Path; from live_index import *; from tdro_ray.index.base import RetrievalIndex\n"
        "index = RetrievalIndex.open(Path(sys.argv[1])); first = int(sys.argv[2])\n"
        "for n in range(first, first + 40): write(index, upsert(n), upsert(n + 1000))"
    )
    folder = str(Path(__file__).parent)
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n), folder]) for n in (100, 200)]
    index = RetrievalIndex.open(tmp_path)
    for n in range(300, 320):
        write(index, upsert(n))
    assert [w.wait(120) for w in writers] == [0, 0]
    assert len(index) == 3 + 2 * 80 + 20
    table = ChangeLog(tmp_path).follow(0).news()
    assert table["seq"].to_pylist() == list(range(1, 181))
    ids = table["id"].to_pylist()
    for n in range(100, 140):  # a request is one commit: nothing stands between its changes
        assert ids[ids.index(f"d{n}") + 1] == f"d{n + 1000}"


def test_the_number_of_unmerged_changes_is_bounded(tmp_path: Path) -> None:
    index = make_index(tmp_path, 3)
    index.write([[upsert(n)] for n in range(10, 20)], 10)
    with pytest.raises(ChangesFullError, match="10 changes wait"):
        index.write([[upsert(20)]], 10)
    assert index.write([[delete("nothing")]], 10)[0].count == 0
    merge(tmp_path)
    RetrievalIndex.open(tmp_path).write([[upsert(20)]], 10)


# ---------------------------------------------------------------- merge


def test_merge_keeps_vectors_documents_and_the_rules_of_the_build(tmp_path: Path) -> None:
    index = make_index(tmp_path, 50, "auto")
    write(index, upsert(1000), upsert(1001, "d3"), delete("d4"))
    before = contents(index)
    made = merge(tmp_path)
    assert made is not None
    assert made["version"] == "2" and made["documents"] == 50 and made["merged_seq"] == 3 and made["recall@10"] == 1.0
    assert made["rules"]["factory"] == "auto" and made["factory"] == "Flat" and made["model"]["name"] == "fake"
    merged = RetrievalIndex.open(tmp_path)
    assert contents(merged) == before == contents(index)  # the old one still answers, the same
    assert merged.overlay.view().documents == 0 and merge(tmp_path) is None
    vectors = np.concatenate(list(merged.store.vector_blocks()))
    rows = merged.store.find(["d0", "d1000", "d3", "nothing"])
    assert rows.keys() == {"d0", "d1000", "d3"}
    for id, number in (("d0", 0), ("d1000", 1000), ("d3", 1001)):
        assert np.array_equal(vectors[rows[id]], vector_of(number))


def test_new_keys_become_fields_at_the_merge_and_known_ones_stay(tmp_path: Path) -> None:
    index = make_index(tmp_path, 2)
    change = upsert(10)
    record = json.loads(change.metadata) | {"lang": "de"}
    write(index, type(change)("upsert", "new", "", "t", json.dumps(record), change.vector), delete("d0"), delete("d1"))
    with pytest.raises(filters.FilterError, match="Unknown filter field 'lang'"):
        index.search(vector_of(1)[None], 3, {"lang": "de"})
    merge(tmp_path)
    index = RetrievalIndex.open(tmp_path)
    assert [h.id for h in index.search(vector_of(1)[None], 3, {"lang": "de"})[0]] == ["new"]
    assert index.store.fields == {
        "id": "string",
        "task": "string",
        "year": "int64",
        "number": "int64",
        "lang": "string",
    }


def test_a_merge_that_fails_leaves_everything(tmp_path: Path) -> None:
    index = make_index(tmp_path, 5, "IVF5,Flat")
    write(index, delete("d0"))
    before = index.search(vector_of(7)[None], 3)
    with pytest.raises(ConfigError, match="wants 5 cells"):
        merge(tmp_path)
    assert versions.names(tmp_path) == ["1"] and RetrievalIndex.open(tmp_path).search(vector_of(7)[None], 3) == before
    write(index, *(delete(f"d{n}") for n in range(1, 5)))
    with pytest.raises(DataError, match="All documents"):
        merge(tmp_path)


def test_merges_under_concurrent_writes_lose_nothing(tmp_path: Path) -> None:
    make_index(tmp_path, 20)
    failures: list[BaseException] = []
    done = threading.Event()

    def writer(first: int) -> None:
        try:
            index = RetrievalIndex.open(tmp_path)
            for n in range(first, first + 25):
                work = lambda: write(index, upsert(n), upsert(n, f"same{n % 5}-{first}"))  # noqa: B023, E731
                look = lambda: index.search(vector_of(n)[None], 2)[0][0].score > 0.999  # noqa: B023, E731
                for step in (work, look):
                    for _ in range(10):
                        try:
                            assert step()
                            break
                        except StaleError:
                            index = RetrievalIndex.open(tmp_path)
        except BaseException as err:
            failures.append(err)

    def merger() -> None:
        while not done.is_set():
            merge(tmp_path)

    writers = [threading.Thread(target=writer, args=(first,)) for first in (100, 200, 300)]
    merging = threading.Thread(target=merger)
    for thread in (*writers, merging):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    merging.join()
    assert not failures
    state = {f"d{n}": n for n in range(20)}
    for first in (100, 200, 300):
        state |= {f"d{n}": n for n in range(first, first + 25)}
        state |= {f"same{n % 5}-{first}": n for n in range(first + 20, first + 25)}
    assert contents(RetrievalIndex.open(tmp_path)) == expected(state)
    assert int(versions.current(tmp_path).name) > 2
    merge(tmp_path)
    assert contents(RetrievalIndex.open(tmp_path)) == expected(state)


def test_merged_changes_are_pruned_once_no_kept_version_needs_them(tmp_path: Path) -> None:
    index = make_index(tmp_path, 5)
    log = ChangeLog(tmp_path)
    write(index, upsert(10), upsert(11))
    merge(tmp_path)
    assert len(log.follow(0).news()) == 2  # version 1 is still there, and may be selected
    write(RetrievalIndex.open(tmp_path), upsert(12))
    merge(tmp_path)
    with pytest.raises(StaleError, match="open the current version"):
        index.log.follow(0).news()
    assert log.last_seq() == 3 and log.follow(2).news()["id"].to_pylist() == ["d12"]
    with pytest.raises(StaleError):
        write(index, upsert(13))  # opened two versions ago, and its last look is as old
    write(RetrievalIndex.open(tmp_path), upsert(13))
    assert contents(RetrievalIndex.open(tmp_path)) == expected({f"d{n}": n for n in (*range(5), 10, 11, 12, 13)})
    merge(tmp_path)
    assert log.last_seq() == 4


# ---------------------------------------------------------------- versions


def test_an_older_version_answers_with_the_changes_since(tmp_path: Path) -> None:
    index = make_index(tmp_path, 5)
    write(index, upsert(10))
    merge(tmp_path)
    write(RetrievalIndex.open(tmp_path), delete("d0"))
    versions.select(tmp_path, "1")
    back = RetrievalIndex.open(tmp_path)
    assert back.version == "1" and back.overlay.merged_seq == 0
    assert contents(back) == expected({f"d{n}": n for n in (1, 2, 3, 4, 10)})
    write(back, upsert(11))
    assert merge(tmp_path)["merged_from"] == "1"
    assert contents(RetrievalIndex.open(tmp_path)) == expected({f"d{n}": n for n in (1, 2, 3, 4, 10, 11)})


def test_a_build_from_a_corpus_supersedes_what_was_written_before(tmp_path: Path) -> None:
    index = make_index(tmp_path, 5)
    write(index, upsert(10), delete("d0"))
    make_version(tmp_path, [document(n) for n in range(3)], np.stack([vector_of(n) for n in range(3)]), merged_seq=2)
    assert contents(RetrievalIndex.open(tmp_path)) == expected({f"d{n}": n for n in range(3)})
    write(index, upsert(20))  # written meanwhile, through a replica that has not followed yet
    assert "d20" in contents(RetrievalIndex.open(tmp_path))


def test_a_version_selected_during_a_merge_is_not_overruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdro_ray.index import merge as module

    index = make_index(tmp_path, 5)
    write(index, upsert(10))
    merge(tmp_path)
    write(RetrievalIndex.open(tmp_path), upsert(11))
    whole = module.write_merged

    def selecting(*arguments):
        whole(*arguments)
        versions.select(tmp_path, "1")

    monkeypatch.setattr(module, "write_merged", selecting)
    with pytest.raises(versions.BusyError, match=r"Version 1 .* became current"):
        merge(tmp_path)
    assert versions.current(tmp_path).name == "1" and versions.names(tmp_path) == ["1", "2"]
    assert len(RetrievalIndex.open(tmp_path)) == 7


@pytest.mark.parametrize("pending", [False, True])
def test_snapshot_and_restore(pending: bool, tmp_path: Path) -> None:
    index = make_index(tmp_path, 5)
    write(index, upsert(10), delete("d0"))
    if not pending:
        merge(tmp_path)
    kept = contents(RetrievalIndex.open(tmp_path))
    made = snapshots.snapshot(tmp_path, "before-the-move")
    assert made["snapshot"] == "before-the-move" and made["documents"] == 5 and made["merged_seq"] == 2
    with pytest.raises(ConfigError, match="exists"):
        snapshots.snapshot(tmp_path, "before-the-move")
    for n in range(20, 24):  # enough versions for the old ones to go
        write(RetrievalIndex.open(tmp_path), upsert(n), delete("d10"))
        merge(tmp_path)
    write(RetrievalIndex.open(tmp_path), upsert(30))
    assert snapshots.restore(tmp_path, "before-the-move")["restored_from"] == "before-the-move"
    back = RetrievalIndex.open(tmp_path)
    assert contents(back) == kept
    write(back, upsert(31))
    assert contents(RetrievalIndex.open(tmp_path)).keys() == {*kept, "d31"}
    merge(tmp_path)
    assert contents(RetrievalIndex.open(tmp_path)).keys() == {*kept, "d31"}
    rows = snapshots.listing(tmp_path)
    assert [(r["kind"], r["current"]) for r in rows] == [("version", False), ("version", True), ("snapshot", False)]
    assert rows[-1]["name"] == "before-the-move" and rows[-1]["documents"] == 5 and rows[-1]["recall@10"] == 1.0


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a" * 65, "ä"])
def test_names_of_snapshots_are_checked(name: str, tmp_path: Path) -> None:
    make_index(tmp_path, 3)
    with pytest.raises(ConfigError, match="no name for a snapshot"):
        snapshots.snapshot(tmp_path, name)
    with pytest.raises(ConfigError, match="there are: none"):
        snapshots.restore(tmp_path, name)


def test_commands_list_merge_select_snapshot_and_restore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tdro(*arguments: str) -> tuple[int, str]:
        code = main([arguments[0], str(tmp_path), *arguments[1:]])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, said = tdro("versions")
    assert code == 2 and "holds no complete index" in said
    index = make_index(tmp_path, 5)
    write(index, upsert(10), delete("d0"))
    code, said = tdro("versions")
    assert code == 0 and re.search(r"^1 \(current\) +5 +Flat +1\.000 +2 +20", said, re.MULTILINE)
    assert tdro("versions", "--snapshot", "spring")[0] == 0
    code, said = tdro("merge")
    assert code == 0 and said.startswith("Version 2: 5 documents, recall@10 1.0")
    assert tdro("merge") == (0, "Version 2 has merged all changes.\n")
    code, said = tdro("versions", "--select", "1")
    assert code == 0 and re.search(r"^1 \(current\) .*\n2 +5 .*\nspring \(snapshot\) +5 ", said, re.MULTILINE)
    write(RetrievalIndex.open(tmp_path), delete("d10"))
    code, said = tdro("versions", "--restore", "spring")
    assert code == 0 and "no longer searched" in said and re.search(r"^3 \(current\) +5 ", said, re.MULTILINE)
    assert contents(RetrievalIndex.open(tmp_path)) == expected({f"d{n}": n for n in (1, 2, 3, 4, 10)})
    for option, value in (("--select", "9"), ("--snapshot", "spring"), ("--restore", "autumn")):
        code, said = tdro("versions", option, value)
        assert code == 2 and said.startswith("tdro: ") and value in said
