"""Cleaning: rows whose query repeats a test query or another row, found by a Ray Data job over the whole store.

What is dropped leaves the training rows as a new version of the task's rows; the version that ingest wrote stays
under the tag `ingested`, and every cleaning starts from it. What makes a duplicate is decided in `near.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tdro_ray.config import CleanSettings
from tdro_ray.data.collection import Collection, CollectionStore, TaskManifest
from tdro_ray.data.dedup import KEY_BYTES, text_key
from tdro_ray.data.ingest import data_map
from tdro_ray.data.layouts import read_judged
from tdro_ray.data.near import BANDS, Finding, Texts, band_keys, candidates, findings, similarity
from tdro_ray.data.place import Place
from tdro_ray.data.publish import store_lock, write_manifest
from tdro_ray.errors import DataError

RANGE_ROWS = 5000  # rows per task of the job
INGESTED = 1  # Lance version that ingest writes
PAIRS = 4096  # candidate pairs whose texts are in memory at a time
EXAMPLES = 5  # per task and reason, in clean.json
REASONS = ("contaminated", "near_duplicates", "across_tasks")


@dataclass(frozen=True)
class Queries:
    """All queries that are compared, one after another: the rows of each task, then the tests'."""

    tasks: dict[str, Collection]  # as ingested
    starts: dict[str, int]
    tests: list[tuple[str, str, str]]  # test, query id, text
    first_test: int

    def texts(self, places: Sequence[int]) -> dict[int, str]:
        """Return the texts at `places`."""
        wanted = np.unique(np.asarray(places, np.int64))
        found = {int(at): self.tests[at - self.first_test][2] for at in wanted[wanted >= self.first_test]}
        for name, task in self.tasks.items():
            start = self.starts[name]
            own = wanted[(wanted >= start) & (wanted < start + task.manifest.ingested_rows)]
            if len(own):
                found.update(zip(own.tolist(), task.take_rows((own - start).tolist(), ["query"])["query"].to_pylist()))
        return found


