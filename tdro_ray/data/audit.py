"""The audit of a task as training will see it: lengths, languages, repeats, false negatives. One Ray Data job, a worker per task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdro_ray.data.collection import Collection
from tdro_ray.data.dedup import text_key
from tdro_ray.data.ingest import data_map

READ_ROWS = 4096  # rows or passages in memory at a time
SAMPLE = 100  # texts of a task whose language is guessed and whose tokens are counted
TOP_BIN = 17  # lengths of 2**17 characters and more share the last bin


def audit(store: Path, names: Sequence[str], model: str = "") -> dict[str, dict[str, Any]]:
    """Return the audit of each task; tokens are counted where `model` is a folder with a tokenizer."""
    tokenizer = model if model and (Path(model) / "tokenizer_config.json").exists() else ""
    names = sorted(names)
    job = data_map("audit", sum(Collection(store / name).manifest.rows for name in names))
    found = job(partial(audit_task, tokenizer=tokenizer), [store / name for name in names])
    return dict(zip(names, found))


def audit_task(folder: Path, tokenizer: str = "") -> dict[str, Any]:
    """Return the audit of one task of the store. Lengths are `{p50, p95, max, mean, histogram}`; bin b of a
    histogram counts lengths from 2**b to 2**(b + 1) - 1, an empty text counts in bin 0. Shares are of the task's rows.
    """
    task = Collection(folder)
    rows = task.rows.to_table(columns=["id", "query", "positives", "given_negatives"])
    if not rows.num_rows:
        return {"rows": 0}
    lists = rows["positives"].combine_chunks()
    flat, of_row = lists.flatten().to_numpy(), np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())
    uses_P = np.bincount(flat, minlength=task.manifest.passages)
    shared = np.unique(of_row[uses_P[flat] > 1])
    keys = [text_key(query) for query in rows["query"].to_pylist()]
    lengths = np.concatenate(list(_passage_lengths(task)) or [np.zeros(0, np.int64)])
    queries = [rows["query"][at].as_py() for at in _spread(rows.num_rows)]
    passages = task.take_texts(_spread(task.manifest.passages))
    found = {
        "rows": rows.num_rows,
        "passages": task.manifest.passages,
        "query_characters": _lengths(pc.utf8_length(rows["query"]).to_numpy()),
        "passage_characters": _lengths(lengths),
        "query_languages": _languages(queries),
        "passage_languages": _languages(passages),
        "repeated_queries": len(keys) - len(set(keys)),
        "rows_with_shared_positive": len(shared) / rows.num_rows,
        "rows_without_negatives": pc.sum(pc.equal(pc.list_value_length(rows["given_negatives"]), 0)).as_py()
        / rows.num_rows,
        "query_is_passage": _query_is_passage(task, keys, flat, of_row),
        "ids_with_two_queries": _with_several(rows["id"], rows["query"]),
        "docids_with_two_texts": _repeated(task.passages.to_table(columns=["docid"])["docid"]),
    }
    if tokenizer:
        found |= _tokens(tokenizer, queries, passages)
    return found


def _passage_lengths(task: Collection) -> Iterator[np.ndarray]:
    for batch in task.passages.to_batches(columns=["title", "text"], batch_size=READ_ROWS):
        title, text = (pc.fill_null(pc.utf8_length(batch[c]), 0).to_numpy() for c in ("title", "text"))
        yield title + text + (title > 0)


def _lengths(length_X: np.ndarray) -> dict[str, Any]:
    if not len(length_X):
        return {"p50": 0, "p95": 0, "max": 0, "mean": 0.0, "histogram": []}
    bins = np.minimum(np.log2(np.maximum(length_X, 1)).astype(int), TOP_BIN)
    return {
        "p50": int(np.percentile(length_X, 50)),
        "p95": int(np.percentile(length_X, 95)),
        "max": int(length_X.max()),
        "mean": float(length_X.mean()),
        "histogram": np.bincount(bins).tolist(),
    }


def _languages(texts: Sequence[str]) -> dict[str, float]:
    """Share of the sampled texts by guessed language (py3langid), the three most common; a guess on short texts."""
    from py3langid.langid import classify

    guesses = Counter(classify(text[:1000])[0] for text in texts if text.strip())
    return {language: count / guesses.total() for language, count in guesses.most_common(3)}


def _spread(size: int) -> list[int]:
    return np.unique(np.linspace(0, max(0, size - 1), min(size, SAMPLE)).astype(int)).tolist()


def _query_is_passage(task: Collection, keys: list[bytes], flat: np.ndarray, of_row: np.ndarray) -> int:
    """Rows whose query is one of their own positives, whatever its case or white space."""
    equal: set[int] = set()
    for start in range(0, len(flat), READ_ROWS):
        part = slice(start, start + READ_ROWS)
        texts = task.take_texts(flat[part].tolist())
        equal.update(row for row, text in zip(of_row[part].tolist(), texts) if text_key(text) == keys[row])
    return len(equal)


def _with_several(ids: pa.ChunkedArray, texts: pa.ChunkedArray) -> int:
    """Ids that stand for more than one text."""
    pairs = pa.table({"id": ids, "text": texts}).group_by(["id", "text"]).aggregate([])
    return _repeated(pairs["id"])


def _repeated(ids: pa.ChunkedArray) -> int:
    """Values other than "" that come more than once."""
    ids = ids.filter(pc.not_equal(pc.fill_null(ids, ""), ""))
    return pc.sum(pc.greater(pc.value_counts(ids).field("counts"), 1)).as_py() or 0


def _tokens(folder: str, queries: Sequence[str], passages: Sequence[str]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        f"{what}_tokens": _lengths(np.array([len(ids) for ids in tokenizer(list(texts))["input_ids"]]))
        for what, texts in (("query", queries), ("passage", passages))
    }
