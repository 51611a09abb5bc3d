"""Ingest: sources -> collection store, one Ray Data job per task (read -> parse in parallel; the writer keeps order).

The rules of a task (rejects, duplicates, splits) are the writer's, the formats are the readers'; here they are only
put on Ray.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from tdro_ray.config import PolicySettings, Recipe
from tdro_ray.data.collection import TaskManifest
from tdro_ray.data.formats import CHUNK_ROWS, UNREADABLE, Chunk, Reject, located, parse_chunk, read_chunks
from tdro_ray.data.layouts import open_test
from tdro_ray.data.parsed import parsed_table
from tdro_ray.data.publish import read_manifest, store_lock
from tdro_ray.data.ray_data import quiet
from tdro_ray.data.sources import TaskSource, discover
from tdro_ray.data.writer import TaskWriter, WriteSettings
from tdro_ray.errors import DataError, nearest
from tdro_ray.types import TaskData, TaskInfo

ENVIRONMENT = "environment"
SMALL = 20_000  # rows: some seconds of one core
READER = 2  # raised when reading or cleaning changes, so that stores written before are read again


def ingest(recipe: Recipe, store: Path, progress: Callable[[str], None] = lambda line: None) -> dict[str, TaskManifest]:
    """Bring `store` up to date with the recipe's sources; return the manifests of the tasks they hold, by name.

    Tasks whose sources and settings are unchanged are not read again; other tasks of the store are left alone.
    Raises DataError for sources that are missing or unusable; what was complete before stays complete.
    """
    manifests: dict[str, TaskManifest] = {}
    with store_lock(store):
        tasks = discover([s for s in recipe.data.sources if s != ENVIRONMENT], progress)
        for task in tasks:
            manifests[task.name] = _ingest_files(recipe, store, task, progress)
        if ENVIRONMENT in recipe.data.sources:
            for name, manifest in _ingest_environment(recipe, store, progress).items():
                if name in manifests:
                    raise DataError(
                        f"Two tasks are called {name!r}: one of the environment and {tasks[0].files[0][0]}. Rename the folder."
                    )
                manifests[name] = manifest
    for name in recipe.data.tasks:
        if name not in manifests:
            raise DataError(
                f"data.tasks has settings for {name!r}, which is no task of the sources.{nearest(name, manifests)}"
            )
    return manifests


def _ingest_files(recipe: Recipe, store: Path, task: TaskSource, progress: Callable[[str], None]) -> TaskManifest:
    info = _overridden(recipe, task.name, task.info)
    key = _source_key(recipe, task.fingerprint(), info)
    manifest = _up_to_date(store, task.name, key)
    if manifest:
        progress(f"{task.name}: up to date, {manifest.rows:,} rows")
        return manifest
    test = open_test(task.test) if task.test else None
    writer = TaskWriter(store, task.name, info, key, test, _write_settings(recipe))
    return _write(writer, _parse_on_ray(task, recipe.scale.cpus_per_data_task), progress)


def _ingest_environment(recipe: Recipe, store: Path, progress: Callable[[str], None]) -> dict[str, TaskManifest]:
    """The tasks of the installed environment: parsed in parallel, then written like any other."""
    from tdro_ray.data.environment import environment_key, environment_tasks

    key = environment_key(recipe.data.environment)
    listing = store / ".environment.json"
    listed = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {}
    if listed.get("key") == key:
        known = {
            name: _up_to_date(store, name, _source_key(recipe, key, _overridden(recipe, name, TaskInfo())))
            for name in listed["names"]
        }
        if all(known.values()):
            progress(f"environment: up to date, {len(known)} tasks")
            return {name: manifest for name, manifest in known.items() if manifest}
    progress("environment: reading the installed packages")
    manifests = {}
    for data in environment_tasks(recipe.data.environment, ray_map("ingest:environment")):
        source_key = _source_key(recipe, key, _overridden(recipe, data.name, TaskInfo()))
        writer = TaskWriter(
            store, data.name, _overridden(recipe, data.name, data.info), source_key, data.test, _write_settings(recipe)
        )
        manifests[data.name] = _write(writer, _in_memory(data), progress)
    temporary = listing.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "names": list(manifests)}), encoding="utf-8")
    temporary.replace(listing)
    return manifests


def _write(writer: TaskWriter, tables: Iterable[pa.Table], progress: Callable[[str], None]) -> TaskManifest:
    try:
        for table in tables:
            writer.add(table)
        manifest = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    left_out = {**manifest.counts, "rejects": sum(manifest.rejects.values())}
    notes = [
        f"{left_out[key]} {key}"
        for key in ("rejects", "duplicates", "decontaminated", *PolicySettings.model_fields)
        if left_out.get(key)
    ]
    progress(
        f"{manifest.name}: {manifest.rows:,} rows, {manifest.passages:,} passages"
        + (f" ({', '.join(notes)} left out)" if notes else "")
    )
    return manifest


def _in_memory(data: TaskData) -> Iterator[pa.Table]:
    for start in range(0, len(data.rows), CHUNK_ROWS):
        yield parsed_table(data.rows[start : start + CHUNK_ROWS])


# Keys and settings


def _overridden(recipe: Recipe, name: str, info: TaskInfo) -> TaskInfo:
    override = recipe.data.tasks.get(name)
    return replace(info, **override.model_dump(exclude_none=True)) if override else info


def _write_settings(recipe: Recipe) -> WriteSettings:
    data = recipe.data
    return WriteSettings(data.max_reject_share, data.dev_queries, data.dev_corpus, data.policies)


def _source_key(recipe: Recipe, fingerprint: str, info: TaskInfo) -> str:
    """Key of everything that the written task depends on."""
    data = recipe.data
    parts = [READER, fingerprint, repr(info), data.dev_queries, data.dev_corpus, data.max_reject_share]
    parts.append(data.policies.model_dump())
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _up_to_date(store: Path, name: str, key: str) -> TaskManifest | None:
    manifest = read_manifest(store, name)
    return manifest if manifest and manifest.source_key == key else None


# On Ray


def _parse_on_ray(task: TaskSource, cpus: float) -> Iterator[pa.Table]:
    """Parsed tables of a task in source order: one read task per file streams chunks, parse tasks work on them."""
    quiet().target_max_block_size = 1 << 20  # a chunk is a block: parsing starts before a file is read
    items = [{"path": str(path), "format": name} for path, name in task.files]
    chunks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(_read, batch_size=1, num_cpus=cpus)
    # Parsing takes what reading leaves of a core. Unequal shares also keep Ray from fusing the two into one task per
    # file: a single large file is parsed on all cores.
    parsed = chunks.map_batches(
        _parse, batch_size=1, batch_format="pyarrow", num_cpus=max(cpus, 1 - cpus), zero_copy_batch=True
    )
    parsed.set_name(f"ingest:{task.name}")
    yield from parsed.iter_batches(batch_size=None, batch_format="pyarrow")


def _read(batch: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
    for path, name in zip(batch["path"], batch["format"]):
        try:
            for chunk in read_chunks(located(path), name):
                yield {"chunk": [pickle.dumps(chunk)]}
        except DataError as err:  # travels as data: an exception here would be printed with Ray's own stack traces
            yield {"chunk": [pickle.dumps(Reject(path, 0, UNREADABLE, str(err)))]}


def _parse(batch: pa.Table) -> Iterator[pa.Table]:
    for blob in batch["chunk"]:
        chunk: Chunk | Reject = pickle.loads(blob.as_py())
        yield parsed_table([chunk] if isinstance(chunk, Reject) else parse_chunk(chunk))


def data_map(name: str, rows: int) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """Return `ray_map`, or the plain `map` for so few rows that starting workers takes longer than the work."""
    return ray_map(name) if rows > SMALL else map


def ray_map(name: str) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """Return a `map` that runs on Ray Data under this name: results in order, one whole CPU per task."""

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        quiet()
        blobs = [{"item": pickle.dumps(item)} for item in items]
        if not blobs:
            return
        results = ray.data.from_items(blobs, override_num_blocks=min(len(blobs), 64)).map(
            lambda row: {"item": pickle.dumps(function(pickle.loads(row["item"])))}, num_cpus=1
        )
        results.set_name(name)
        for row in results.iter_rows():
            yield pickle.loads(row["item"])

    return run
