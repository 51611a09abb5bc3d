"""The service behind HAProxy: same answers, same errors; a killed replica and a stop cost no request."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from service import Service, service, write_index

from tdro_ray.config import ModelSettings, TinyModel
from tdro_ray.types import RetrieverSpec

pytestmark = pytest.mark.long
TOPICS = ["parse iso date", "open socket timeout", "invert matrix", "read json file", "lock thread"]
# A small queue and small batches: a few clients are an overload, and a large request takes a while.
LIMITS = {"max_waiting": 64, "batch_tokens": 64}


def make_tiny(folder: Path) -> Path:
    """Write a tiny model."""
    from tdro_ray.model.build import build_base

    tiny = TinyModel(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=512)
    texts = itertools.islice(itertools.cycle(TOPICS), 600)
    build_base(ModelSettings(tiny=tiny), RetrieverSpec(query_length=32, passage_length=64), texts, folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    index = write_index(model, tmp_path_factory.mktemp("index"), [f"{t} number {i}" for i in range(40) for t in TOPICS])
    with service(model, index, "haproxy", num_replicas=2, threads=1, cache_mb=0, limits=LIMITS) as running:
        yield running


@pytest.fixture
def client(running: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, trust_env=False, timeout=60) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}
    return body["error"]


def test_answers_and_errors_are_the_services_own(running: Service, client: httpx.Client, model: Path) -> None:
    from tdro_ray.model.encoder import Encoder

    found = np.array(client.post("/embed", json={"texts": TOPICS, "kind": "query"}).json()["embeddings"])
    assert ((found * Encoder.load(model).encode(TOPICS, "query")).sum(axis=1) >= 0.9999).all()
    hits = client.post("/search", json={"queries": ["invert matrix"], "k": 3}).json()["results"][0]
    assert len(hits) == 3 and all("matrix" in hit["text"] for hit in hits)
    assert client.get("/search", params={"q": "zip", "k": 2}).status_code == 200
    error_of(client.get("/nothing"), 404)
    error_of(client.post("/embed", content=b"{", headers={"content-type": "application/json"}), 400)
    error_of(client.post("/embed", json={"texts": [""]}), 422)
    error_of(client.post("/embed", json={"texts": ["a"] * 257}), 413)
    error_of(client.post("/embed", content=b" " * (9 << 20), headers={"content-type": "application/json"}), 413)


def test_overload_is_refused_in_the_services_own_words(running: Service, client: httpx.Client) -> None:
    many = {"texts": [f"{topic} {i} " * 5 for i in range(12) for topic in TOPICS]}
    refused: dict[int, httpx.Response] = {}
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=running.url, trust_env=False, timeout=60) as own:
            while not stop.is_set():
                response = own.post("/embed", json=many)
                refused.setdefault(response.status_code, response)

    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(load) for _ in range(8)]
        deadline = time.monotonic() + 30
        while not {429, -503} <= set(refused) and time.monotonic() < deadline:
            ready = client.get("/ready")
            if ready.status_code == 503:
                refused[-503] = ready
        stop.set()
        for thread in threads:
            thread.result()
    assert set(refused) <= {200, 429, -503}
    assert error_of(refused[429], 429)["code"] == "overloaded" and refused[429].headers["retry-after"] == "1"
    assert error_of(refused[-503], 503)["code"] == "overloaded"


def replaced(running: Service, before: list[int]) -> bool:
    """True when another replica stands for the first of two."""
    now = running.replicas()
    return len(now) == 2 and before[0] not in now and before[1] in now


def test_a_killed_replica_costs_no_request(running: Service) -> None:
    before = running.replicas()
    assert len(before) == 2
    tries: Counter[str] = Counter()
    failed: list[str] = []
    stop = threading.Event()

    def ask(own: httpx.Client) -> bool:
        try:
            response = own.post("/search", json={"queries": ["lock thread"], "k": 2})
        except httpx.TransportError as err:
            tries[repr(err)] += 1
            return False
        if response.status_code != 200:
            tries[f"{response.status_code} {response.text[:200]}"] += 1
            return False
        return "lock" in response.json()["results"][0][0]["text"]

    def load() -> None:
        with httpx.Client(base_url=running.url, trust_env=False, timeout=30) as own:
            while not stop.is_set():
                if ask(own):
                    tries["first"] += 1
                    continue
                time.sleep(
                    0.1
                )  # HAProxy is reloaded without the dead replica, and closes idle connections: a retry waits for that
                if ask(own):
                    tries["second"] += 1
                else:
                    failed.append("both")

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(load) for _ in range(4)]
        time.sleep(1.0)
        os.kill(before[0], signal.SIGKILL)
        deadline = time.monotonic() + 90
        while not replaced(running, before) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(3.0)  # the new one takes its part
        stop.set()
        for thread in threads:
            thread.result()
    print(f"killed replica: {dict(tries)} answered, failed {len(failed)}")
    assert not failed and tries["first"] > 50
    assert replaced(running, before)


def test_a_stop_lets_the_request_under_way_finish(running: Service, client: httpx.Client) -> None:
    large = {"texts": [f"{TOPICS[i % 5]} number {i} " * 8 for i in range(256)]}
    began = time.monotonic()
    assert client.post("/embed", json=large).status_code == 200
    usual = time.monotonic() - began
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/embed", json=large)
        time.sleep(usual / 4)
        running.stop()
        response = answer.result()
    assert response.status_code == 200 and len(response.json()["embeddings"]) == 256
    assert running.process.stdout is not None and "stopped\n" in running.process.stdout
    with pytest.raises(httpx.TransportError):
        client.get("/ready")
