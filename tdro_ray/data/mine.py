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

from tdro_ray.config import MineSettings, Recipe, mining_seed
from tdro_ray.data.bm25 import BM25, guess_language
from tdro_ray.data.collection import Collection, TaskManifest
from tdro_ray.data.dedup import KEY_BYTES, text_key
from tdro_ray.data.negatives import PassageClasses, choose, shared_positives
from tdro_ray.data.publish import store_lock, write_manifest
from tdro_ray.data.ray_data import quiet
from tdro_ray.errors import DataError

MINER = 1  # raised when mining changes, so that negatives mined before are mined again
RANGE_ROWS = 1000  # rows per mining task
READ_ROWS = 4096  # rows or passages read at a time
_NEGATIVES = pa.field("negatives", pa.list_(pa.int64()))


@dataclass(frozen=True)
class TaskIndex:
    """What mining a row needs to know of its task; made once, shared by all workers."""

    bm25: BM25
    classes: PassageClasses
    shared: dict[int, list[int]]  # row -> positives of all rows with the same query


def mine(
    recipe: Recipe, store: Path, names: Sequence[str], progress: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Any]]:
    """Give every row of the tasks `names` its `negatives` column; return what each manifest says of it, by name.

    A task whose rows and settings are unchanged is left alone. Raises DataError for a task that is not in the store.
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
        index = build.remote(store / todo[0], manifests[todo[0]].info.language) if todo else None
        for name, following in pairwise([*todo, None]):
            assert name is not None
            next_index = build.remote(store / following, manifests[following].info.language) if following else None
            negatives = _mine_task(recipe, store / name, index, keys[name])
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
    settings = recipe.mine.model_dump(mode="json", exclude={"seed"})
    parts = [MINER, manifest.hash, manifest.info.language, mining_seed(recipe), settings]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# The index


def _build_index(folder: Path, language: str) -> TaskIndex:
    collection = Collection(folder)
    language = language or guess_language(next(_passage_texts(collection), []))
    bm25 = BM25(_passage_texts(collection), language)
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


def _mine_task(recipe: Recipe, folder: Path, index: Any, key: str) -> dict[str, Any]:
    """Mine one task, commit the column, and return the manifest's entry."""
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
    tables = list(job.iter_batches(batch_size=None, batch_format="pyarrow"))
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
        found = task.bm25.search([record["query"] for record in records], settings.last_rank)
        chosen = []
        for row, record, hits in zip(rows, records, found):
            forbidden = {int(task.classes.class_P[p]) for p in task.shared.get(row, record["positives"])}
            own = task.classes.by_key.get(text_key(record["query"]))
            rng = Random(f"{seed}/{folder.name}/{record['id']}/{row}")
            chosen.append(
                choose(
                    record["given_negatives"],
                    hits[settings.first_rank - 1 :].tolist(),
                    forbidden if own is None else forbidden | {own},
                    task.classes.class_P,
                    settings.num_negatives,
                    rng,
                )
            )
        counts = {what: [getattr(c, what) for c in chosen] for what in ("given", "mined", "random")}
        yield pa.table({"negatives": pa.array([c.negatives for c in chosen], _NEGATIVES.type), **counts})


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
