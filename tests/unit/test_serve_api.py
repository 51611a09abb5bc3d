"""The HTTP service without weights: a bag-of-words encoder behind the real engine, index and routes."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api import create_app
from serve.batching import Batcher, Closed, Overloaded
from serve.bodies import JsonRequest
from serve.engine import Engine, watch
from serve.guard import check_binding, is_loopback, parse_keys
from serve.schemas import Limits
from tdro_ray.errors import ConfigError
from tdro_ray.index import faiss_index, store, versions
from tdro_ray.index.base import RetrievalIndex
from tdro_ray.types import RetrieverSpec

KEY = "sixteen-characters-or-more"
WORDS = ["parse", "date", "iso", "socket", "timeout", "matrix", "inverse", "json", "file", "zip", "thread", "lock"]


class FakeTokenizer:
    def encode(self, texts: Sequence[str], kind: str, task: str = "") -> list[list[int]]:
        return [[zlib.crc32(w.encode()) % 4096 for w in re.findall(r"\w+", t.lower())] + [0] for t in texts]

    def count(self, texts: Sequence[str], kind: str, task: str = "") -> list[int]:
        return [len(ids) for ids in self.encode(texts, kind, task)]


class FakeEncoder:
    """Bag of hashed words; the same text has the same vector, shared words bring vectors together."""

    dim = 64
    spec = RetrieverSpec(task_prompts={"nq": "Answer the question"})

    def __init__(self, delay_s: float = 0.0) -> None:
        self.tokenizer, self.delay_s, self.calls = FakeTokenizer(), delay_s, 0
        self.table = np.random.default_rng(0).standard_normal((4096, self.dim)).astype(np.float32)

    def embed_ids(self, sequences: Sequence[Sequence[int]], batch_tokens: int = 16384) -> np.ndarray:
        self.calls += 1
        time.sleep(self.delay_s)
        vectors = np.stack([self.table[list(s)].sum(axis=0) for s in sequences])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode(self, texts: Sequence[str], kind: str, task: str = "", batch_tokens: int = 16384) -> np.ndarray:
        return self.embed_ids(self.tokenizer.encode(texts, kind, task), batch_tokens)


def write_index(out: Path, count: int, model_hash: str = "h") -> None:
    rng = np.random.default_rng(count)
    texts = [" ".join(rng.choice(WORDS, 4)) + f" number {i}" for i in range(count)]
    docs = [(f"d{i}", f"T{i}", text, {"task": ("nq", "fever")[i % 2], "year": i}) for i, text in enumerate(texts)]
    vectors = FakeEncoder().encode([f"{d[1]} {d[2]}" for d in docs], "passage")
    with versions.new_version(out) as (name, folder):
        _, fields = store.write_documents(folder / "documents.lance", docs)
        store.add_vectors(folder / "documents.lance", vectors, fields)
        index, facts = faiss_index.build(lambda: iter([vectors]), count, vectors.shape[1], "Flat")
        faiss_index.save(index, folder / "index.faiss")
        model = {"name": "fake", "hash": model_hash}
        versions.write_manifest(folder, {"version": name, "dim": 64, "documents": count, "model": model, **facts})


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index")
    write_index(out, 200)
    return out


@pytest.fixture(scope="module")
def client(index_folder: Path) -> Iterator[TestClient]:
    limits = Limits(max_batch=8, max_characters=200, max_k=50, max_body_bytes=20_000)
    engine = Engine(FakeEncoder(), RetrievalIndex.open(index_folder), name="fake", model_hash="h", limits=limits)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, str]:
    """The error body, after checking that it has the one shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}
    return body["error"]


# ---------------------------------------------------------------- routes


def test_embed_gives_the_encoders_vectors(client: TestClient) -> None:
    texts = ["parse an ISO date", "socket timeout"]
    expected = FakeEncoder().encode(texts, "query")
    body = client.post("/embed", json={"texts": texts, "kind": "query", "task": "nq"}).json()
    assert body["model"] == "fake" and body["dimensions"] == 64 and body["tokens"] == 8
    np.testing.assert_allclose(body["embeddings"], expected, atol=1e-7)
    body = client.post("/embed", json={"texts": texts, "encoding": "base64", "dimensions": 16}).json()
    short = np.stack([np.frombuffer(base64.b64decode(e), "<f4") for e in body["embeddings"]])
    np.testing.assert_allclose(
        short, expected[:, :16] / np.linalg.norm(expected[:, :16], axis=1, keepdims=True), atol=1e-6
    )


