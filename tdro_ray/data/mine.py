"""Hard-negative mining: one Ray Data job per task, results as new columns of a version of the task's rows.

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
from tdro_ray.data.bm25 import BM25, Ranked, guess_language
from tdro_ray.data.collection import RESCORED, Collection, TaskManifest
from tdro_ray.data.dedup import KEY_BYTES, text_key
from tdro_ray.data.dense import DenseHits, dense_hits, mined_examples, mined_margins, mining_report
from tdro_ray.data.negatives import Chosen, PassageClasses, choose, shared_positives
from tdro_ray.data.publish import store_lock, write_manifest
from tdro_ray.data.ray_data import quiet
from tdro_ray.data.rescore import rescore
from tdro_ray.errors import DataError
from tdro_ray.types import Kind

MINER = 2  # raised when mining changes, so that negatives mined before are mined again
RANGE_ROWS = 1000  # rows per mining task
READ_ROWS = 4096  # rows or passages read at a time
Encode = Callable[[Sequence[tuple[str, Kind, str]]], np.ndarray]
_NEGATIVES = pa.field("negatives", pa.list_(pa.int64()))
# A cross-encoder's, of positives then negatives; null for what was drawn at random.
_RESCORED = pa.field(RESCORED, pa.list_(pa.float32()))


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
            if recipe.mine.rescore or encode:
                tables, report = _mine_scored(recipe, store / name, index, encode, progress)
            else:
                tables = list(_bm25_job(recipe, store / name, index, _mine_range))
                report = _bm25_report(tables)
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


def _bm25_job(recipe: Recipe, folder: Path, index: Any, work: Callable[..., Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Yield what `work` makes of the task's rows, range by range, in row order."""
    quiet()
    name, rows = folder.name, len(Collection(folder))
    starts = list(range(0, rows, RANGE_ROWS))
    job = ray.data.from_items([{"start": start} for start in starts], override_num_blocks=len(starts)).map_batches(
        work,
        fn_kwargs={"folder": folder, "index": [index], "settings": recipe.mine, "seed": mining_seed(recipe)},
        batch_size=None,
        num_cpus=1,  # pure computing: a smaller share would only start more processes than there are cores
    )
    job.set_name(f"mine:{name}")
    yield from job.iter_batches(batch_size=None, batch_format="pyarrow")


def _mine_scored(
    recipe: Recipe, folder: Path, index: Any, encode: Encode | None, progress: Callable[[str], None]
) -> tuple[list[pa.Table], dict[str, Any]]:
    """Return the task's negatives in row order, and the report, of a search whose hits have scores to filter by.

    In memory: the task's rows and hits, and all its vectors where an encoder searches.
    """
    collection, settings = Collection(folder), recipe.mine
    rows = collection.take_rows(range(len(collection)), ["id", "query", "positives", "given_negatives"])
    records, task = rows.to_pylist(), ray.get(index)
    if encode:
        hits = _dense_hits(recipe, collection, records, encode)
        found = hits.passages
    else:
        tables = _bm25_job(recipe, folder, index, _find_range)
        found = [np.array(ranked, np.int64) for table in tables for ranked in table["found"].to_pylist()]
    scores = None
    if settings.rescore:

        def show(done: int, total: int) -> None:
            progress(f"{folder.name}: {done:,} of {total:,} rows rescored")

        rescored = rescore(folder, records, found, settings, recipe.scale, show)
        hits, scores = rescored.hits, rescored.scores
    chosen = _choose_rows(
        range(len(records)), records, hits.passages, task, folder.name, settings, mining_seed(recipe), hits.filtered
    )
    table = _table(chosen)
    if scores is not None:
        known = (
            [score.get(p) for p in (*record["positives"], *c.negatives)]
            for record, c, score in zip(records, chosen, scores, strict=True)
        )
        table = table.append_column(_RESCORED, pa.array(known, _RESCORED.type))
    negatives = [c.negatives for c in chosen]
    report = mining_report(mined_margins(hits, negatives), mined_examples(hits, negatives, collection, records))
    return [table], report | {"share_filtered": hits.num_filtered / max(1, hits.num_ranked)}


def _dense_hits(recipe: Recipe, collection: Collection, records: Sequence[dict[str, Any]], encode: Encode) -> DenseHits:
    name, settings = collection.name, recipe.mine
    items: list[tuple[str, Kind, str]] = [(record["query"], "query", name) for record in records]
    items += [(text, "passage", name) for texts in _passage_texts(collection) for text in texts]
    vectors = encode(items)
    if settings.rescore:  # the margins are the cross-encoder's
        settings = settings.model_copy(update={"margin_absolute": None, "margin_relative": None})
    positives = [record["positives"] for record in records]
    return dense_hits(vectors[: len(records)], vectors[len(records) :], positives, settings, recipe.scale.use_gpu)


