"""Build a new index version: write the documents, embed them with Ray Data actors, index the vectors, publish.

    documents -> documents.lance -> (row ranges -> actors: take texts, encode -> vectors) -> FAISS -> manifest

Large indexes of cells are trained once, then filled by actors, each a copy of its own, and put together. Only row ranges,
vectors and filled copies travel through Ray; the actors read from the store, which must therefore lie on storage that
every node sees. Nothing is published before the manifest is written, so a killed build leaves the
current version as it was.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tdro_ray.errors import CheckpointError, DataError
from tdro_ray.index import faiss_index, store, versions
from tdro_ray.index.changes import ChangeLog
from tdro_ray.index.recall import Exact

RANGE_ROWS = 1024  # documents embedded per Ray Data row
ADD_ROWS = (
    131_072  # vectors added per Ray Data row, to a copy of the trained cells; fewer in all are added in one process
)

Progress = Callable[[str, int, int], None]  # phase ("embed", "index"), documents done, documents in all


def build_index(
    documents: Iterable[store.Document],
    model_folder: str | Path,
    out_folder: str | Path,
    factory: str = "Flat",
    batch_tokens: int = 16384,
    num_actors: int = 1,
    cpus_per_actor: float = 1,
    use_gpu: bool = False,
    progress: Progress | None = None,
    *,
    target_recall: float = 0.98,
    min_recall: float = 0.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Build a version from ``(id, title, text, metadata)`` documents, make it current, return its manifest.

    `factory` is a FAISS factory string or "auto" (chosen by size). The search is widened until `target_recall`;
    below `min_recall` the build fails. `device` "cuda" builds the FAISS index on a GPU.
    Raises DataError (documents, recall), ConfigError (factory), CheckpointError (model), ResourceError (another
    build into the folder runs).
    """
    model_folder, started = Path(model_folder).resolve(), time.time()
    model = {"name": model_folder.name, "hash": versions.model_hash(model_folder)}
    with versions.new_version(Path(out_folder).resolve()) as (name, folder):
        merged_seq = ChangeLog(out_folder).last_seq()  # the corpus is the truth about everything written before
        count, fields = store.write_documents(folder / "documents.lance", documents)
        rules = {"factory": factory, "target_recall": target_recall, "min_recall": min_recall}
        factory = faiss_index.preset(count) if factory == "auto" else factory
        embed = _embed(folder, model_folder, count, batch_tokens, num_actors, cpus_per_actor, use_gpu)
        with contextlib.closing(embed):  # an error stops the actors too
            vectors = _gather(embed, folder / "vectors.npy", count, factory, progress)
        record = {"version": name, "model": model, "merged_seq": merged_seq}
        add = partial(_add_shards, folder, count, num_actors, cpus_per_actor, progress)
        spread = device == "cpu" and count > ADD_ROWS
        complete(folder, record, vectors, fields, rules, started, progress, device, add if spread else None)
    return versions.manifest(Path(out_folder) / "versions" / name)


def complete(
    folder: Path,
    record: dict[str, Any],
    vectors: np.ndarray,
    fields: dict[str, str],
    rules: dict[str, Any],
    started: float,
    progress: Progress | None = None,
    device: str = "cpu",
    add: faiss_index.Add | None = None,
) -> None:
    """Make a version of a folder that holds documents.lance: add the vectors, the FAISS index, and last the manifest.

    `vectors` is the memory map vectors.npy in the same folder, which is removed; `rules` are the factory asked for and
    the recalls, which merges keep to; `record` goes into the manifest. Raises as `faiss_index.build`.
    """
    count, dim = vectors.shape
    factory = faiss_index.preset(count) if rules["factory"] == "auto" else rules["factory"]
    store.add_vectors(folder / "documents.lance", vectors, fields)
    documents = store.DocumentStore(folder / "documents.lance")
    index, facts = faiss_index.build(
        documents.vector_blocks,
        count,
        dim,
        factory,
        target_recall=rules["target_recall"],
        min_recall=rules["min_recall"],
        progress=(lambda done, total: progress("index", done, total)) if progress else None,
        device=device,
        add=add,
    )
    faiss_index.save(index, folder / "index.faiss")
    (folder / "vectors.npy").unlink()
    manifest = {
        **record,
        "dim": dim,
        "documents": count,
        "metric": "inner_product",
        "unit_vectors": True,
        "fields": {"id": "string", **fields},
        "rules": rules,
        **facts,
        "lance_version": documents.dataset.version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
    }
    versions.write_manifest(folder, manifest)


class _Embedder:
    """A Ray Data actor: row ranges in, (row, vector) out."""

    def __init__(self, documents: str, model_folder: str, device: str, batch_tokens: int) -> None:
        import lance

        from tdro_ray.model.encoder import Encoder

        self.documents = lance.dataset(documents)
        self.encoder, self.batch_tokens = Encoder.load(model_folder, device), batch_tokens

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for start, stop in zip(batch["start"].to_pylist(), batch["stop"].to_pylist(), strict=True):
            records = self.documents.take(list(range(start, stop)), columns=["title", "text", "metadata"]).to_pylist()
            vectors = embed_records(self.encoder, records, self.batch_tokens)
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            yield pa.table({"row": pa.array(range(start, stop), pa.int64()), "vector": column})