def test_search_by_text_by_vector_and_by_get_agree(client: TestClient) -> None:
    query = "parse iso date json"
    by_text = client.post("/search", json={"queries": [query, "lock"], "k": 4}).json()
    assert by_text["index_version"] == "1" and by_text["model"] == "fake"
    assert [len(hits) for hits in by_text["results"]] == [4, 4]
    hit = by_text["results"][0][0]
    assert set(hit) == {"id", "score", "text", "title", "metadata"} and hit["metadata"]["task"] in ("nq", "fever")
    vector = FakeEncoder().encode([query], "query").tolist()
    by_vector = client.post("/search", json={"vectors": vector, "k": 4}).json()["results"][0]
    by_get = client.get("/search", params={"q": query, "k": 4}).json()["results"][0]
    assert [h["id"] for h in by_vector] == [h["id"] for h in by_get] == [h["id"] for h in by_text["results"][0]]
    assert by_vector[0]["score"] == pytest.approx(hit["score"], abs=1e-5)


def test_search_under_a_filter(client: TestClient) -> None:
    hits = client.post(
        "/search", json={"queries": ["zip"], "k": 9, "filter": {"task": "nq", "year": {"gte": 100}}}
    ).json()["results"][0]
    assert len(hits) == 9
    assert all(h["metadata"]["task"] == "nq" and h["metadata"]["year"] >= 100 for h in hits)
    assert client.post("/search", json={"queries": ["zip"], "filter": {"id": "none"}}).json()["results"] == [[]]
    error = error_of(client.post("/search", json={"queries": ["zip"], "filter": {"taks": "nq"}}), 422)
    assert error["code"] == "invalid_filter" and "Did you mean 'task'" in error["message"]