def clean(
    settings: CleanSettings,
    store: Path,
    names: Sequence[str],
    extra_tests: Sequence[Place],
    key: str,
    out: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Clean the tasks `names` of the store and write `clean.json` and `found/<task>.jsonl` into `out`; return the former's tasks.

    Test queries are those of every task of the store, dev splits included, and of `extra_tests`. `key` marks the
    manifests. Raises DataError for contaminated rows under `contaminated: fail`, and for a task that would lose all rows.
    """
    with store_lock(store):
        tasks = {name: Collection(store / name, INGESTED) for name in sorted(names)}
        queries = _queries(tasks, _test_queries(store, extra_tests) if settings.contaminated != "keep" else [])
        progress(f"{queries.first_test:,} training and {len(queries.tests):,} test queries: signatures")
        texts = _texts(queries, settings.threshold, progress)
        policy = settings.model_dump()
        found = [f for f in findings(texts, {r for r in REASONS if policy[r] == "drop"}) if policy[f.reason] != "keep"]
        report = _write_report(found, queries, policy, out)
        _refuse(found, report, settings)
        for name, task in tasks.items():
            drop = sorted({f.row for f in found if f.task == name and policy[f.reason] == "drop"})
            _rewrite(task, drop, report[name]["counts"], key)
    return report


# Signatures


def _test_queries(store: Path, extra_tests: Sequence[Place]) -> list[tuple[str, str, str]]:
    out = []
    for collection in CollectionStore(store).collections():
        for split in ("test", "dev"):
            folder = collection.folder / split
            if (folder / "qrels").is_dir():
                asked = read_judged(folder, split)[0]
                out += [(f"{collection.name}/{split}", query_id, text) for query_id, text in asked.items()]
    for extra in extra_tests:
        out += [(extra.name, query_id, text) for query_id, text in read_judged(extra)[0].items()]
    return out


def _queries(tasks: dict[str, Collection], tests: list[tuple[str, str, str]]) -> Queries:
    starts, at = {}, 0
    for name, task in tasks.items():
        starts[name] = at
        at += task.manifest.ingested_rows
    return Queries(tasks, starts, tests, at)


def _texts(queries: Queries, threshold: float, progress: Callable[[str], None]) -> Texts:
    """Return the distinct texts, linked where they are near."""
    items: list[Any] = [
        (str(task.folder), start, min(start + RANGE_ROWS, task.manifest.ingested_rows))
        for task in queries.tasks.values()
        for start in range(0, task.manifest.ingested_rows, RANGE_ROWS)
    ]
    tests = [text for _, _, text in queries.tests]
    items += [tests[start : start + RANGE_ROWS] for start in range(0, len(tests), RANGE_ROWS)]
    job = data_map("clean:signatures", queries.first_test + len(tests))
    keys, bands = zip(*job(_signatures, items)) if items else ((), ())
    keys_Q = np.concatenate([np.zeros(0, f"S{KEY_BYTES}"), *keys])
    _, place_X, text_Q = np.unique(keys_Q, return_index=True, return_inverse=True)
    bands_XB = np.concatenate([np.zeros((0, BANDS), np.uint32), *bands])[place_X]
    rows = {
        name: text_Q[start : start + queries.tasks[name].manifest.ingested_rows]
        for name, start in queries.starts.items()
    }
    asked = {int(text): queries.tests[at][:2] for at, text in enumerate(text_Q[queries.first_test :])}
    texts = Texts(rows, asked)
    pairs = candidates(bands_XB)
    progress(f"{len(place_X):,} distinct queries, {len(pairs):,} pairs to compare")
    texts.link(_compared(queries, place_X, pairs, threshold))
    return texts


def _signatures(item: Any) -> tuple[np.ndarray, np.ndarray]:
    """Keys and bands of a range of a task's rows, or of test queries given as texts. Runs on a Ray worker."""
    if isinstance(item, list):
        texts = item
    else:
        folder, start, stop = item
        texts = Collection(Path(folder), INGESTED).take_rows(range(start, stop), ["query"])["query"].to_pylist()
    return np.array([text_key(t) for t in texts], f"S{KEY_BYTES}"), band_keys(texts)


def _compared(
    queries: Queries, place_X: np.ndarray, pairs: np.ndarray, threshold: float
) -> Iterator[tuple[int, int, float]]:
    for start in range(0, len(pairs), PAIRS):
        part = pairs[start : start + PAIRS]
        texts = queries.texts(place_X[part].ravel())
        for one, other in part.tolist():
            how = similarity(texts[int(place_X[one])], texts[int(place_X[other])])
            if how >= threshold:
                yield one, other, how


# What came of it


def _write_report(
    found: list[Finding], queries: Queries, policy: Mapping[str, Any], out: Path
) -> dict[str, dict[str, Any]]:
    """Write every finding, and return counts and examples of each task."""
    folder = out / "found"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    report: dict[str, dict[str, Any]] = {}
    by_id = {(test, query_id): text for test, query_id, text in queries.tests}
    for name, task in queries.tasks.items():
        own = [f for f in found if f.task == name]
        records = []
        for start in range(0, len(own), PAIRS):
            records += _records(own[start : start + PAIRS], queries, by_id, policy)
        if records:
            lines = (json.dumps(record, ensure_ascii=False) for record in records)
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts = Counter(f.reason for f in own)
        dropped = len({f.row for f in own if policy[f.reason] == "drop"})
        report[name] = {
            "rows": task.manifest.ingested_rows,
            "kept": task.manifest.ingested_rows - dropped,
            "counts": {reason: counts[reason] for reason in REASONS if policy[reason] != "keep"},
            "examples": [r for reason in REASONS for r in [r for r in records if r["reason"] == reason][:EXAMPLES]],
        }
    content = {"settings": dict(policy), "test_queries": len(queries.tests), "tasks": report}
    (out / "clean.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return report


def _records(
    found: list[Finding], queries: Queries, by_id: Mapping[tuple[str, str], str], policy: Mapping[str, Any]
) -> list[dict[str, Any]]:
    others = [f.owner for f in found if isinstance(f.owner[1], int)]
    rows = [(f.task, f.row) for f in found] + [(task, int(row)) for task, row in others]
    details: dict[tuple[str, Any], tuple[str, str]] = {}
    for name in {task for task, _ in rows}:
        wanted = sorted({row for task, row in rows if task == name})
        table = queries.tasks[name].take_rows(wanted, ["id", "query"])
        details |= {(name, r): (i, q) for r, i, q in zip(wanted, table["id"].to_pylist(), table["query"].to_pylist())}
    records = []
    for f in found:
        row_id, query = details[f.task, f.row]
        where, other = f.owner
        other_id, other_query = details[f.owner] if isinstance(other, int) else (other, by_id[where, other])
        records.append(
            {
                "reason": f.reason,
                "dropped": policy[f.reason] == "drop",
                "row": f.row,
                "id": row_id,
                "query": query,
                "other": where,
                "other_id": other_id,
                "other_query": other_query,
                "similarity": round(f.similarity, 4),
            }
        )
    return records


def _refuse(found: list[Finding], report: Mapping[str, Any], settings: CleanSettings) -> None:
    if settings.contaminated == "fail" and any(f.reason == "contaminated" for f in found):
        bad = {name: task["counts"]["contaminated"] for name, task in report.items() if task["counts"]["contaminated"]}
        first = next(e for name in bad for e in report[name]["examples"] if e["reason"] == "contaminated")
        raise DataError(
            f"Training queries repeat test queries: {', '.join(f'{n} rows of {name}' for name, n in bad.items())}. First: {first['id']!r} "
            f"({first['query']!r:.80}) is test query {first['other_id']!r} of {first['other']}. Remove them from the sources, or set data.clean.contaminated=drop."
        )
    for name, task in report.items():
        if task["rows"] and not task["kept"]:
            raise DataError(
                f"Cleaning would drop all {task['rows']} rows of task {name!r} ({task['counts']}). Leave the task out of data.sources, or set data.clean to keep them."
            )


def _rewrite(task: Collection, drop: list[int], counts: dict[str, int], key: str) -> None:
    """Make the task's rows those that ingest wrote without `drop`; the manifest, written last, makes it so."""
    import lance

    before = Collection(task.folder).manifest
    content = before.ingested_hash
    if drop:
        hasher = blake2b(digest_size=16)
        hasher.update(content.encode() + np.asarray(drop, np.int64).tobytes())
        content = hasher.hexdigest()
    version, same = INGESTED, content == before.hash
    if drop and same:
        version = before.clean["version"]
    elif drop:
        rows = task.rows
        _tag(rows, "ingested", INGESTED)
        cleaned = lance.write_dataset(
            _without(rows, drop), str(task.folder / "rows.lance"), schema=rows.schema, mode="overwrite"
        )
        version = cleaned.version
        _tag(cleaned, "cleaned", version)
    entry = {
        "key": key,
        "version": version,
        "ingested_hash": before.ingested_hash,
        "ingested_rows": before.ingested_rows,
        "dropped": len(drop),
        "counts": counts,
    }
    negatives = before.negatives if same else {}
    manifest: TaskManifest = replace(
        before, rows=before.ingested_rows - len(drop), hash=content, clean=entry, negatives=negatives
    )
    write_manifest(task.folder, manifest)


def _tag(rows: Any, name: str, version: int) -> None:
    """Name a version, so that Lance never clears it away."""
    (rows.tags.update if name in rows.tags.list() else rows.tags.create)(name, version)


def _without(rows: Any, drop: list[int]) -> Iterator[pa.RecordBatch]:
    at, gone = 0, np.asarray(drop, np.int64)
    for batch in rows.to_batches():
        keep = ~np.isin(np.arange(at, at + batch.num_rows), gone)
        at += batch.num_rows
        yield batch.filter(pa.array(keep))
