"""The HTTP service by clients that others wrote, and by requests that nobody would write."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from test_serve_api import KEY, WORDS, FakeEncoder, error_of, write_index

from serve.api import create_app
from serve.engine import Engine
from serve.guard import parse_keys
from serve.schemas import Limits
from tdro_ray.index.base import RetrievalIndex

SMALL = Limits(max_batch=8, max_characters=200, max_k=50, max_body_bytes=20_000)


def small_engine(folder: Path) -> Engine:
    write_index(folder, 60)
    index = RetrievalIndex.open(folder)
    return Engine(FakeEncoder(), index, name="fake", model_hash="h", limits=SMALL, cache_bytes=10_000)


# ---------------------------------------------------------------- openai


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Yield the URL of a real server of `app` on loopback."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(create_app(Engine(FakeEncoder(), name="fake", limits=SMALL), parse_keys(KEY))) as url:
        yield url


def test_the_openai_client_works_against_it(url: str) -> None:
    import openai

    texts = ["parse iso date", "open socket", "zip"]
    expected = FakeEncoder().encode(texts, "passage")
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http) as client:
        by_default = client.embeddings.create(model="fake", input=texts)  # asks for base64 and decodes it
        as_floats = client.embeddings.create(model="fake:passage", input=texts, encoding_format="float")
        for answer in (by_default, as_floats):
            np.testing.assert_allclose([d.embedding for d in answer.data], expected, atol=1e-6)
            assert [d.index for d in answer.data] == [0, 1, 2] and answer.usage.total_tokens == 9
        raw = client.embeddings.create(model="fake", input="zip", encoding_format="base64", user="someone")
        assert isinstance(raw.data[0].embedding, str)
        short = client.embeddings.create(model="fake:query", input=texts, dimensions=8)
        np.testing.assert_allclose(np.linalg.norm([d.embedding for d in short.data], axis=1), 1, atol=1e-6)
        with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; valid are 'fake'"):
            client.embeddings.create(model="gpt", input="a")
        with pytest.raises(openai.UnprocessableEntityError, match=r"texts\[0\] is empty"):
            client.embeddings.create(model="fake", input="")
        with pytest.raises(openai.APIStatusError, match="at most 8 are taken") as caught:
            client.embeddings.create(model="fake", input=["a"] * 9)
        assert caught.value.status_code == 413
    with (
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="wrong", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
        ) as client,
        pytest.raises(openai.AuthenticationError, match="API key is not valid"),
    ):
        client.embeddings.create(model="fake", input="a")


# ---------------------------------------------------------------- requests made up

ATOMS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**300, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "a", "nq", "fever", "query", "\0", "\ud800", "é🙂", "x" * 250),
    *("zip file", "' or 1=1 --", "fake", "fake:query", "base64", "float", "end", "error"),
)  # fmt: skip
FIELDS = {
    "/embed": ("texts", "kind", "task", "dimensions", "normalise", "truncate", "encoding"),
    "/search": ("queries", "vectors", "k", "filter", "task"),
    "/v1/embeddings": ("input", "model", "encoding_format", "dimensions", "user"),
}
OPERATORS = ("eq", "ne", "in", "gt", "gte", "lt", "lte", "and", "or", "not", "task", "year", "id", "taks")


def made_up(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, filters among them."""
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        return rng.choice(ATOMS)
    if kind < 0.75:
        return [made_up(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 9)))]
    return {rng.choice((*OPERATORS, "x")): made_up(rng, depth - 1) for _ in range(rng.randint(0, 3))}