def test_openai_shape(client: TestClient) -> None:
    one = client.post("/v1/embeddings", json={"input": "zip file", "model": "fake"}).json()
    assert (
        one["object"] == "list" and one["model"] == "fake" and one["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    )
    assert [(d["object"], d["index"]) for d in one["data"]] == [("embedding", 0)]
    two = client.post(
        "/v1/embeddings", json={"input": ["zip file", "lock"], "model": "fake:query", "encoding_format": "base64"}
    )
    decoded = np.frombuffer(base64.b64decode(two.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, one["data"][0]["embedding"], atol=1e-7)
    assert (
        error_of(client.post("/v1/embeddings", json={"input": "a", "model": "gpt"}), 404)["code"] == "model_not_found"
    )
    error_of(client.post("/v1/embeddings", json={"input": [[1, 2]], "model": "fake"}), 422)


def test_operation_routes(client: TestClient) -> None:
    client.post("/embed", json={"texts": ["a"]})
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    info = client.get("/info").json()
    assert info["model"]["name"] == "fake" and info["model"]["dimensions"] == 64 and info["model"]["tasks"] == ["nq"]
    assert info["index"]["documents"] == 200 and info["index"]["recall@10"] == 1.0 and info["limits"]["max_k"] == 50
    metrics = client.get("/metrics").text
    assert re.search(r'tdro_requests_total\{route="/embed",status="200"\} [1-9]', metrics)
    assert "tdro_index_documents 200.0" in metrics
    page = client.get("/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    paths = client.get("/openapi.json").json()["paths"]
    documents = {"/documents", "/documents/{id}"}
    assert set(paths) == {"/embed", "/search", "/v1/embeddings", "/info", "/health", "/ready", "/metrics"} | documents
    answers = paths["/embed"]["post"]["responses"]
    assert set(answers) == {"200", "400", "401", "404", "413", "422", "429", "500", "503", "504"}
    assert client.get("/docs").status_code == 200


def test_page_fetches_nothing_from_elsewhere(client: TestClient) -> None:
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(\s*["']?(https?:)?//""", client.get("/").text
    )


# ---------------------------------------------------------------- errors


UNIT = [1.0] + [0.0] * 63
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/embed", {"texts": []}, 422, "texts"),
        ("/embed", {"texts": [""]}, 422, "texts[0] is empty"),
        ("/embed", {"texts": ["a", " \n"]}, 422, "texts[1] is empty"),
        ("/embed", {"texts": "a"}, 422, "texts"),
        ("/embed", {"texts": [1]}, 422, "texts.0"),
        ("/embed", {"texts": ["a"] * 9}, 413, "at most 8"),
        ("/embed", {"texts": ["a" * 201]}, 413, "at most 200"),
        ("/embed", {"texts": ["a"], "kind": "doc"}, 422, "kind"),
        ("/embed", {"texts": ["a"], "task": "nx"}, 422, "Did you mean 'nq'"),
        ("/embed", {"texts": ["a"], "extra": 1}, 422, "extra"),
        ("/embed", {"texts": ["a"], "dimensions": 65}, 422, "at most 64"),
        ("/embed", {"texts": ["a"], "dimensions": 0}, 422, "dimensions"),
        ("/embed", {"texts": ["a"], "dimensions": 10**4000}, 422, "dimensions"),
        ("/embed", {"texts": ["a"], "truncate": "start"}, 422, "truncate"),
        ("/embed", {"texts": ["a"], "normalise": 2}, 422, "normalise"),
        ("/embed", ["a"], 422, "body"),
        ("/search", {}, 422, "either queries or vectors"),
        ("/search", {"queries": ["a"], "vectors": [UNIT]}, 422, "either queries or vectors"),
        ("/search", {"queries": ["a"], "k": 0}, 422, "k"),
        ("/search", {"queries": ["a"], "k": -3}, 422, "k"),
        ("/search", {"queries": ["a"], "k": 51}, 422, "at most 50"),
        ("/search", {"queries": ["a"], "k": 10**4000}, 422, "k"),
        ("/search", {"queries": ["a"], "k": True}, 422, "k"),
        ("/search", {"queries": ["a"], "k": "3"}, 422, "k"),
        ("/search", {"queries": ["a"] * 9}, 413, "at most 8"),
        ("/search", {"vectors": [UNIT] * 9}, 413, "at most 8"),
        ("/search", {"vectors": [[1.0]]}, 422, "has 1 dimensions, the index has 64"),
        ("/search", {"vectors": [[0.0] * 64]}, 422, "is zero"),
        ("/search", {"vectors": [[10**4000] + [0.0] * 63]}, 422, "vectors.0.0"),
        ("/search", {"vectors": []}, 422, "vectors"),
        ("/search", {"vectors": [UNIT], "task": "nq"}, 422, "no effect"),
        ("/search", {"queries": ["a"], "filter": []}, 422, "filter"),
        ("/search", {"queries": ["a"], "filter": {}}, 422, "at least one field"),
        ("/search", {"queries": ["a"], "filter": {"year": {"gte": 10**4000}}}, 422, "integer"),
    ],
)  # fmt: skip
def test_bad_values_are_named(path: str, body: object, status: int, says: str, client: TestClient) -> None:
    content = _dumps(body)
    error = error_of(client.post(path, content=content, headers={"content-type": "application/json"}), status)
    assert says in error["message"]


def _dumps(body: object) -> str:
    """JSON with integers of any size."""
    import sys

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(body)
    finally:
        sys.set_int_max_str_digits(limit)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 422),
        (b"\xff\xfe", 400),
        (b"[" * 20_000, 400),
        (b'{"texts": [' + b"1" * 9_000 + b"]}", 400),
        (b'{"texts": ["\\ud800"]}', 422),
        (b'{"\\ud800": 1}', 422),
        (b'{"texts": ["a"], "kind": "\\udfff"}', 422),
        (b'{"vectors": [[NaN]]}', 422),
        (b'{"texts": ["' + b"a" * 30_000 + b'"]}', 413),
    ],
)
@pytest.mark.parametrize("path", ["/embed", "/search", "/v1/embeddings"])
def test_broken_bodies(path: str, content: bytes, status: int, client: TestClient) -> None:
    error_of(client.post(path, content=content, headers={"content-type": "application/json"}), status)


@settings(max_examples=200, deadline=None)
@given(body=st.one_of(json_values.map(_dumps).map(str.encode), st.binary(max_size=40)))
def test_bodies_are_read_as_the_standard_library_reads_them(body: bytes) -> None:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        expected = repr(json.loads(body))
    except ValueError as err:
        with pytest.raises(type(err)):
            asyncio.run(JsonRequest({"type": "http"}, receive).json())
    else:
        assert repr(asyncio.run(JsonRequest({"type": "http"}, receive).json())) == expected


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_vectors_that_are_no_numbers(number: str, client: TestClient) -> None:
    content = '{"vectors": [[' + ",".join([number] * 64) + "]]}"
    error_of(client.post("/search", content=content, headers={"content-type": "application/json"}), 422)


