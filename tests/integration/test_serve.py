"""Index build and HTTP service on a real Ray, behind HAProxy: one tiny model, one index, one Serve application for all tests."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdro_ray.config import ModelSettings, TinyModel
from tdro_ray.errors import ConfigError, DataError, ResourceError
from tdro_ray.types import RetrieverSpec

TOPICS = [
    "parse iso date",
    "open socket timeout",
    "invert matrix",
    "read json file",
    "extract zip archive",
    "lock thread",
]
TINY = TinyModel(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=512)


def documents(count: int) -> list[tuple[str, str, str, dict[str, Any]]]:
    return [
        (f"d{i}", f"title {i}", f"{TOPICS[i % 6]} number {i}", {"task": ("nq", "fever")[i % 2], "year": i})
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tdro_ray.model.build import build_base

    folder = tmp_path_factory.mktemp("model") / "tiny"
    spec = RetrieverSpec(query_length=32, passage_length=64)
    build_base(ModelSettings(tiny=TINY), spec, itertools.islice(itertools.cycle(TOPICS), 600), folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[None]:
    import sys

    import ray

    from cluster.ingress import prepare

    before = dict(os.environ)
    assert "ray.serve" not in sys.modules, "it reads its environment once"
    prepare("haproxy", starts_ray=True)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def build(model: Path, out: Path, count: int, **options: Any) -> dict[str, Any]:
    from tdro_ray.index.build import build_index

    return build_index(documents(count), model, out, cpus_per_actor=0.5, **options)


@pytest.fixture(scope="module")
def index(cluster: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index")
    progress: list[tuple[str, int, int]] = []
    manifest = build(model, out, 1500, progress=lambda *step: progress.append(step))
    assert progress[-1] == ("index", 1500, 1500) and ("embed", 1500, 1500) in progress
    assert manifest["documents"] == 1500 and manifest["dim"] == 64 and manifest["recall@10"] == 1.0
    assert manifest["fields"] == {"id": "string", "task": "string", "year": "int64"}
    assert manifest["model"]["name"] == "tiny" and len(manifest["model"]["hash"]) == 64
    return out


@pytest.fixture(scope="module")
def url(cluster: None, model: Path, index: Path) -> Iterator[str]:
    from serve import deployment

    with socket.socket() as taken:  # before Serve listens anywhere
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match=r"Cannot serve on 127\.0\.0\.1:\d+: .*serve\.port"):
            deployment.start(model, index, port=taken.getsockname()[1])
    url = deployment.start(model, index, port=0)
    yield url
    deployment.stop()
    port = int(url.rpartition(":")[2])
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def call(url: str, body: object = None) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as err:
        return err.code, json.loads(err.read())


def test_vectors_over_http_are_the_encoders(url: str, model: Path) -> None:
    from tdro_ray.model.encoder import Encoder

    texts = ["parse iso date", "a much longer text about how to open a socket with a timeout", "zip"]
    for kind in ("query", "passage"):
        status, body = call(f"{url}/embed", {"texts": texts, "kind": kind})
        assert status == 200 and body["model"] == "tiny"
        expected = Encoder.load(model).encode(texts, kind)
        cosine = (np.array(body["embeddings"]) * expected).sum(axis=1)
        assert (cosine >= 0.9999).all()


def test_search_finds_the_topic_and_keeps_to_the_filter(url: str) -> None:
    status, body = call(f"{url}/search", {"queries": ["extract zip archive", "invert matrix"], "k": 3})
    assert status == 200 and body["index_version"] == "1"
    assert ["zip" in hits[0]["text"] or "matrix" in hits[0]["text"] for hits in body["results"]] == [True, True]
    status, body = call(
        f"{url}/search", {"queries": ["lock thread"], "k": 5, "filter": {"task": "fever", "year": {"lt": 100}}}
    )
    assert len(body["results"][0]) == 5
    assert all(h["metadata"]["task"] == "fever" and h["metadata"]["year"] < 100 for h in body["results"][0])
    assert call(f"{url}/search?q=lock%20thread&k=2")[1]["results"][0][0]["text"].startswith("lock thread")


def test_errors_keep_their_shape_behind_the_proxy(url: str) -> None:
    for path, body, status in (
        ("/nothing", None, 404),
        ("/embed", {"texts": [""]}, 422),
        ("/search", {"queries": ["a"], "k": 0}, 422),
        ("/embed", {"texts": ["a" * 100_001]}, 413),
    ):
        answered, error = call(url + path, body)
        assert answered == status and set(error["error"]) == {"code", "message"}


def test_operation_routes(url: str) -> None:
    assert call(f"{url}/health") == (200, {"status": "ok"})
    assert call(f"{url}/ready") == (200, {"status": "ready"})
    info = call(f"{url}/info")[1]
    assert info["index"]["documents"] == 1500 and info["model"]["dimensions"] == 64
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/", timeout=10) as page:
        assert b"<form" in page.read()


def test_mistakes_are_refused_before_anything_starts(
    url: str, model: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve import deployment

    with pytest.raises(ResourceError, match="already listens"):
        deployment.start(model, index, port=1)
    monkeypatch.delenv("TDRO_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="TDRO_API_KEYS"):
        deployment.start(model, index, host="0.0.0.0")
    with pytest.raises(DataError, match="no complete index"):
        deployment.start(model, model)
    with pytest.raises(ResourceError, match="the cluster has 2"):
        deployment.start(model, index, num_replicas=9)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(ConfigError, match="served model 'other' is another"):
        deployment.start(other, index)


def test_a_proxy_that_serve_gives_up_on_is_one_message(
    url: str, model: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from serve import deployment

    def too_slow(**_: Any) -> None:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(deployment.ray_serve, "start", too_slow)
    with pytest.raises(ResourceError, match=r"proxy did not start in time: .*Try again"):
        deployment.start(model, index, port=int(url.rsplit(":", 1)[1]))


def test_new_version_is_served_under_load_without_a_failed_request(url: str, model: Path, index: Path) -> None:
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            status, body = call(f"{url}/search", {"queries": ["lock thread"], "k": 2})
            answers.append((status, body.get("index_version", "")))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert build(model, index, 1600, factory="HNSW32")["version"] == "2"
        for _ in range(300):
            if ("2" in {version for _, version in answers}) or stop.wait(0.1):
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {"1", "2"}


def test_documents_are_written_through_serve_and_merged_in_a_ray_task(url: str, model: Path, index: Path) -> None:
    from serve import deployment
    from tdro_ray.index.base import RetrievalIndex
    from tdro_ray.index.build import embed_records
    from tdro_ray.model.encoder import Encoder

    record = {
        "id": "guides/dates",
        "title": "Dates",
        "text": "parse iso date",
        "metadata": {"task": "nq", "year": 5000},
    }
    status, body = call(f"{url}/documents", {"documents": [record]})
    before = RetrievalIndex.open(index)
    assert status == 200 and body == {"upserted": 1, "seq": 1, "index_version": before.version}
    (expected,) = embed_records(Encoder.load(model), [{**record, "metadata": json.dumps(record["metadata"])}], 1024)
    assert (before.overlay.view().vectors @ expected >= 0.9999).all()  # as the build would have embedded it
    searched = {"queries": ["parse iso date"], "k": 1, "filter": {"year": {"gte": 5000}}}
    hit = call(f"{url}/search", searched)[1]["results"][0][0]
    assert {key: hit[key] for key in record} == record
    with pytest.raises(DataError, match="no complete index"):  # the task's own error, not Ray's
        deployment._merge_in_task(index.parent, num_cpus=0)
    made = deployment._merge_in_task(index, num_cpus=0)
    assert made is not None and made["documents"] == len(before) and made["merged_seq"] == 1
    for _ in range(100):
        info = call(f"{url}/info")[1]["index"]
        if info["version"] == made["version"]:
            break
        threading.Event().wait(0.1)
    assert info["version"] == made["version"] and info["changes"]["unmerged"] == 0
    merged = call(f"{url}/search", searched)[1]["results"][0]
    assert merged == [
        {**hit, "score": pytest.approx(hit["score"], abs=1e-5)}
    ]  # the index rounds otherwise than the overlay
    request = urllib.request.Request(f"{url}/documents/guides/dates", method="DELETE")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        assert json.loads(answer.read()) == {"deleted": True, "seq": 2, "index_version": made["version"]}
    assert call(f"{url}/search", searched)[1]["results"] == [[]]


def test_shipped_config_builds_the_application() -> None:
    import yaml
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from serve import deployment

    file = Path(deployment.__file__).with_name("config.yaml")
    config = ServeDeploySchema(**yaml.safe_load(file.read_text()))
    (application,) = config.applications
    assert application.name == deployment.APP_NAME and application.import_path == "serve.deployment:app"
    built = call_user_app_builder_with_args_if_necessary(deployment.app, application.args)
    assert built._bound_deployment.name == application.deployments[0].name


def test_cells_filled_by_actors_are_those_filled_in_one_process(
    url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdro_ray.index import build as module
    from tdro_ray.index import faiss_index
    from tdro_ray.index.base import RetrievalIndex

    monkeypatch.setattr(module, "ADD_ROWS", 300)
    progress: list[tuple[str, int, int]] = []
    manifest = build(model, tmp_path, 1000, factory="IVF8,SQ8", progress=lambda *step: progress.append(step))
    assert [step[1:] for step in progress if step[0] == "index"] == [(n, 1000) for n in (300, 600, 900, 1000)]
    index = RetrievalIndex.open(tmp_path)
    alone, facts = faiss_index.build(index.store.vector_blocks, 1000, 64, "IVF8,SQ8")
    assert {key: manifest[key] for key in facts} == facts
    queries = index.store.vector_range(100, 140)
    assert np.array_equal(index.store.vectors(np.arange(100, 140)), queries)
    for found, expected in zip(
        faiss_index.search(index.faiss, queries, 10), faiss_index.search(alone, queries, 10), strict=True
    ):
        np.testing.assert_array_equal(np.sort(found), np.sort(expected))  # equal texts tie


def test_failed_build_leaves_the_current_version(url: str, model: Path, index: Path) -> None:
    before = (index / "current").read_text()
    with pytest.raises(ConfigError, match="wants 64 cells"):
        build(model, index, 40, factory="IVF64,Flat")
    assert (index / "current").read_text() == before
    assert not list(index.glob("versions/.building-*"))
    assert call(f"{url}/search?q=zip")[0] == 200
