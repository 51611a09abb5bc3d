"""Writing over HTTP: seen by every replica at once, merged under load without a failed request, refused clearly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_serve_api import KEY, FakeEncoder, error_of, json_values, write_index

from serve.api import create_app
from serve.engine import Engine
from serve.guard import parse_keys
from serve.schemas import Limits
from tdro_ray.errors import ConfigError, DataError
from tdro_ray.index import versions
from tdro_ray.index.base import RetrievalIndex
from tdro_ray.index.build import embed_records
from tdro_ray.index.changes import Change, ChangeLog
from tdro_ray.index.merge import merge


def open_engine(folder: Path, **limits: Any) -> Engine:
    index = RetrievalIndex.open(folder)
    return Engine(
        FakeEncoder(), index, name="fake", model_hash="h", limits=Limits(**limits), index_folder=folder
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_index(tmp_path, 50)
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    engine = open_engine(folder, max_batch=8, max_characters=200)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, *documents: dict) -> dict:
    response = client.post("/documents", json={"documents": list(documents)})
    assert response.status_code == 200, response.text
    return response.json()


def find(client: TestClient, query: str, **body: Any) -> list[dict]:
    response = client.post("/search", json={"queries": [query], "k": 3, **body})
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def test_a_document_is_found_by_the_next_search_on_every_replica(client: TestClient, folder: Path) -> None:
    document = {"id": "guide/7 ä", "title": "Zebra", "text": "crossing quagga", "metadata": {"task": "nq", "year": 3}}
    with TestClient(create_app(open_engine(folder))) as other:
        assert find(other, "zebra crossing quagga")[0]["id"] != "guide/7 ä"
        assert post(client, document) == {"upserted": 1, "seq": 1, "index_version": "1"}
        for replica in (client, other):
            hit = find(replica, "zebra crossing quagga")[0]
            assert hit.pop("score") == pytest.approx(1, abs=1e-5) and hit == document
            assert (
                find(replica, "zebra", filter={"task": "nq", "year": {"lt": 4}, "id": {"ne": "d0"}})[0]["id"]
                == "guide/7 ä"
            )
            assert not find(replica, "zebra", filter={"id": "guide/7 ä", "year": 4})
        post(other, {**document, "title": "", "text": "okapi"}, {"id": "d3", "text": "gnu"})
        assert find(client, "okapi")[0]["title"] == "" and find(client, "gnu")[0]["id"] == "d3"
        assert client.get("/info").json()["index"]["documents"] == 51
        deleted = client.delete("/documents/guide/7 ä").json()
        assert deleted == {"deleted": True, "seq": 4, "index_version": "1"}
        assert other.delete("/documents/guide%2F7%20%C3%A4").json()["deleted"] is False
        assert other.delete("/documents/d4").json()["deleted"] is True
        assert find(other, "okapi")[0]["id"] != "guide/7 ä"
        info = other.get("/info").json()["index"]
        assert info["documents"] == 49
        assert info["changes"] == {"writable": True, "seq": 5, "unmerged": 5, "last_merge": None, "merge_error": None}
        metrics = client.get("/metrics").text
        assert "tdro_index_documents 49.0" in metrics and "tdro_index_unmerged_changes 5.0" in metrics
        assert 'route="/documents/{id:path}"' in metrics


def test_a_vector_is_the_builds(client: TestClient, folder: Path) -> None:
    given = [
        ("a", "Title", "parse date", {"task": "nq"}),
        ("b", "", "json file", {}),
        ("c", "T", "zip", {"task": "unheard"}),
    ]
    post(client, *(dict(zip(("id", "title", "text", "metadata"), d, strict=True)) for d in given))
    records = [{"title": t, "text": x, "metadata": json.dumps(m)} for _, t, x, m in given]
    view = RetrievalIndex.open(folder).overlay.view()
    np.testing.assert_allclose(view.vectors, embed_records(FakeEncoder(), records, 1024), atol=1e-6)


def deep(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("documents", "status", "says"),
    [
        ([], 422, "documents"),
        ([{"id": "a"}], 422, "documents.0.text"),
        ([{"text": "a"}], 422, "documents.0.id"),
        ([{"id": "", "text": "a"}], 422, "documents.0.id"),
        ([{"id": 7, "text": "a"}], 422, "documents.0.id"),
        ([{"id": "x" * 513, "text": "a"}], 422, "documents.0.id"),
        ([{"id": "a/../b", "text": "a"}], 422, "documents[0].id must not have '.' or '..' between slashes"),
        ([{"id": "a\nb", "text": "a"}], 422, "documents[0].id must not have control characters"),
        ([{"id": "\ud800", "text": "a"}], 422, "documents"),
        ([{"id": "a", "text": "\ud800"}], 422, "documents"),
        ([{"id": "a", "text": "a", "title": "\udfff"}], 422, "documents"),
        ([{"id": "a", "text": "a", "metadata": {"x": "\ud800"}}], 422, "documents"),
        ([{"id": "a", "text": " "}], 422, "documents[0] is empty"),
        ([{"id": "a", "text": "a"}, {"id": "a", "text": "b"}], 422, "documents[1].id occurs twice"),
        ([{"id": "a", "text": "a" * 201}], 413, "at most 200"),
        ([{"id": "a", "title": "b" * 100, "text": "a" * 100}], 413, "has 201 characters"),
        ([{"id": str(i), "text": "a"} for i in range(9)], 413, "at most 8"),
        ([{"id": "a", "text": "a", "vector": [1.0]}], 422, "vector"),
        ([{"id": "a", "text": "a", "metadata": []}], 422, "metadata"),
        ([{"id": "a", "text": "a", "metadata": {"year": "1999"}}], 422, "metadata.year must be an integer"),
        ([{"id": "a", "text": "a", "metadata": {"year": 1.5}}], 422, "metadata.year must be an integer"),
        ([{"id": "a", "text": "a", "metadata": {"year": True}}], 422, "metadata.year must be an integer"),
        ([{"id": "a", "text": "a", "metadata": {"year": 2**63}}], 422, "metadata.year must be an integer"),
        ([{"id": "a", "text": "a", "metadata": {"task": 1}}], 422, "metadata.task must be a string"),
        ([{"id": "a", "text": "a", "metadata": {"x": float("nan")}}], 422, "metadata"),
        ([{"id": "a", "text": "a", "metadata": deep(33)}], 422, "nested deeper than 32"),
    ],
)  # fmt: skip
def test_bad_documents_are_named_and_nothing_is_written(
    documents: list, status: int, says: str, client: TestClient, folder: Path
) -> None:
    content = json.dumps({"documents": [{"id": "good", "text": "good"}, *documents][-8 if status == 413 else 0 :]})
    if status == 413 or not documents:
        content = json.dumps({"documents": documents})
    error = error_of(client.post("/documents", content=content, headers={"content-type": "application/json"}), status)
    says = says.replace("[1]", "[2]").replace("[0]", "[1]").replace(".0", ".1") if status == 422 and documents else says
    assert says in error["message"]
    assert ChangeLog(folder).last_seq() == 0


def test_metadata_of_any_shape_comes_back(client: TestClient) -> None:
    metadata = {
        "list": [1, None, {"a": "ä\x00"}],
        "big": 2**70,
        "deep": deep(30),
        "none": None,
        "": "",
        "id": 5,
        "year": None,
    }
    post(client, {"id": "a", "text": "zebra", "metadata": metadata})
    assert find(client, "zebra")[0]["metadata"] == metadata


def test_ids_that_cannot_be_are_refused(client: TestClient) -> None:
    error_of(client.delete("/documents/" + "x" * 513), 422)
    assert error_of(client.delete("/documents/"), 422)["message"].endswith("must have 1 to 512 characters.")
    error_of(client.get("/documents"), 405)
    error_of(client.get("/documents/d1"), 405)


def test_writing_needs_an_index_a_key_and_leave(folder: Path) -> None:
    body = {"documents": [{"id": "a", "text": "a"}]}
    with TestClient(create_app(Engine(FakeEncoder()))) as client:
        assert error_of(client.post("/documents", json=body), 404)["code"] == "no_index"
        assert error_of(client.delete("/documents/a"), 404)["code"] == "no_index"
    with TestClient(create_app(open_engine(folder, writable=False))) as client:
        assert error_of(client.post("/documents", json=body), 403)["code"] == "read_only"
        assert error_of(client.delete("/documents/a"), 403)["code"] == "read_only"
        assert client.get("/info").json()["index"]["changes"]["writable"] is False
    with TestClient(create_app(open_engine(folder), parse_keys(KEY))) as client:
        error_of(client.post("/documents", json=body), 401)
        error_of(client.delete("/documents/a"), 401)
        assert client.post("/documents", json=body, headers={"X-API-Key": KEY}).status_code == 200
    with TestClient(create_app(open_engine(folder))) as client:
        client.app.state.engine.close()
        assert error_of(client.post("/documents", json=body), 503)["code"] == "not_running"


def test_a_full_disk_is_no_defect_of_the_server(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ChangeLog, "append", full)
        answer = client.post("/documents", json={"documents": [{"id": "a", "text": "zebra"}]})
    error = error_of(answer, 503)
    assert error["code"] == "not_writable_now" and "No space left on device" in error["message"]
    assert answer.headers["retry-after"] == "30"
    assert post(client, {"id": "a", "text": "zebra"})["seq"] == 1


document_bodies = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=8) | json_values,
        "text": st.text(max_size=20) | json_values,
        "title": st.text(max_size=8) | json_values,
        "metadata": st.dictionaries(st.sampled_from(["task", "year", "x", "id"]), json_values, max_size=3)
        | json_values,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents=st.lists(document_bodies, max_size=3) | json_values, id=st.text(min_size=1, max_size=10))
def test_no_document_makes_a_500(documents: object, id: str, fuzzed: TestClient) -> None:
    written = fuzzed.post(
        "/documents", content=json.dumps({"documents": documents}), headers={"content-type": "application/json"}
    )
    assert written.status_code in (200, 413, 422), (documents, written.text)
    deleted = fuzzed.delete("/documents/" + quote(id.encode("utf-8", "replace"), safe=""))
    # Clients resolve dots by themselves, and no route has a line break: such ids are not taken in the first place.
    assert deleted.status_code in (200, 422) or id in (".", "..") or "\n" in id
    assert fuzzed.post("/search", json={"queries": ["a"], "k": 1000, "filter": {"year": {"gte": 1}}}).status_code == 200
    assert fuzzed.post("/search", json={"queries": ["a"], "k": 1000}).status_code == 200


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("fuzzed")
    write_index(folder, 5)
    with TestClient(create_app(open_engine(folder, merge_after=50)), raise_server_exceptions=False) as client:
        yield client


# ---------------------------------------------------------------- together


def test_requests_that_wait_share_one_commit(folder: Path) -> None:
    engine = open_engine(folder)
    with TestClient(create_app(engine)) as client, ThreadPoolExecutor(16) as pool:
        with engine.index.log.locked():  # another replica writes: requests gather
            answers = [pool.submit(post, client, {"id": f"n{i}", "text": f"zebra {i}"}) for i in range(32)]
            deadline = time.monotonic() + 20
            batcher = engine.writer.batcher
            while batcher.waiting + batcher.batched_items < 12 and time.monotonic() < deadline:
                time.sleep(0.01)
        seqs = sorted(answer.result()["seq"] for answer in answers)
        assert seqs == list(range(1, 33))
        assert engine.writer.batcher.batches < 32 and len(RetrievalIndex.open(folder)) == 82


def test_the_bound_of_unmerged_changes_is_a_503_until_a_merge(folder: Path) -> None:
    engine = open_engine(folder, max_unmerged=3, merge_after=3)
    with TestClient(create_app(engine)) as client:
        for i in range(3):
            post(client, {"id": f"n{i}", "text": "zebra"})
        full = client.post("/documents", json={"documents": [{"id": "n3", "text": "zebra"}]})
        assert error_of(full, 503)["code"] == "merge_pending" and full.headers["retry-after"] == "5"
        too_many = {"documents": [{"id": f"m{i}", "text": "zebra"} for i in range(4)]}
        assert error_of(client.post("/documents", json=too_many), 413)["code"] == "batch_too_large"
        deadline = time.monotonic() + 20
        while client.post("/documents", json={"documents": [{"id": "n3", "text": "zebra"}]}).status_code == 503:
            assert time.monotonic() < deadline, "the server merges by itself"
            time.sleep(0.1)
        info = client.get("/info").json()["index"]
        assert info["version"] == "2" and info["documents"] == 54 and info["changes"]["unmerged"] == 1
        assert info["changes"]["last_merge"]["version"] == "2" and info["changes"]["last_merge"]["documents"] == 53


def test_changes_are_merged_by_age(folder: Path) -> None:
    engine = open_engine(folder, merge_age_s=0.05)
    with TestClient(create_app(engine)) as client:
        post(client, {"id": "n", "text": "zebra"})
        time.sleep(0.1)
        engine.writer.tend()
        assert engine.index.version == "2" and find(client, "zebra")[0]["id"] == "n"


def test_a_failing_merge_is_reported_and_tried_again_later(folder: Path) -> None:
    calls: list[Path] = []

    def merger(out: Path) -> Any:
        calls.append(out)
        if len(calls) == 1:
            raise ConfigError("the disk is full")
        return merge(out)

    engine = open_engine(folder, merge_after=1)
    engine.writer.merger = merger
    engine.writer._stop.set()
    with TestClient(create_app(engine)) as client:
        post(client, {"id": "n", "text": "zebra"})
        engine.writer.tend()
        engine.writer.tend()
        changes = client.get("/info").json()["index"]["changes"]
        assert calls == [folder] and changes["merge_error"] == "the disk is full" and changes["unmerged"] == 1
        engine.writer._next_try = 0.0  # ten seconds later
        engine.writer.tend()
        changes = client.get("/info").json()["index"]["changes"]
        assert changes["merge_error"] is None and changes["unmerged"] == 0 and changes["last_merge"]["version"] == "2"


def test_merges_and_rollbacks_under_load_fail_no_request_and_no_answer_mixes_states(folder: Path) -> None:
    engines = [open_engine(folder, merge_after=5) for _ in range(2)]
    stop = threading.Event()
    faults: list[object] = []
    seen: set[str] = set()
    lasts = [0, 0]

    def guarded(work: Any, *arguments: Any) -> None:
        try:
            while not stop.is_set():
                work(*arguments)
        except BaseException as err:
            faults.append(err)

    with TestClient(create_app(engines[0])) as one, TestClient(create_app(engines[1])) as two:

        def write_pair(client: TestClient, who: int) -> None:
            """One request writes both halves: no answer may show halves of two requests."""
            lasts[who] += 1
            halves = [{"id": f"{half}{who}", "text": f"zebra {half}", "metadata": {"n": lasts[who]}} for half in "ab"]
            post(client, *halves)

        def search(client: TestClient) -> None:
            floor = list(lasts)
            response = client.post("/search", json={"queries": ["zebra a", "zebra b"], "k": 60})
            assert response.status_code == 200, response.text
            seen.add(response.json()["index_version"])
            for hits in response.json()["results"]:
                ids = [h["id"] for h in hits]
                assert len(ids) == len(set(ids)) and {f"d{i}" for i in range(50)} <= set(ids)
                found = {h["id"]: h["metadata"]["n"] for h in hits if h["id"][0] in "ab"}
                for who in (0, 1):
                    assert found.get(f"a{who}") == found.get(f"b{who}"), found
                    assert found.get(f"a{who}", 0) >= floor[who] - 1  # the last one may be under way

        def maintain(engine: Engine) -> None:
            engine.writer.tend()
            if lasts[0] % 7 == 6:
                with contextlib.suppress(DataError):  # removed by the other one's merge
                    versions.select(folder, versions.names(folder)[0])

        work = [
            (write_pair, one, 0),
            (write_pair, two, 1),
            (search, one),
            (search, two),
            (maintain, engines[0]),
            (maintain, engines[1]),
        ]
        threads = [threading.Thread(target=guarded, args=w) for w in work]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while not faults and len(seen) < 6 and time.monotonic() < deadline:
            time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join()
        assert not faults, faults[:3]
        assert len(seen) >= 3
        for who, client in enumerate((one, two)):
            assert {
                h["metadata"]["n"] for h in find(client, "zebra", filter={"id": {"in": [f"a{who}", f"b{who}"]}})
            } == {lasts[who]}


# ---------------------------------------------------------------- another model


def test_documents_of_another_model_are_taken_on(folder: Path) -> None:
    """A build with model "new" ran while a server of model "h" wrote: its changes are not the build's to lose."""
    old = RetrievalIndex.open(folder)
    log = ChangeLog(folder)
    with log.locked():
        log.append(
            [Change("upsert", f"n{i}", "", "zebra", "{}", np.eye(64, dtype=np.float32)[i]) for i in range(3)], 1, "h"
        )
    write_index(folder, 50, model_hash="new")
    index = RetrievalIndex.open(folder)
    engine = Engine(FakeEncoder(), index, name="fake", model_hash="new", index_folder=folder)
    with log.locked():
        log.append(
            [Change("delete", "n1"), Change("upsert", "n2", "", "okapi", "{}", np.eye(64, dtype=np.float32)[9])], 4, "h"
        )
    with TestClient(create_app(engine)) as client:
        assert len(index) == 50
        engine.writer.tend()
        assert len(index) == 52 and not engine.index.overlay.foreign
        assert [h["id"] for h in find(client, "zebra")[:1]] == ["n0"] and find(client, "okapi")[0]["id"] == "n2"
        assert log.last_seq() == 7
        engine.writer.tend()
        assert log.last_seq() == 7
    # The server of the old model may no longer write: its vectors are not the index's.
    with TestClient(create_app(Engine(FakeEncoder(), old, name="fake", model_hash="h", index_folder=folder))) as client:
        refused = client.post("/documents", json={"documents": [{"id": "a", "text": "a"}]})
        assert (
            error_of(refused, 503)["code"] == "not_writable_now" and "is another" in refused.json()["error"]["message"]
        )
        assert client.post("/search", json={"queries": ["zebra"]}).status_code == 200