def test_vectors_at_the_ends_of_the_float_range(client: TestClient) -> None:
    reference = client.post("/search", json={"vectors": [UNIT]}).json()["results"]
    for number in (1e308, 1e-308):
        found = client.post("/search", json={"vectors": [[number] + [0.0] * 63]}).json()["results"]
        assert [h["id"] for h in found[0]] == [h["id"] for h in reference[0]]


def test_body_limit_holds_for_a_chunked_body(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    error = error_of(client.post("/embed", content=chunks(), headers={"content-type": "application/json"}), 413)
    assert error["code"] == "body_too_large"


def test_framework_errors_have_the_one_shape(client: TestClient) -> None:
    assert error_of(client.get("/nothing"), 404)["code"] == "not_found"
    response = client.get("/embed")
    assert error_of(response, 405)["code"] == "method_not_allowed" and response.headers["allow"] == "POST"
    error_of(client.get("/search"), 422)
    error_of(client.get("/search", params={"q": "a", "k": "x"}), 422)
    error_of(client.get("/search", params={"q": "a", "k": "0"}), 422)
    error_of(client.get("/search", params={"q": "  "}), 422)
    error_of(client.post("/embed", content=b"texts", headers={"content-type": "text/plain"}), 422)
    error_of(client.get("/embed/"), 404)


def test_defect_is_a_json_500_and_only_its_request_fails(index_folder: Path) -> None:
    class Broken(FakeEncoder):
        def embed_ids(self, sequences: Sequence[Sequence[int]], batch_tokens: int = 16384) -> np.ndarray:
            if any(len(s) == 4 for s in sequences):
                raise RuntimeError("out of memory")
            return super().embed_ids(sequences, batch_tokens)

    with TestClient(create_app(Engine(Broken())), raise_server_exceptions=False) as client:
        assert error_of(client.post("/embed", json={"texts": ["three words here"]}), 500)["code"] == "internal"
        assert client.post("/embed", json={"texts": ["two words"]}).status_code == 200
        assert error_of(client.post("/search", json={"queries": ["a"]}), 404)["code"] == "no_index"
        assert client.get("/info").json()["index"] is None


near_bodies = st.fixed_dictionaries(
    {},
    optional={
        "texts": st.lists(st.text(max_size=30), max_size=3) | json_values,
        "queries": st.lists(st.text(max_size=30), max_size=3) | json_values,
        "input": st.text(max_size=30) | json_values,
        "vectors": st.lists(st.lists(st.floats(), min_size=64, max_size=64), max_size=2) | json_values,
        "kind": st.sampled_from(["query", "passage"]) | json_values,
        "task": st.sampled_from(["", "nq"]) | json_values,
        "k": st.integers(-5, 60) | json_values,
        "dimensions": st.integers(-5, 70) | json_values,
        "truncate": st.sampled_from(["end", "error"]) | json_values,
        "normalise": st.booleans() | json_values,
        "encoding": st.sampled_from(["float", "base64"]) | json_values,
        "model": st.sampled_from(["", "fake", "fake:query", ":passage"]) | json_values,
        "filter": st.dictionaries(
            st.sampled_from(["task", "year", "id", "and", "or", "not", "x"]),
            json_values
            | st.dictionaries(
                st.sampled_from(["eq", "ne", "in", "gt", "gte", "lt", "lte"]), json_values | st.lists(st.integers())
            ),
            max_size=3,
        ),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/embed", "/search", "/v1/embeddings"]), body=near_bodies | json_values)
def test_no_body_makes_a_500(path: str, body: object, client: TestClient) -> None:
    response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code < 500, (path, body, response.text)
    if response.status_code != 200:
        error_of(response, response.status_code)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["/embed", "/search"]),
    content=st.binary(max_size=100),
    kind=st.sampled_from(["application/json", "text/plain", "x"]),
)
def test_no_bytes_make_a_500(path: str, content: bytes, kind: str, client: TestClient) -> None:
    assert client.post(path, content=content, headers={"content-type": kind}).status_code in (400, 422)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(q=st.text(max_size=30), k=st.integers() | st.text(max_size=5), task=st.text(max_size=5))
def test_no_query_string_makes_a_500(q: str, k: object, task: str, client: TestClient) -> None:
    q, task, k = (str(v).encode("utf-8", "replace").decode() for v in (q, task, k))
    assert client.get("/search", params={"q": q, "k": k, "task": task}).status_code in (200, 413, 422)


# ---------------------------------------------------------------- keys


def test_keys_guard_everything_but_the_open_paths() -> None:
    digests = parse_keys(f"{KEY}, another-key-of-some-length")
    with TestClient(create_app(Engine(FakeEncoder()), digests)) as client:
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        body = {"texts": ["a"]}
        refused = client.post("/embed", json=body)
        assert error_of(refused, 401)["code"] == "unauthorized" and refused.headers["www-authenticate"] == "Bearer"
        for path in ("/info", "/metrics", "/search?q=a", "/nothing", "/%2e/info", "/docs/x"):
            error_of(client.get(path), 401)
        for header in (
            {"Authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer {KEY}"},
            {"X-API-Key": "another-key-of-some-length"},
        ):
            assert client.post("/embed", json=body, headers=header).status_code == 200
        for header in (
            {"Authorization": KEY},
            {"Authorization": f"Bearer {KEY[:-1]}"},
            {"Authorization": "Bearer "},
            {"X-API-Key": ""},
        ):
            error_of(client.post("/embed", json=body, headers=header), 401)


def test_binding_beyond_loopback_needs_a_key() -> None:
    for host in ("127.0.0.1", "127.3.4.5", "localhost", "::1", "[::1]"):
        check_binding(host, ())
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="TDRO_API_KEYS"):
            check_binding(host, ())
        check_binding(host, parse_keys(KEY))
    assert parse_keys(" , ") == ()
    with pytest.raises(ConfigError, match="shorter than 16"):
        parse_keys("short")