def plausible(rng: random.Random, field: str) -> Any:
    """A value of the right shape, near the edges of what is taken."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    values = {
        "texts": [text] * rng.choice((1, 2, 8, 9)),
        "queries": [text] * rng.choice((1, 3, 8, 9)),
        "input": rng.choice((text, [text, "zip"])),
        "vectors": [
            [rng.gauss(0, 1) for _ in range(rng.choice((64, 64, 64, 63)))] for _ in range(rng.choice((1, 2, 9)))
        ],
        "kind": rng.choice(("query", "passage")),
        "task": rng.choice(("", "nq")),
        "k": rng.choice((1, 10, 50, 51)),
        "dimensions": rng.choice((1, 64, 65)),
        "normalise": rng.random() < 0.5,
        "truncate": rng.choice(("end", "error")),
        "filter": {"year": {rng.choice(OPERATORS): rng.randint(-5, 90)}},
        "model": rng.choice(("fake", "fake:query", "")),
    }
    return values.get(field, rng.choice(("float", "base64")))


def made_up_request(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Method, URL and keyword arguments of a request: mostly bodies with one wrong thing, some with all wrong."""
    path = rng.choice(
        (*FIELDS, "/search", "/info", "/documents", "/documents/x", "/metrics", "/health", "/%00", "//", "/é")
    )
    if path == "/search" and rng.random() < 0.3:
        names = rng.sample(("q", "k", "task", "x"), rng.randint(0, 3))
        return "GET", path, {"params": {n: str(made_up(rng, 0)).encode("utf-8", "replace").decode() for n in names}}
    if path not in FIELDS:
        return rng.choice(("GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS")), path, {}
    fields = [f for f in FIELDS[path] if rng.random() < 0.5] or [FIELDS[path][0]]
    body: Any = {field: plausible(rng, field) for field in fields}
    for _ in range(rng.choice((0, 0, 1, 2))):
        body[rng.choice((*FIELDS[path], "extra"))] = made_up(rng)
    if rng.random() < 0.05:
        body = made_up(rng, 5)
    content = json.dumps(body).encode()
    if rng.random() < 0.1:  # broken on the way
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.randbytes(rng.randint(0, 3)) + content[at + rng.randint(0, 3) :]
    kind = (
        "application/json" if rng.random() < 0.97 else rng.choice(("text/plain", "multipart/form-data", "é".encode()))
    )
    return "POST", path, {"content": content, "headers": {"content-type": kind}}


def send_made_up(client: TestClient, count: int, seed: int) -> Counter[int]:
    """Send requests and return how often each status came; every error must have the one shape, none may be a 500."""
    rng = random.Random(seed)
    statuses: Counter[int] = Counter()
    for number in range(count):
        method, url, options = made_up_request(rng)
        response = client.request(method, url, **options)
        statuses[response.status_code] += 1
        assert response.status_code < 500, (seed, number, method, url, options, response.text)
        if response.status_code >= 400 and method != "HEAD":
            error_of(response, response.status_code)
    return statuses


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_no_request_makes_a_500_or_stops_a_worker(tmp_path: Path, count: int) -> None:
    engine = small_engine(tmp_path)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        statuses = send_made_up(client, count, seed=count)
        assert {200, 400, 404, 405, 413, 422} <= set(statuses) and statuses[200] > count / 20
        assert engine.embedder.alive and engine.searcher.alive and engine.embedder.waiting == 0
        assert client.get("/health").status_code == 200
        assert len(client.post("/search", json={"queries": ["zip"], "k": 5}).json()["results"][0]) == 5


@pytest.mark.long
def test_the_service_keeps_to_its_openapi_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    wanted = [
        not_a_server_error, checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance
    ]  # fmt: skip
    seen = []
    with running(create_app(small_engine(tmp_path))) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in schemathesis.GenerationMode:

                @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
                @given(case=operation.as_strategy(generation_mode=mode))
                def holds(case: Any) -> None:
                    case.call_and_validate(checks=wanted)

                with contextlib.suppress(Unsatisfiable):  # a GET without parameters cannot be asked wrongly
                    holds()
                    seen.append((operation.label, mode.name))
    for label in ("POST /embed", "POST /search", "GET /search", "POST /v1/embeddings"):
        assert {(label, "POSITIVE"), (label, "NEGATIVE")} <= set(seen)
