"""The served embedder: every backend gives the training model's vectors, and repeated texts cost nothing."""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import json
import re
import shutil
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from test_export import PROMPTS, cosines, make_model, make_run
from torch._inductor.exc import InvalidCxxCompiler

from serve.api import create_app
from serve.cache import ENTRY_BYTES, VectorCache, text_key
from serve.engine import Engine
from tdro_ray.errors import ConfigError
from tdro_ray.index import faiss_index, store, versions
from tdro_ray.index.versions import model_hash
from tdro_ray.model import encoder as encoder_module
from tdro_ray.model import export as export_module
from tdro_ray.model import load
from tdro_ray.model.encoder import Encoder, Retriever
from tdro_ray.model.export import export
from tdro_ray.model.load import load_encoder
from tdro_ray.model.tokenize import TextTokenizer

TEXTS = ["date", "parse an ISO 8601 date", *(str(f.__doc__) for f in (json.loads, textwrap.wrap, argparse))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("backends")
    model = make_model(root / "model", task_prompts=PROMPTS, query_length=48, passage_length=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export_module, "_check", lambda *_: None
        )  # in a fresh process: the tests below compare themselves
        yield folders_of(root, model)


def folders_of(root: Path, model: Path) -> dict[str, Path]:
    graph = export(model, root / "onnx", make_run(root / "run"), "current", "onnx", model_hash(model))
    return {"torch": model, "onnx": graph}


def served(folder: Path, **options: Any) -> tuple[np.ndarray, str]:
    """Vectors of TEXTS as passages and as queries of a task, through the engine, and the backend's name."""

    async def ask(engine: Engine) -> np.ndarray:
        parts = [await engine.embed(TEXTS, "passage"), await engine.embed(TEXTS, "query", "questions")]
        return np.concatenate([vectors for vectors, _ in parts])

    engine = Engine.open(folder, **options)
    try:
        return asyncio.run(ask(engine)), engine.info()["model"]["backend"]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("folder", "options", "backend"),
    [
        ("torch", {"dtype": "float32"}, "torch float32 on cpu"),
        ("torch", {"dtype": "bfloat16", "backend": "torch"}, "torch bfloat16 on cpu"),
        ("torch", {"dtype": "auto", "threads": 1}, "torch (bfloat16|float32) on cpu"),
        ("onnx", {"threads": 1}, "onnxruntime float32 on cpu"),
        ("onnx", {"backend": "onnx"}, "onnxruntime float32 on cpu"),
    ],
)
def test_every_backend_serves_the_training_models_vectors(
    folders: dict[str, Path], folder: str, options: dict[str, Any], backend: str
) -> None:
    trained = Encoder.load(folders["torch"])
    expected = np.concatenate([trained.encode(TEXTS, "passage"), trained.encode(TEXTS, "query", "questions")])
    found, name = served(folders[folder], **options)
    assert cosines(found, expected).min() >= 0.9999
    assert re.fullmatch(backend, name)


@pytest.mark.parametrize("threads", [1, 2])
def test_forwards_and_searches_use_the_threads_that_were_given(folders: dict[str, Path], threads: int) -> None:
    import faiss

    engine = Engine.open(folders["torch"], threads=threads)
    found: dict[str, int] = {}
    for name, batcher, count in (
        ("torch", engine.embedder, torch.get_num_threads),
        ("faiss", engine.searcher, faiss.omp_get_max_threads),
    ):
        batcher._run = lambda key, values, name=name, count=count: [found.update({name: count()})]
        batcher.submit(None, [0], [1]).result(10)
    engine.close()
    assert found == {"torch": threads, "faiss": threads}


