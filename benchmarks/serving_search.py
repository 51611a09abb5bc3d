"""The search half of `serving.py`: an index of N vectors written directly, searches of it, and its replacement under load."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import Load, alone, load, server

from tdro_ray.index import faiss_index, store, versions
from tdro_ray.model.encoder import Encoder

K = 10
NOISE = 0.5  # 2-norm of what is added to a mixture of two texts' vectors
BLOCK = 50_000


def make_vectors(seeds_ND: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return unit vectors (count, D): mixtures of two real ones, and noise that varies along directions as they do."""
    rng = np.random.default_rng(seed)
    mean_D = seeds_ND.mean(0)
    _, scale_D, axes_DD = np.linalg.svd(seeds_ND - mean_D, full_matrices=False)
    scale_D = scale_D / np.linalg.norm(scale_D) * NOISE
    out = np.empty((count, seeds_ND.shape[1]), np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        first, second = rng.integers(len(seeds_ND), size=(2, size))
        share = rng.uniform(0.5, 1.0, (size, 1))
        block = share * seeds_ND[first] + (1 - share) * seeds_ND[second]
        block += (rng.standard_normal((size, len(scale_D))) * scale_D) @ axes_DD
        out[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return out


def make_index(out: Path, model: Path, texts: list[str], count: int) -> dict[str, Any]:
    """Write version 1 (Flat) of an index of `count` vectors, and return its folder, the vectors and queries."""
    seeds = Encoder.load(model, dtype="bfloat16").encode(texts, "passage")
    vectors, queries = make_vectors(seeds, count, 0), make_vectors(seeds, 2000, 1)
    documents = ((f"d{i}", "", texts[i % len(texts)][:300], {"year": 1900 + i % 120}) for i in range(count))
    with versions.new_version(out) as (name, folder):
        _, fields = store.write_documents(folder / "documents.lance", documents)
        store.add_vectors(folder / "documents.lance", vectors, fields)
        index, facts = faiss_index.build(lambda: _blocks(vectors), count, vectors.shape[1], "Flat")
        faiss_index.save(index, folder / "index.faiss")
        made_with = {"name": "minilm", "hash": versions.model_hash(model)}
        record = {"version": name, "dim": vectors.shape[1], "documents": count, "model": made_with, **facts}
        versions.write_manifest(folder, record)
    return {"folder": out, "vectors": vectors, "queries": queries}


def _blocks(vectors: np.ndarray) -> Any:
    return (vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK))


def add_version(made: dict[str, Any], factory: str | None) -> float:
    """Publish another version with the same documents: a copy, or under another factory. Returns the seconds of building."""
    old = versions.current(made["folder"])
    with versions.new_version(made["folder"]) as (name, folder):
        for item in ("documents.lance", "documents.arrow", "index.faiss"):
            (shutil.copytree if (old / item).is_dir() else shutil.copy2)(old / item, folder / item)
        record = versions.manifest(old) | {"version": name}
        began = time.perf_counter()
        if factory:
            vectors = made["vectors"]
            index, facts = faiss_index.build(lambda: _blocks(vectors), len(vectors), vectors.shape[1], factory)
            faiss_index.save(index, folder / "index.faiss")
            record |= facts
        took = time.perf_counter() - began
        versions.write_manifest(folder, record)
    return took


def bodies(queries: np.ndarray, size: int) -> Any:
    """Return a function from number to the JSON body of a search of `size` vectors."""
    made = [
        json.dumps({"vectors": queries[s : s + size].round(6).tolist(), "k": K}).encode()
        for s in range(0, min(len(queries), 64 * size) - size + 1, size)
    ]
    return lambda number: made[number % len(made)]


def faiss_alone(index: Any, queries: np.ndarray, seconds: float) -> list[float]:
    """Return the milliseconds of FAISS for one vector, again and again."""
    took, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(took) < 3:
        at = time.perf_counter()
        faiss_index.search(index, queries[len(took) % len(queries)][None], K)
        took.append((time.perf_counter() - at) * 1000)
    return took


def compare_search(made: dict[str, Any], model: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Flat and HNSW: FAISS alone, one client, sixteen clients with 1 and 32 vectors, ours and the bare process in turn."""
    found: dict[str, Any] = {}
    flat = faiss_index.load(versions.current(made["folder"]) / "index.faiss")
    _, truth = faiss_index.search(flat, made["queries"][:200], K)
    for factory in ("Flat", "HNSW32"):
        if factory != "Flat":
            found[f"{factory} build s"] = round(add_version(made, factory), 1)
        version = versions.current(made["folder"])
        index = faiss_index.load(version / "index.faiss")
        _, rows = faiss_index.search(index, made["queries"][:200], K)
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(rows, truth, strict=True)])
        found[f"{factory} recall@10 against Flat"] = round(float(recall), 4)
        with (
            server(kind="ray", model=str(model), index=str(made["folder"])) as ours,
            server(kind="uvicorn", model=str(model), index=str(made["folder"])) as plain,
            server(kind="bare", version=str(version)) as bare,
        ):
            urls = {"ours (Ray, HAProxy)": ours, "ours (one process)": plain, "bare FastAPI + FAISS": bare}
            _rounds(found, factory, index, urls, made["queries"], rounds, seconds)
        ours_name, bare_name = "ours (Ray, HAProxy)", "bare FastAPI + FAISS"
        for size in (1, 32):
            ours_rate, bare_rate = (
                found.get(f"{factory} 16x{size} vectors/s, {name}") for name in (ours_name, bare_name)
            )
            if ours_rate is None:
                continue
            ratio = np.median(ours_rate) / np.median(bare_rate)
            found[f"{factory} 16x{size}, ours / bare"] = round(float(ratio), 3)
        over = np.median(found[f"{factory} 1x1 p50 ms, {ours_name}"]) - np.median(
            found[f"{factory} FAISS alone, p50 ms"]
        )
        found[f"{factory} 1x1, ms over FAISS at p50"] = round(float(over), 2)
    speed = np.median(found["Flat FAISS alone, p50 ms"]) / np.median(found["HNSW32 FAISS alone, p50 ms"])
    found["HNSW32 over Flat, FAISS alone"] = round(float(speed), 1)
    return found


def _rounds(
    found: dict[str, Any],
    factory: str,
    index: Any,
    urls: dict[str, str],
    queries: np.ndarray,
    rounds: int,
    seconds: float,
) -> None:
    # 512 vectors at a time against a million, one by one, take longer than a server lets a request wait.
    shapes = [(c, s) for c, s in ((1, 1), (16, 1), (16, 32)) if factory != "Flat" or s == 1 or index.ntotal <= 100_000]
    for number in range(rounds + 1):  # the first warms up
        keep = number > 0
        with alone():
            took = float(np.median(faiss_alone(index, queries, seconds / 2)))
        if keep:
            found.setdefault(f"{factory} FAISS alone, p50 ms", []).append(took)
        for name, url in urls.items():
            with alone(url):
                for clients, size in shapes:
                    load(url, "/search", bodies(queries, size), clients, min(1.0, seconds / 4))
                    done = load(url, "/search", bodies(queries, size), clients, seconds if keep else 0.5)
                    assert not done.failed, (name, done.last[:300])
                    if keep and clients == 1:
                        found.setdefault(f"{factory} 1x1 p50 ms, {name}", []).append(done.quantile(0.5))
                    elif keep:
                        rate = len(done.took) * size / done.seconds
                        found.setdefault(f"{factory} {clients}x{size} vectors/s, {name}", []).append(rate)


def compare_swap(made: dict[str, Any], model: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """p99 of searches by four clients while a new version takes over, and before."""
    found: dict[str, Any] = {"p99 steady, ms": [], "p99 of the swap, ms": [], "failed": 0}
    if versions.manifest(versions.current(made["folder"]))["factory"] == "Flat":
        add_version(made, "HNSW32")  # a search that takes milliseconds shows a stall; a scan of all vectors hides it
    with server(kind="ray", model=str(model), index=str(made["folder"])) as url:
        load(url, "/search", bodies(made["queries"], 1), 4, min(2.0, seconds))
        for _ in range(rounds):
            steady = load(url, "/search", bodies(made["queries"], 1), 4, seconds)
            swap = _swapped(url, made)
            found["p99 steady, ms"].append(steady.quantile(0.99))
            found["p99 of the swap, ms"].append(swap.quantile(0.99))
            found["failed"] += steady.failed + swap.failed
    found["p99 swap / steady"] = round(
        float(np.median(found["p99 of the swap, ms"]) / np.median(found["p99 steady, ms"])), 2
    )
    return found


def _swapped(url: str, made: dict[str, Any]) -> Load:
    """Load from just before a version is published until half a second after it answers."""
    add_version(made, None)  # written first: the disk is not what is measured
    new = versions.current(made["folder"]).name
    versions.select(made["folder"], str(int(new) - 1))
    time.sleep(3.0)  # a server that saw the new one already is back
    versions.select(made["folder"], new)
    mark, served = f'"index_version":"{new}"'.encode(), []

    def stop(so_far: Load) -> bool:
        if not served and mark in so_far.last:
            served.append(time.perf_counter())
        return bool(served) and time.perf_counter() > served[0] + 0.5

    return load(url, "/search", bodies(made["queries"], 1), 4, 120.0, stop)
