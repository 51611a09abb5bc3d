"""Vectors of many texts by an actor pool (Ray Data), and the evaluation of one model on all tests.

T texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tdro_ray.data.ray_data import by_actors, quiet
from tdro_ray.evaluate.benchmark import evaluate_task
from tdro_ray.types import Kind, RetrievalTest

BLOCK_TEXTS = 256  # texts per block: small enough that two actors share a small test


def encode_texts(
    model: Path,
    items: Sequence[tuple[str, Kind, str]],
    num_actors: int,
    cpus: float,
    use_gpu: bool,
    batch_tokens: int,
    name: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Return float32 unit vectors (T, D) of `(text, kind, task)` items, in their order."""
    quiet()
    # Blocks hold one task and kind each, so that an actor encodes with one prompt.
    records: list[dict[str, Any]] = []
    for start, stop in _runs(items):
        for at in range(start, stop, BLOCK_TEXTS):
            part = items[at : min(at + BLOCK_TEXTS, stop)]
            records.append({"at": at, "kind": part[0][1], "task": part[0][2], "texts": [text for text, _, _ in part]})
    out_TD: np.ndarray | None = None
    done = 0
    for batch in _embedded(records, model, num_actors, cpus, use_gpu, batch_tokens, name):
        at, width = batch["at"][0].as_py(), batch["dim"][0].as_py()
        vector_XD = np.frombuffer(batch["vectors"][0].as_buffer(), np.float32).reshape(-1, width)
        if out_TD is None:
            out_TD = np.empty((len(items), width), np.float32)
        out_TD[at : at + len(vector_XD)] = vector_XD
        done += len(vector_XD)
        progress(done, len(items))
    assert out_TD is not None and done == len(items)
    return out_TD


def _embedded(
    records: list[dict[str, Any]],
    model: Path,
    num_actors: int,
    cpus: float,
    use_gpu: bool,
    batch_tokens: int,
    name: str,
) -> Iterator[pa.Table]:
    """Yield the records' vectors: by an actor pool, or in this process without actors."""
    made_from = {"model": str(model), "batch_tokens": batch_tokens, "use_gpu": use_gpu}
    if num_actors == 0:
        embedder = _Embedder(**made_from)
        for record in records:
            yield pa.table(embedder({key: [value] for key, value in record.items()}))
        return
    blocks = ray.data.from_items(records, override_num_blocks=len(records))
    yield from by_actors(blocks, _Embedder, made_from, num_actors, cpus, use_gpu, name)


def evaluate_model(
    model: Path,
    tests: Mapping[str, RetrievalTest],
    num_actors: int,
    cpus: float,
    use_gpu: bool,
    batch_tokens: int,
    ndcg_at: int,
    recall_at: int,
    name: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]], dict[str, Any]]:
    """Return ({task: metrics}, {task: {query id: nDCG}}, {task: run}) of a model on every test."""
    items: list[tuple[str, Kind, str]] = []
    for task, test in tests.items():
        items += [(text, "query", task) for text in test.queries.values()]
        items += [(passage.full_text, "passage", task) for passage in test.corpus]
    vector_TD = encode_texts(model, items, num_actors, cpus, use_gpu, batch_tokens, name, progress)
    metrics, queries, runs, at = {}, {}, {}, 0
    for task, test in tests.items():
        middle, end = at + len(test.queries), at + len(test.queries) + len(test.corpus)
        metrics[task], values, runs[task] = evaluate_task(
            vector_TD[at:middle],
            list(test.queries),
            vector_TD[middle:end],
            [p.docid for p in test.corpus],
            test.qrels,
            ndcg_at,
            recall_at,
        )
        queries[task] = values[f"ndcg@{ndcg_at}"]
        at = end
    return metrics, queries, runs


class _Embedder:
    """One actor: an encoder."""

    def __init__(self, model: str, batch_tokens: int, use_gpu: bool) -> None:
        import torch

        from tdro_ray.model.encoder import Encoder

        torch.set_flush_denormal(True)
        self.encoder = Encoder.load(model, "cuda" if use_gpu else "cpu")
        self.batch_tokens = batch_tokens

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        vectors = [
            self.encoder.encode(list(texts), kind, task, self.batch_tokens)
            for texts, kind, task in zip(batch["texts"], batch["kind"], batch["task"], strict=True)
        ]
        return {
            "at": list(batch["at"]),
            "dim": [v.shape[1] for v in vectors],
            "vectors": [v.tobytes() for v in vectors],
        }


def _runs(items: Sequence[tuple[str, Kind, str]]) -> list[tuple[int, int]]:
    """Return (start, stop) of the stretches of items of one kind and task."""
    out, start = [], 0
    for at in range(1, len(items) + 1):
        if at == len(items) or items[at][1:] != items[start][1:]:
            out.append((start, at))
            start = at
    return out