def embed_records(encoder: Any, records: list[dict[str, Any]], batch_tokens: int) -> np.ndarray:
    """Return the passage vectors of store records, float32 (n, D); a symmetric task's prompt goes before its passages."""
    tasks = [str(json.loads(record["metadata"]).get("task") or "") for record in records]
    texts = [store.full_text(record) for record in records]
    vectors = np.empty((len(records), encoder.dim), np.float32)
    for task in sorted(set(tasks)):
        at = [i for i, t in enumerate(tasks) if t == task]
        vectors[at] = encoder.encode([texts[i] for i in at], "passage", task, batch_tokens)
    return vectors


def _embed(
    folder: Path,
    model_folder: Path,
    count: int,
    batch_tokens: int,
    num_actors: int,
    cpus_per_actor: float,
    use_gpu: bool,
) -> Iterator[pa.Table]:
    """Yield tables of row numbers and vectors, in any order."""
    import ray

    ranges = [pa.table({"start": [at], "stop": [min(at + RANGE_ROWS, count)]}) for at in range(0, count, RANGE_ROWS)]
    dataset = ray.data.from_arrow(ranges).map_batches(
        _Embedder,
        fn_constructor_kwargs={
            "documents": str(folder / "documents.lance"),
            "model_folder": str(model_folder),
            "device": "cuda" if use_gpu else "cpu",
            "batch_tokens": batch_tokens,
        },
        batch_format="pyarrow",
        batch_size=1,
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(ranges))),
        num_cpus=cpus_per_actor,
        num_gpus=1 if use_gpu else 0,
    )
    dataset.set_name("tdro-index-embed")
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayTaskError as err:  # the user's mistake, without the actor's traceback
        cause = err.cause if isinstance(err.cause, Exception) else err
        raise CheckpointError(f"The documents could not be embedded with the model {model_folder}: {cause}") from err


class _Adder:
    """A Ray Data actor: row ranges in, the trained index filled with their vectors out, and the queries' best among them."""

    def __init__(self, documents: str, trained: Any, queries: Any) -> None:
        import ray

        self.store = store.DocumentStore(documents)
        self.trained, self.queries = ray.get(trained), ray.get(queries)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        import faiss

        for first, last in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            shard, truth = faiss.deserialize_index(self.trained), Exact(self.queries)
            for start in range(first, last, store.BATCH_ROWS):
                stop = min(start + store.BATCH_ROWS, last)
                block = self.store.vector_range(start, stop)
                shard.add_with_ids(block, np.arange(start, stop))
                truth.add(block, start)
            columns = {"index": faiss.serialize_index(shard), "scores": truth.scores, "rows": truth.rows}
            yield pa.table({key: pa.array([value.tobytes()], pa.large_binary()) for key, value in columns.items()})


def _add_shards(
    folder: Path,
    count: int,
    num_actors: int,
    cpus_per_actor: float,
    progress: Progress | None,
    index: Any,
    truth: Exact,
) -> int:
    """Fill a trained `shardable` index from documents.lance by Ray Data actors, and `truth`; return the vectors added."""
    import faiss
    import ray

    from tdro_ray.data.ray_data import by_actors

    ranges = [{"start": at, "stop": min(at + ADD_ROWS, count)} for at in range(0, count, ADD_ROWS)]
    made_from = {
        "documents": str(folder / "documents.lance"),
        "trained": ray.put(faiss.serialize_index(index)),
        "queries": ray.put(truth.queries),
    }
    actors = min(num_actors, len(ranges))
    blocks = ray.data.from_items(ranges, override_num_blocks=len(ranges))
    for table in by_actors(blocks, _Adder, made_from, actors, cpus_per_actor, False, "tdro-index-add"):
        for row in table.to_pylist():
            index.merge_from(faiss.deserialize_index(np.frombuffer(row["index"], np.uint8)), 0)
            scores = np.frombuffer(row["scores"], np.float32).reshape(len(truth.queries), -1)
            truth.merge(scores, np.frombuffer(row["rows"], np.int64).reshape(scores.shape))
        if progress:
            progress("index", index.ntotal, count)
    return int(index.ntotal)


def _gather(tables: Iterator[pa.Table], path: Path, count: int, factory: str, progress: Progress | None) -> np.ndarray:
    """Return all vectors in row order as a memory map at `path`. Raises DataError for a vector that is not of unit length."""
    vectors: np.ndarray | None = None
    done = 0
    for table in tables:
        rows, block = table["row"].to_numpy(), store.matrix(table["vector"])
        lengths = np.linalg.norm(block, axis=1)
        if not np.allclose(lengths, 1, atol=1e-3):
            bad = int(np.argmax(~np.isclose(lengths, 1, atol=1e-3)))
            raise DataError(
                f"The model gave document {rows[bad]} a vector of length {lengths[bad]}; it must be 1. Check the model."
            )
        if vectors is None:
            faiss_index.make(block.shape[1], factory, count)  # a bad factory fails now, not after hours of embedding
            vectors = np.lib.format.open_memmap(path, "w+", np.float32, (count, block.shape[1]))
        vectors[rows] = block
        done += len(rows)
        if progress:
            progress("embed", done, count)
    if vectors is None or done != count:
        raise DataError(f"{done} of {count} documents were embedded.")
    return vectors
