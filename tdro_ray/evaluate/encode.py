"""Vectors of many texts by an actor pool (Ray Data), and the evaluation of one model on all tests.

T texts, D dimensions.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tdro_ray.data.ray_data import by_actors, quiet
from tdro_ray.errors import DataError
from tdro_ray.evaluate.benchmark import ExactSearch, measured
from tdro_ray.types import Kind, Passage, RetrievalTest

BLOCK_TEXTS = 256  # texts per block: small enough that two actors share a small test
READERS = 2  # corpora that are read at once
SMALL = 20_000  # texts that this process reads itself: starting readers would take longer


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
    # Blocks hold one task and kind each, so that an actor encodes with one prompt.
    records: list[dict[str, Any]] = []
    for start, stop in _runs(items):
        for at in range(start, stop, BLOCK_TEXTS):
            part = items[at : min(at + BLOCK_TEXTS, stop)]
            records.append({"at": at, "kind": part[0][1], "task": part[0][2], "texts": [text for text, _, _ in part]})
    out_TD: np.ndarray | None = None
    done = 0
    for batch in _Pool(model, num_actors, cpus, use_gpu, batch_tokens, name).embed(records):
        at, width = batch["at"][0].as_py(), batch["dim"][0].as_py()
        vector_XD = np.frombuffer(batch["vectors"][0].as_buffer(), np.float32).reshape(-1, width)
        if out_TD is None:
            out_TD = np.empty((len(items), width), np.float32)
        out_TD[at : at + len(vector_XD)] = vector_XD
        done += len(vector_XD)
        progress(done, len(items))
    assert out_TD is not None and done == len(items)
    return out_TD


@dataclass(frozen=True)
class _Pool:
    """The actors that embed: how many (0: this process), and what each is made from."""

    model: Path
    num_actors: int
    cpus: float
    use_gpu: bool
    batch_tokens: int
    name: str

    def embed(self, records: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
        """Yield the records with vectors in place of their texts, in order."""
        if self.num_actors == 0:
            embedder = _Embedder(**self._made_from())
            for record in records:
                yield pa.table(embedder({key: [value] for key, value in record.items()}))
            return
        quiet()
        listed = list(records)
        yield from self.spread(ray.data.from_items(listed, override_num_blocks=len(listed)))

    def spread(self, blocks: ray.data.Dataset) -> Iterator[pa.Table]:
        """As `embed`, of a dataset of records."""
        yield from by_actors(blocks, _Embedder, self._made_from(), self.num_actors, self.cpus, self.use_gpu, self.name)

    def _made_from(self) -> dict[str, Any]:
        return {"model": str(self.model), "batch_tokens": self.batch_tokens, "use_gpu": self.use_gpu}


# Evaluation


@dataclass(frozen=True)
class Stretch:
    """Texts of one test and kind: all queries, or the corpus, which is read where it is needed."""

    number: int
    task: str
    kind: Kind
    texts: Mapping[str, str] | Collection[Passage]

    def blocks(self) -> Iterator[dict[str, Any]]:
        """Yield records of BLOCK_TEXTS texts with their ids, in order; a bad corpus ends in one that says so."""
        texts = self.texts
        pairs = texts.items() if isinstance(texts, Mapping) else ((p.docid, p.full_text) for p in texts)
        head = {"stretch": self.number, "kind": self.kind, "task": self.task}
        try:
            rest = iter(pairs)
            while block := list(islice(rest, BLOCK_TEXTS)):
                yield {**head, "ids": [i for i, _ in block], "texts": [t for _, t in block], "error": ""}
        except DataError as err:  # travels as data: an exception on a worker would come with Ray's own stack traces
            yield {**head, "ids": [], "texts": [], "error": str(err)}


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
    """Return ({task: metrics}, {task: {query id: nDCG}}, {task: run}) of a model on every test.

    This process holds ids, the vectors of one block of a corpus, and the best hits so far: no corpus whole.
    """
    stretches = []
    for task, test in tests.items():
        stretches.append(Stretch(len(stretches), task, "query", test.queries))
        stretches.append(Stretch(len(stretches), task, "passage", test.corpus))
    total, done = sum(len(test.queries) + len(test.corpus) for test in tests.values()), 0
    parts: dict[str, list[tuple[np.ndarray, Any]]] = {task: [] for task in tests}  # of the queries
    searches: dict[str, ExactSearch] = {}
    metrics, queries, runs = {}, {}, {}

    def finish(task: str) -> None:
        runs[task] = _search_of(searches, parts, task, max(ndcg_at, recall_at)).run()
        metrics[task], values = measured(runs[task], tests[task].qrels, ndcg_at, recall_at)
        queries[task] = values[f"ndcg@{ndcg_at}"]
        del searches[task]

    current = ""
    for batch in _streamed(stretches, _Pool(model, num_actors, cpus, use_gpu, batch_tokens, name)):
        if error := batch["error"][0].as_py():
            raise DataError(error)
        stretch = stretches[batch["stretch"][0].as_py()]
        if current and stretch.task != current:
            finish(current)
        current, ids = stretch.task, batch["ids"].combine_chunks().flatten()
        vector_XD = np.frombuffer(batch["vectors"][0].as_buffer(), np.float32).reshape(len(ids), -1)
        if stretch.kind == "query":
            parts[current].append((vector_XD, ids))
        else:
            _search_of(searches, parts, current, max(ndcg_at, recall_at)).add(vector_XD, ids)
        done += len(ids)
        progress(done, total)
    if current:
        finish(current)
    return metrics, queries, runs


def _search_of(
    searches: dict[str, ExactSearch], parts: dict[str, list[tuple[np.ndarray, Any]]], task: str, k: int
) -> ExactSearch:
    """Return the search of a test, begun when its queries are complete."""
    if task not in searches:
        vectors, ids = zip(*parts.pop(task))
        searches[task] = ExactSearch(np.concatenate(vectors), pa.concat_arrays(ids).to_pylist(), k)
    return searches[task]


def _streamed(stretches: list[Stretch], pool: _Pool) -> Iterator[pa.Table]:
    """Yield the vectors of all stretches, in order; large corpora are read by tasks of the cluster, a part at a time."""
    if pool.num_actors == 0 or sum(len(stretch.texts) for stretch in stretches) <= SMALL:
        yield from pool.embed(block for stretch in stretches for block in stretch.blocks())
        return
    quiet().target_max_block_size = 1 << 20  # blocks leave a reader before its corpus is read
    items = [{"stretch": pickle.dumps(stretch)} for stretch in stretches]
    # Reading takes no CPU of its own: the actors may have them all.
    yield from pool.spread(
        ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read, batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=READERS)
        )
    )


def _read(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, list[Any]]]:
    for blob in batch["stretch"]:
        stretch: Stretch = pickle.loads(blob)
        for block in stretch.blocks():
            yield {key: [value] for key, value in block.items()}


class _Embedder:
    """One actor: an encoder."""

    def __init__(self, model: str, batch_tokens: int, use_gpu: bool) -> None:
        import torch

        from tdro_ray.model.encoder import Encoder

        torch.set_flush_denormal(True)
        self.encoder = Encoder.load(model, "cuda" if use_gpu else "cpu")
        self.batch_tokens = batch_tokens

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the batch with vectors in place of its texts."""
        vectors = [
            self.encoder.encode([str(text) for text in texts], kind, task, self.batch_tokens)
            if len(texts)
            else np.zeros((0, self.encoder.dim), np.float32)
            for texts, kind, task in zip(batch["texts"], batch["kind"], batch["task"], strict=True)
        ]
        kept = {key: [list(v) for v in values] if key == "ids" else list(values) for key, values in batch.items()}
        del kept["texts"]
        return {**kept, "dim": [v.shape[1] for v in vectors], "vectors": [v.tobytes() for v in vectors]}


def _runs(items: Sequence[tuple[str, Kind, str]]) -> list[tuple[int, int]]:
    """Return (start, stop) of the stretches of items of one kind and task."""
    out, start = [], 0
    for at in range(1, len(items) + 1):
        if at == len(items) or items[at][1:] != items[start][1:]:
            out.append((start, at))
            start = at
    return out
