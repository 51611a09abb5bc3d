"""Hard-negative mining: one Ray Data job per task, results as a new column version of the task's rows.

The index of a task is built once, in a Ray task, while the task before it is being mined; the workers share it
through the object store. What makes a negative is decided in `negatives.py`, how BM25 searches in `bm25.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tdro_ray.config import MineSettings, Recipe, mining_seed, mining_settings
from tdro_ray.data.bm25 import BM25, guess_language
from tdro_ray.data.collection import Collection, TaskManifest
from tdro_ray.data.dedup import KEY_BYTES, text_key
from tdro_ray.data.dense import dense_hits, dense_report
from tdro_ray.data.negatives import Chosen, PassageClasses, choose, shared_positives
from tdro_ray.data.publish import store_lock, write_manifest
from tdro_ray.data.ray_data import quiet
from tdro_ray.errors import DataError
from tdro_ray.types import Kind

MINER = 1  # raised when mining changes, so that negatives mined before are mined again
RANGE_ROWS = 1000  # rows per mining task
READ_ROWS = 4096  # rows or passages read at a time
Encode = Callable[[Sequence[tuple[str, Kind, str]]], np.ndarray]
_NEGATIVES = pa.field("negatives", pa.list_(pa.int64()))


@dataclass(frozen=True)
class TaskIndex:
    """What mining a row needs to know of its task; made once, shared by all workers."""

    bm25: BM25 | None  # None: an encoder searches
    classes: PassageClasses
    shared: dict[int, list[int]]  # row -> positives of all rows with the same query


def mine(
    recipe: Recipe,
    store: Path,
    names: Sequence[str],
    progress: Callable[[str], None] = lambda line: None,
    encode: Encode | None = None,
) -> dict[str, dict[str, Any]]:
    """Give every row of the tasks `names` its `negatives` column; return what each manifest says of it, by name.

    Under `mine.method: encoder` the vectors come from `encode`, which takes (text, kind, task) items. A task whose rows and settings are unchanged is left alone. Raises DataError for a task that is not in the store.
    """
    results: dict[str, dict[str, Any]] = {}
    with store_lock(store):
        manifests = {name: _manifest(store, name) for name in names}
        keys = {name: _mine_key(recipe, manifest) for name, manifest in manifests.items()}
        todo = [name for name in names if manifests[name].negatives.get("key") != keys[name]]
        for name in names:
            if name not in todo:
                results[name] = manifests[name].negatives
                progress(f"{name}: negatives up to date")
        build = ray.remote(num_cpus=1)(_build_index)
        dense = encode is not None
        index = build.remote(store / todo[0], manifests[todo[0]].info.language, dense) if todo else None
        for name, following in pairwise([*todo, None]):
            assert name is not None
            next_index = (
                build.remote(store / following, manifests[following].info.language, dense) if following else None
            )
            tables, report = (
                _mine_dense(recipe, store / name, ray.get(index), encode)
                if encode
                else (_mine_bm25(recipe, store / name, index), {})
            )
            negatives = _commit(recipe, store / name, tables, keys[name]) | report
            write_manifest(store / name, replace(manifests[name], negatives=negatives))
            results[name] = negatives
            progress(
                f"{name}: {negatives['mean_given']:.2f} given, {negatives['mean_mined']:.2f} mined, "
                f"{negatives['random_filled'] / manifests[name].rows:.2f} random negatives a row"
            )
            index = next_index
    return {name: results[name] for name in names}


def _manifest(store: Path, name: str) -> TaskManifest:
    try:
        return Collection(store / name).manifest
    except FileNotFoundError as err:
        raise DataError(f"Task {name!r} is not in the store {store}. Run `tdro ingest` first.") from err


def _mine_key(recipe: Recipe, manifest: TaskManifest) -> str:
    settings = mining_settings(recipe.mine)
    parts = [MINER, manifest.hash, manifest.info.language, mining_seed(recipe), settings]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# The index


def _build_index(folder: Path, language: str, dense: bool = False) -> TaskIndex:
    collection = Collection(folder)
    language = language or guess_language(next(_passage_texts(collection), []))
    bm25 = None if dense else BM25(_passage_texts(collection), language)
    classes = PassageClasses.of(_passage_texts(collection))
    query_keys: list[bytes] = []
    positives: list[list[int]] = []
    for batch in collection.rows.to_batches(columns=["query", "positives"], batch_size=READ_ROWS):
        query_keys += [text_key(query) for query in batch["query"].to_pylist()]
        positives += batch["positives"].to_pylist()
    return TaskIndex(bm25, classes, shared_positives(np.asarray(query_keys, f"S{KEY_BYTES}"), positives))


def _passage_texts(collection: Collection) -> Iterator[list[str]]:
    for start in range(0, collection.manifest.passages, READ_ROWS):
        yield collection.take_texts(range(start, min(start + READ_ROWS, collection.manifest.passages)))


# The job


def _mine_bm25(recipe: Recipe, folder: Path, index: Any) -> list[pa.Table]:
    """Return the task's negatives in row order."""
    quiet()
    name, rows = folder.name, len(Collection(folder))
    starts = list(range(0, rows, RANGE_ROWS))
    job = ray.data.from_items([{"start": start} for start in starts], override_num_blocks=len(starts)).map_batches(
        _mine_range,
        fn_kwargs={"folder": folder, "index": [index], "settings": recipe.mine, "seed": mining_seed(recipe)},
        batch_size=None,
        num_cpus=1,  # pure computing: a smaller share would only start more processes than there are cores
    )
    job.set_name(f"mine:{name}")
    return list(job.iter_batches(batch_size=None, batch_format="pyarrow"))