# ---------------------------------------------------------------- load


def requests_at_once(engine: Engine, bodies: list[dict], timeout: float = 30) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        app = create_app(engine)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=timeout) as client:
                return await asyncio.gather(*(client.post("/embed", json=body) for body in bodies))

    return asyncio.run(run())


def test_concurrent_requests_share_forwards_and_keep_their_own_answers() -> None:
    encoder = FakeEncoder(delay_s=0.02)
    texts = [
        [f"{a} {b} {i}" for i in range(1 + n % 3)]
        for n, (a, b) in enumerate(zip(WORDS * 5, WORDS[1:] * 5, strict=False))
    ]
    responses = requests_at_once(
        Engine(encoder), [{"texts": t, "kind": ("query", "passage")[len(t) % 2]} for t in texts]
    )
    assert encoder.calls < len(texts) / 3
    for text, response in zip(texts, responses, strict=True):
        np.testing.assert_allclose(response.json()["embeddings"], FakeEncoder().encode(text, "query"), atol=1e-6)


def test_overload_is_refused_at_once_and_the_rest_is_answered() -> None:
    gate = threading.Event()

    class Held(FakeEncoder):
        def embed_ids(self, sequences: Sequence[Sequence[int]], batch_tokens: int = 16384) -> np.ndarray:
            assert gate.wait(20), "the test opens the gate once the others are refused"
            return super().embed_ids(sequences, batch_tokens)

    app = create_app(Engine(Held(), limits=Limits(max_waiting=8, batch_tokens=16)))
    refused: list[httpx.Response] = []

    async def run() -> list[int]:
        async def one(client: httpx.AsyncClient) -> int:
            response = await client.post("/embed", json={"texts": ["a b c d"] * 4})
            if response.status_code == 429:
                refused.append(response)
            if len(refused) == 16:  # none of these waited for the model: it has not answered yet
                gate.set()
            return response.status_code

        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client,
        ):
            return await asyncio.gather(*(one(client) for _ in range(20)))

    statuses = asyncio.run(run())
    assert set(statuses) == {200, 429} and statuses.count(200) <= 4
    for response in refused:
        assert response.headers["retry-after"] == "1" and error_of(response, 429)["code"] == "overloaded"


def test_slow_answer_is_a_504_and_its_work_is_dropped() -> None:
    encoder = FakeEncoder(delay_s=0.3)
    engine = Engine(encoder, limits=Limits(timeout_s=0.1, batch_tokens=16))
    responses = requests_at_once(engine, [{"texts": ["a b c d e f g h i j k l"]}] * 5)
    assert [error_of(r, 504)["code"] for r in responses] == ["timeout"] * 5
    assert encoder.calls == 1  # the four that still waited never reached the model