def _commit(recipe: Recipe, folder: Path, tables: list[pa.Table], key: str) -> dict[str, Any]:
    """Commit the column, and return the manifest's entry."""
    rows = len(Collection(folder))
    table = pa.concat_tables(tables)
    column = table["negatives"].combine_chunks()
    hasher = blake2b(digest_size=16)
    hasher.update(column.value_lengths().to_numpy().tobytes())
    hasher.update(column.flatten().to_numpy().tobytes())
    columns = {_NEGATIVES: column}
    if _RESCORED.name in table.column_names:
        columns[_RESCORED] = table[_RESCORED.name].combine_chunks()
        hasher.update(columns[_RESCORED].flatten().fill_null(np.nan).to_numpy().tobytes())
    total = {what: int(np.sum(table[what].to_numpy())) for what in ("given", "mined", "random")}
    return {
        "key": key,
        "method": recipe.mine.method,
        "num": recipe.mine.num_negatives,
        "hash": hasher.hexdigest(),
        "mean_given": total["given"] / rows,
        "mean_mined": total["mined"] / rows,
        "random_filled": total["random"],
        "version": _commit_columns(folder, pa.table([*columns.values()], schema=pa.schema([*columns]))),
    }


def _mine_range(
    batch: dict[str, np.ndarray], folder: Path, index: list[Any], settings: MineSettings, seed: int
) -> Iterator[pa.Table]:
    """Negatives of the rows from each start on, in row order, with what the report says of them."""
    for rows, records, task, ranked in _searched(batch, folder, index, settings):
        passages, scores = [r.passages for r in ranked], [r.scores for r in ranked]
        chosen = _choose_rows(rows, records, passages, task, folder.name, settings, seed)
        negatives = [c.negatives for c in chosen]
        hits = DenseHits(passages, scores, np.array([r.positive for r in ranked], np.float32), 0, [])
        margins = [margin.tolist() for margin in mined_margins(hits, negatives)]
        examples = mined_examples(hits, negatives, Collection(folder), records) if rows.start == 0 else []
        texts = [json.dumps(example) for example in examples]
        table = _table(chosen).append_column("margins", pa.array(margins, pa.list_(pa.float32())))
        yield table.append_column("example", pa.array(texts + [None] * (len(rows) - len(texts)), pa.string()))


def _bm25_report(tables: list[pa.Table]) -> dict[str, Any]:
    table = pa.concat_tables(tables)
    examples = [json.loads(text) for text in table["example"].drop_null().to_pylist()]
    return mining_report([table["margins"].combine_chunks().flatten().to_numpy()], examples)


def _find_range(
    batch: dict[str, np.ndarray], folder: Path, index: list[Any], settings: MineSettings, seed: int
) -> Iterator[pa.Table]:
    """What BM25 finds for the rows from each start on, in row order."""
    for *_, ranked in _searched(batch, folder, index, settings):
        yield pa.table({"found": pa.array([r.passages.tolist() for r in ranked], pa.list_(pa.int64()))})


def _searched(
    batch: dict[str, np.ndarray], folder: Path, index: list[Any], settings: MineSettings
) -> Iterator[tuple[range, list[dict[str, Any]], TaskIndex, list[Ranked]]]:
    """Yield (row numbers, rows, the task's index, what BM25 found within the ranks of each row) from each start on."""
    task: TaskIndex = ray.get(index[0])
    assert task.bm25 is not None
    collection = Collection(folder)
    for start in batch["start"].tolist():
        rows = range(start, min(start + RANGE_ROWS, len(collection)))
        records = collection.take_rows(rows, ["id", "query", "positives", "given_negatives"]).to_pylist()
        queries, positives = [r["query"] for r in records], [r["positives"] for r in records]
        found = task.bm25.search(queries, positives, settings.last_rank)
        first = settings.first_rank - 1
        yield rows, records, task, [replace(r, passages=r.passages[first:], scores=r.scores[first:]) for r in found]


def _choose_rows(
    rows: range,
    records: Sequence[dict[str, Any]],
    found: Sequence[np.ndarray],
    task: TaskIndex,
    name: str,
    settings: MineSettings,
    seed: int,
    refused: Sequence[np.ndarray] | None = None,
) -> list[Chosen]:
    """Choose each row's negatives among what was found for it; what the margins refused does not come back at random."""
    chosen = []
    for at, (row, record, hits) in enumerate(zip(rows, records, found)):
        forbidden = {int(task.classes.class_P[p]) for p in task.shared.get(row, record["positives"])}
        if refused is not None:
            given = {int(task.classes.class_P[p]) for p in record["given_negatives"]}
            forbidden |= {int(task.classes.class_P[p]) for p in refused[at].tolist()} - given
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


def _commit_columns(folder: Path, table: pa.Table) -> int:
    """Write the columns as a new version of rows.lance and return the version; older versions stay readable.

    Until the manifest names the version nobody reads it, so a kill at any point leaves the task as it was.
    """
    import lance

    dataset = Collection(folder).rows
    if dataset.version != dataset.latest_version:  # a cleaning or mining cut short, or cleaned otherwise since
        dataset.restore()
        dataset = lance.dataset(str(folder / "rows.lance"))
    old = [field.name for field in (_NEGATIVES, _RESCORED) if field.name in dataset.schema.names]
    if old:
        dataset.drop_columns(old)
    dataset.add_columns(table.to_reader())
    return dataset.version