def _mine_dense(recipe: Recipe, folder: Path, task: TaskIndex, encode: Encode) -> tuple[list[pa.Table], dict[str, Any]]:
    """Return the task's negatives in row order, and the report. All vectors of the task are in memory."""
    collection, settings = Collection(folder), recipe.mine
    rows = collection.take_rows(range(len(collection)), ["id", "query", "positives", "given_negatives"])
    records = rows.to_pylist()
    items: list[tuple[str, Kind, str]] = [(record["query"], "query", folder.name) for record in records]
    items += [(text, "passage", folder.name) for texts in _passage_texts(collection) for text in texts]
    vectors = encode(items)
    hits = dense_hits(
        vectors[: len(records)],
        vectors[len(records) :],
        [record["positives"] for record in records],
        settings,
        recipe.scale.use_gpu,
    )
    chosen = _choose_rows(range(len(records)), records, hits.passages, task, folder.name, settings, mining_seed(recipe))
    return [_table(chosen)], dense_report(hits, [c.negatives for c in chosen], collection, records)


def _commit(recipe: Recipe, folder: Path, tables: list[pa.Table], key: str) -> dict[str, Any]:
    """Commit the column, and return the manifest's entry."""
    rows = len(Collection(folder))
    table = pa.concat_tables(tables)
    column = table["negatives"].combine_chunks()
    hasher = blake2b(digest_size=16)
    hasher.update(column.value_lengths().to_numpy().tobytes())
    hasher.update(column.flatten().to_numpy().tobytes())
    total = {what: int(np.sum(table[what].to_numpy())) for what in ("given", "mined", "random")}
    return {
        "key": key,
        "method": recipe.mine.method,
        "num": recipe.mine.num_negatives,
        "hash": hasher.hexdigest(),
        "mean_given": total["given"] / rows,
        "mean_mined": total["mined"] / rows,
        "random_filled": total["random"],
        "version": _commit_column(folder, pa.table([column], schema=pa.schema([_NEGATIVES]))),
    }


def _mine_range(
    batch: dict[str, np.ndarray], folder: Path, index: list[Any], settings: MineSettings, seed: int
) -> Iterator[pa.Table]:
    """Negatives of the rows from each start on, in row order."""
    task: TaskIndex = ray.get(index[0])
    collection = Collection(folder)
    for start in batch["start"].tolist():
        rows = range(start, min(start + RANGE_ROWS, len(collection)))
        records = collection.take_rows(rows, ["id", "query", "positives", "given_negatives"]).to_pylist()
        assert task.bm25 is not None
        found = task.bm25.search([record["query"] for record in records], settings.last_rank)
        ranked = [hits[settings.first_rank - 1 :] for hits in found]
        yield _table(_choose_rows(rows, records, ranked, task, folder.name, settings, seed))


def _choose_rows(
    rows: range,
    records: Sequence[dict[str, Any]],
    found: Sequence[np.ndarray],
    task: TaskIndex,
    name: str,
    settings: MineSettings,
    seed: int,
) -> list[Chosen]:
    """Choose each row's negatives among what was found for it."""
    chosen = []
    for row, record, hits in zip(rows, records, found):
        forbidden = {int(task.classes.class_P[p]) for p in task.shared.get(row, record["positives"])}
        own = task.classes.by_key.get(text_key(record["query"]))
        rng = Random(f"{seed}/{name}/{record['id']}/{row}")
        chosen.append(
            choose(
                record["given_negatives"],
                hits.tolist(),
                forbidden if own is None else forbidden | {own},
                task.classes.class_P,
                settings.num_negatives,
                rng,
            )
        )
    return chosen


def _table(chosen: Sequence[Chosen]) -> pa.Table:
    counts = {what: [getattr(c, what) for c in chosen] for what in ("given", "mined", "random")}
    return pa.table({"negatives": pa.array([c.negatives for c in chosen], _NEGATIVES.type), **counts})


def _commit_column(folder: Path, table: pa.Table) -> int:
    """Write the column as a new version of rows.lance and return the version; older versions stay readable.

    Until the manifest names the version nobody reads it, so a kill at any point leaves the task as it was.
    """
    import lance

    dataset = Collection(folder).rows
    if dataset.version != dataset.latest_version:  # a cleaning or mining cut short, or cleaned otherwise since
        dataset.restore()
        dataset = lance.dataset(str(folder / "rows.lance"))
    if _NEGATIVES.name in dataset.schema.names:
        dataset.drop_columns([_NEGATIVES.name])
    dataset.add_columns(table.to_reader())
    return dataset.version