def test_closed_engine_answers_503() -> None:
    engine = Engine(FakeEncoder())
    with TestClient(create_app(engine)) as client:
        engine.close()
        for response in (client.post("/embed", json={"texts": ["a"]}), client.get("/health"), client.get("/ready")):
            assert error_of(response, 503)["code"] == "not_running"


def test_health_touches_the_model() -> None:
    encoder = FakeEncoder()
    with TestClient(create_app(Engine(encoder))) as client:
        assert client.get("/health").status_code == 200 and encoder.calls == 1
        assert client.get("/health").status_code == 200 and encoder.calls == 1  # lately enough


def test_new_index_version_is_taken_up_under_load_without_a_failed_request(tmp_path: Path) -> None:
    write_index(tmp_path, 50)
    engine = Engine(FakeEncoder(), RetrievalIndex.open(tmp_path), name="fake", model_hash="h", index_folder=tmp_path)
    seen: set[tuple[str, int]] = set()
    stop = threading.Event()
    with TestClient(create_app(engine)) as client:

        def load() -> None:
            while not stop.is_set():
                body = client.post("/search", json={"queries": ["zip file"], "k": 100}).json()
                seen.add((body["index_version"], len(body["results"][0])))

        thread = threading.Thread(target=load)
        thread.start()
        write_index(tmp_path, 60)
        deadline = time.monotonic() + 10
        while ("2", 60) not in seen and time.monotonic() < deadline:
            time.sleep(0.05)
        stop.set()
        thread.join()
        assert seen == {("1", 50), ("2", 60)}
        write_index(tmp_path, 70, model_hash="other")  # not this model's: refused, the old version stays
        with pytest.raises(ConfigError, match="is another"):
            engine.refresh()
        assert client.get("/info").json()["index"]["version"] == "2"


def test_the_index_is_followed_again_after_an_error_of_any_kind(
    index_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(FakeEncoder(), RetrievalIndex.open(index_folder), index_folder=index_folder)
    looks: list[str] = []

    def refresh() -> bool:
        looks.append("")
        if len(looks) == 1:
            raise RuntimeError("the storage hiccups")
        return False

    monkeypatch.setattr(engine, "refresh", refresh)

    async def follow() -> None:
        async with asyncio.timeout(10):
            task = asyncio.create_task(watch(engine, 0.01))
            while len(looks) < 3:
                await asyncio.sleep(0.01)
            task.cancel()

    asyncio.run(follow())
    engine.close()


def test_index_of_another_model_is_refused(index_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"built with model 'fake'.*is another"):
        Engine(FakeEncoder(), RetrievalIndex.open(index_folder), model_hash="different")
    wide = FakeEncoder()
    wide.dim = 65
    with pytest.raises(ConfigError, match="64 dimensions"):
        Engine(wide, RetrievalIndex.open(index_folder))


# ---------------------------------------------------------------- batcher


def test_batcher_keeps_to_the_budget_and_to_one_key() -> None:
    gate, batches = threading.Event(), []

    def run(key: str, values: list[int]) -> list[int]:
        gate.wait(5)
        batches.append((key, values))
        return [v * 10 for v in values]

    batcher = Batcher(run, budget=10, max_waiting=100, name="test")
    first = batcher.submit("a", [0], [1])  # occupies the worker
    while batcher.waiting:
        time.sleep(0.001)
    futures = [batcher.submit("ab"[i % 2], [i], [4]) for i in range(1, 7)]
    big = batcher.submit("a", [7], [99])  # beyond the budget: alone
    dropped = batcher.submit("a", [8], [1])
    dropped.cancel()
    gate.set()
    assert (
        first.result(5) == [0]
        and [f.result(5) for f in futures] == [[i * 10] for i in range(1, 7)]
        and big.result(5) == [70]
    )
    assert batches == [("a", [0]), ("b", [1, 3]), ("a", [2, 4]), ("b", [5]), ("a", [6]), ("a", [7])]
    batcher.close()
    with pytest.raises(Closed):
        batcher.submit("a", [1], [1])


def test_batcher_refuses_beyond_its_bound_but_takes_one_large_request() -> None:
    gate = threading.Event()

    def run(key: None, values: list[int]) -> list[int]:
        gate.wait(5)
        return values

    batcher = Batcher(run, budget=1, max_waiting=3, name="test")
    large = batcher.submit(None, list(range(5)), [1] * 5)
    with pytest.raises(Overloaded):
        batcher.submit(None, [1], [1])
    gate.set()
    assert large.result(5) == list(range(5))
    batcher.close()