def test_the_encoder_is_loaded_in_a_thread_that_has_ended(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays is one thread that computes: OpenMP's workers of another would slow it."""
    loaders: list[threading.Thread] = []
    real = load.load_encoder

    def noting(*arguments: Any) -> Any:
        loaders.append(threading.current_thread())
        return real(*arguments)

    monkeypatch.setattr(load, "load_encoder", noting)
    engine = Engine.open(folders["torch"])
    engine.close()
    assert len(loaders) == 1 and loaders[0] is not threading.main_thread() and not loaders[0].is_alive()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_compiled_vectors_are_the_plain_ones_for_any_shape(folders: dict[str, Path], kind: str) -> None:
    from torch._dynamo.utils import counters

    encoders = [Encoder.load(folders["torch"]) for _ in range(2)]
    if kind == "bert":
        from transformers import BertConfig, BertModel

        vocabulary = encoders[0].retriever.backbone.config.vocab_size
        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        body = BertModel(BertConfig(vocab_size=vocabulary, **size), add_pooling_layer=False)
        encoders = [Encoder(Retriever(copy.deepcopy(body), e.spec), e.tokenizer) for e in encoders]
    plain, compiled = encoders
    compiled.compile(TEXTS)
    assert "compiled" in compiled.backend
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 17):
        for longest in (1, 2, 9, 64, 200):
            sequences = [rng.integers(3, 250, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
            assert cosines(compiled.embed_ids(sequences), plain.embed_ids(sequences)).min() >= 0.999999
    assert counters["stats"]["unique_graphs"] == graphs, "no request waits for a compilation"


def test_a_model_that_cannot_be_compiled_is_one_message(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_compiler(*_: Any) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", without_compiler)
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    with pytest.raises(ConfigError, match=r"cannot be compiled here: .*Install a C\+\+ compiler.*serve.compile=false"):
        load_encoder(folders["torch"], compile=True)
    with pytest.raises(ConfigError, match=r"compiled already: set serve\.compile=false"):
        load_encoder(folders["onnx"], compile=True)


def test_bfloat16_is_dropped_where_it_moves_the_vectors(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_coarse(module: torch.nn.Module) -> None:
        for layer in module.modules():
            if type(layer) is torch.nn.Linear:
                layer.weight.data = torch.randn_like(layer.weight)

    monkeypatch.setattr(load, "multiplies_bfloat16", lambda device: True)
    assert load_encoder(folders["torch"], dtype="auto").dtype == "bfloat16"
    monkeypatch.setattr(encoder_module, "halve_linears", too_coarse)
    found = load_encoder(folders["torch"], dtype="auto")
    assert found.dtype == "float32" and "in float32: in bfloat16 a sample text has cosine" in caplog.text
    np.testing.assert_array_equal(found.encode(TEXTS, "query"), Encoder.load(folders["torch"]).encode(TEXTS, "query"))
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda device: False)
    assert load_encoder(folders["torch"], dtype="auto").dtype == "float32"


def test_a_folder_of_another_backend_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"onnx was asked for, and .*no ONNX export: `tdro export --format onnx`"):
        load_encoder(folders["torch"], backend="onnx")
    with pytest.raises(
        ConfigError, match=r"torch was asked for, and .* is an ONNX export: give the model's own folder"
    ):
        load_encoder(folders["onnx"], backend="torch")
    with pytest.raises(ConfigError, match="runs in float32"):
        load_encoder(folders["onnx"], dtype="bfloat16")


def test_the_recipe_may_ask_for_onnxruntime(folders: dict[str, Path], tmp_path: Path) -> None:
    from types import SimpleNamespace

    from tdro_ray.commands import _for_backend
    from tdro_ray.config import ServeSettings

    run: Any = SimpleNamespace(folder=make_run(tmp_path), recipe=SimpleNamespace(serve=ServeSettings()))
    assert _for_backend(run, folders["torch"]) == folders["torch"]
    run.recipe.serve = ServeSettings(backend="onnx")
    assert _for_backend(run, folders["onnx"]) == folders["onnx"]
    exported = _for_backend(run, folders["torch"])
    written = (exported / "model.onnx").stat().st_mtime_ns
    assert exported == tmp_path / "onnx" / "model" and model_hash(exported) == model_hash(folders["torch"])
    assert _for_backend(run, folders["torch"]) == exported
    assert (exported / "model.onnx").stat().st_mtime_ns == written  # not again


# ---------------------------------------------------------------- cache, truncation, shapes


class CountingEncoder:
    """An encoder that counts the texts that reach it."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.texts = encoder, 0
        self.tokenizer, self.spec, self.dim = encoder.tokenizer, encoder.spec, encoder.dim

    def embed_ids(self, sequences: Any, batch_tokens: int = 16384) -> np.ndarray:
        self.texts += len(sequences)
        return self.encoder.embed_ids(sequences, batch_tokens)


def ask_all(engine: Engine, requests: list[tuple[list[str], dict[str, Any]]]) -> list[tuple[np.ndarray, int]]:
    async def run() -> list[tuple[np.ndarray, int]]:
        return [await engine.embed(texts, **{"kind": "passage", **options}) for texts, options in requests]

    return asyncio.run(run())


def test_kept_vectors_are_the_models_and_skip_it(folders: dict[str, Path]) -> None:
    requests: list[tuple[list[str], dict[str, Any]]] = [
        (["date", "zip file", "date"], {}),
        (["zip file", "fox", "date"], {}),
        (["date"], {"kind": "query"}),
        (["date"], {"kind": "query", "task": "questions"}),
        (["date", "fox"], {"dimensions": 4}),
        (["date", "fox"], {"dimensions": 4, "normalise": False}),
        (["fox"], {"truncate": "error"}),
        (["fox"], {"truncate": "error"}),
    ]
    encoder = CountingEncoder(load_encoder(folders["torch"]))
    cached = Engine(encoder, model_hash="h", cache_bytes=1 << 20)
    plain = Engine(encoder.encoder)
    for (vectors, tokens), (expected, count) in zip(ask_all(cached, requests), ask_all(plain, requests), strict=True):
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert tokens == count
    assert encoder.texts == 6  # date, zip file; fox; the query; the task's query; fox under the other truncation
    assert (cached.cache.hits, cached.cache.misses) == (7, 7) and plain.cache.misses == 0
    cached.model_hash = "another"
    ask_all(cached, requests[:1])
    assert encoder.texts == 8
    asyncio.run(cached.check())
    cached._last_forward = -1e9
    asyncio.run(cached.check())
    asyncio.run(cached.check())
    assert encoder.texts == 9  # health asks the model itself
    for engine in (cached, plain):
        engine.close()


def test_the_cache_keeps_to_its_bytes_and_drops_the_oldest() -> None:
    each = 4 * 16 + ENTRY_BYTES
    cache = VectorCache(3 * each)
    vectors = np.arange(80, dtype=np.float32).reshape(5, 16)
    keys = [text_key(str(i)) for i in range(5)]
    for key, vector in zip(keys[:3], vectors, strict=False):
        cache.put(key, vector, 1)
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], vectors[3], 7)
    assert cache.get(keys[1]) is None and len(cache) == 3 and cache.bytes == 3 * each
    found = cache.get(keys[3])
    assert found is not None and found[1] == 7 and found[0].base is None  # the batch is not kept
    np.testing.assert_array_equal(found[0], vectors[3])
    cache.put(keys[4], np.zeros(10_000, np.float32), 1)  # larger than the whole cache
    assert len(cache) == 3
    off = VectorCache(0)
    off.put(keys[0], vectors[0], 1)
    assert len(off) == 0
    assert text_key("b", "a") != text_key("", "a", "b") != text_key("ab")


def test_a_text_beyond_the_models_length_is_cut_or_refused_by_name(folders: dict[str, Path]) -> None:
    tokenizer = TextTokenizer(folders["torch"])
    limit = tokenizer.spec.query_length
    words = "date " * 300
    fits = words[: 5 * (len(tokenizer.encode([words], "query")[0]) // 2)]
    count = tokenizer.count([words], "query")[0]
    assert tokenizer.count([fits], "query") == [len(tokenizer.encode([fits], "query")[0])] and count > limit
    for cache_bytes in (0, 1 << 20):
        engine = Engine(load_encoder(folders["torch"]), cache_bytes=cache_bytes)
        with TestClient(create_app(engine)) as client:
            body = {"texts": [fits, "date", words], "kind": "query"}
            answer = client.post("/embed", json=body).json()
            assert answer["tokens"] == sum(map(len, tokenizer.encode(body["texts"], "query")))
            for _ in range(2):
                refused = client.post("/embed", json={**body, "truncate": "error"})
                message = refused.json()["error"]["message"]
                assert refused.status_code == 422
                assert message.startswith(f"texts[2] has {count} tokens") and f"reads {limit} of a query" in message
            body["texts"].pop()
            same = client.post("/embed", json={**body, "truncate": "error"}).json()
            np.testing.assert_allclose(same["embeddings"], answer["embeddings"][:2], atol=1e-6)
            metrics = client.get("/metrics").text
            assert ("tdro_embed_cache_misses 0.0" in metrics) == (cache_bytes == 0)


def test_shapes_of_vectors(folders: dict[str, Path]) -> None:
    with TestClient(create_app(Engine(load_encoder(folders["torch"])))) as client:

        def embed(**options: Any) -> np.ndarray:
            answer = client.post("/embed", json={"texts": TEXTS, **options}).json()
            if options.get("encoding") == "base64":
                return np.stack([np.frombuffer(base64.b64decode(e), "<f4") for e in answer["embeddings"]])
            return np.array(answer["embeddings"])

        whole = embed()
        expected = Encoder.load(folders["torch"]).encode(TEXTS, "passage")
        np.testing.assert_allclose(whole, expected, atol=1e-6)
        np.testing.assert_array_equal(embed(encoding="base64"), embed(encoding="base64", normalise=False))
        np.testing.assert_allclose(embed(encoding="base64"), expected, atol=1e-6)
        cut = embed(dimensions=5, normalise=False, encoding="base64")
        np.testing.assert_allclose(cut, expected[:, :5], atol=1e-6)
        np.testing.assert_allclose(embed(dimensions=5), cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)


def test_a_model_put_in_the_old_ones_place_is_served_with_its_index(tmp_path: Path) -> None:
    def index_of(folder: Path) -> None:
        encoder = Encoder.load(folder)
        docs = [(f"d{i}", "", text, {}) for i, text in enumerate(TEXTS)]
        vectors = encoder.encode(TEXTS, "passage")
        with versions.new_version(tmp_path / "index") as (name, out):
            _, fields = store.write_documents(out / "documents.lance", docs)
            store.add_vectors(out / "documents.lance", vectors, fields)
            index, facts = faiss_index.build(lambda: iter([vectors]), len(docs), encoder.dim, "Flat")
            faiss_index.save(index, out / "index.faiss")
            made_with = {"name": "served", "hash": model_hash(folder)}
            record = {"version": name, "dim": encoder.dim, "documents": len(docs), "model": made_with, **facts}
            versions.write_manifest(out, record)

    served_folder, other = make_model(tmp_path / "served"), make_model(tmp_path / "other", pooling="mean")
    index_of(served_folder)
    engine = Engine.open(served_folder, tmp_path / "index", dtype="float32", cache_bytes=1 << 20)
    expected = {str(folder): Encoder.load(folder).encode(["date"], "query")[0] for folder in (served_folder, other)}
    old, new = expected.values()
    old_passages = Encoder.load(served_folder).encode(TEXTS, "passage")
    hashes = [model_hash(folder) for folder in (served_folder, other)]
    seen: list[tuple[list[float], str, float]] = []
    stop = threading.Event()
    with TestClient(create_app(engine)) as client:

        def load() -> None:
            while not stop.is_set():
                vector = client.post("/embed", json={"texts": ["date"], "kind": "query"}).json()["embeddings"][0]
                found = client.post("/search", json={"queries": ["date"], "k": 1}).json()
                seen.append((vector, found["index_version"], found["results"][0][0]["score"]))

        def wait_for(done: Any) -> None:
            deadline = time.monotonic() + 30
            while not done() and time.monotonic() < deadline:
                time.sleep(0.05)

        thread = threading.Thread(target=load)
        thread.start()
        for file in other.iterdir():  # one after another: nothing is served half
            shutil.copy2(file, served_folder / file.name)
        with pytest.raises(ConfigError, match="is another"):  # its index is still the old model's
            wait_for(lambda: engine.source is not None and engine.source.changed())
            asyncio.run(engine.reload())
        assert client.get("/info").json()["model"]["hash"] == hashes[0]
        index_of(served_folder)
        wait_for(lambda: engine.model_hash == hashes[1] and seen[-1][1] == "2")
        stop.set()
        thread.join()
        assert client.get("/info").json()["model"]["hash"] == hashes[1]
        written = client.post("/documents", json={"documents": [{"id": "late", "text": "zebra"}]})
        assert written.json() == {"upserted": 1, "seq": 1, "index_version": "2"}
        found = client.post("/search", json={"queries": ["date"], "k": 100}).json()["results"][0]
        assert "late" in [
            hit["id"] for hit in found
        ]  # the new model's index follows what is written, as the old one's did
    np.testing.assert_allclose(seen[0][0], old, atol=1e-6)
    np.testing.assert_allclose(seen[-1][0], new, atol=1e-6)
    assert {version for _, version, _ in seen} == {"1", "2"}
    best = {"1": old_passages @ old, "2": Encoder.load(other).encode(TEXTS, "passage") @ new}
    for _, version, score in seen:  # no query of one model met the index of the other
        assert score == pytest.approx(float(best[version].max()), abs=1e-4)
