"""Parsed rows as Arrow tables with the keys that the writer compares: the work of ingest that runs in parallel. Knows no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from tdro_ray.data.collection import PASSAGE_SCHEMA
from tdro_ray.data.dedup import KEY_BYTES, passage_key, row_key, text_key
from tdro_ray.data.formats import Reject
from tdro_ray.types import Passage, Row

KEY = pa.binary(KEY_BYTES)
_PASSAGE = pa.struct([*PASSAGE_SCHEMA, pa.field("key", KEY)])
PARSED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("query", pa.string()),
        ("query_key", KEY),
        ("row_key", KEY),  # same query, same positives
        ("content_key", KEY),  # everything in the row, ids too
        ("passages", pa.list_(_PASSAGE)),  # distinct; the positives first
        ("scores", pa.list_(pa.float32())),  # of `passages`; null where none is given
        ("num_positives", pa.int64()),
        ("self_negatives", pa.int64()),  # given negatives that were a positive of the row, left out
        ("reject", pa.string()),  # null, or a JSON list [file, line, reason, detail]; then the rest is empty
    ]
)


def parsed_table(items: Iterable[Row | Reject]) -> pa.Table:
    """Return rows and rejects as a table of `PARSED_SCHEMA`, keys computed: the work that runs in parallel."""
    records = [_parsed_reject(item) if isinstance(item, Reject) else _parsed_row(item) for item in items]
    columns = zip(*records) if records else [[] for _ in PARSED_SCHEMA]
    arrays = [
        _passage_lists(values) if field.name == "passages" else pa.array(values, field.type)
        for values, field in zip(columns, PARSED_SCHEMA)
    ]
    return pa.table(arrays, schema=PARSED_SCHEMA)


def _passage_lists(rows: Sequence[Sequence[tuple[Any, ...]]]) -> pa.ListArray:
    """Return the passages of each row, made column by column."""
    offsets = np.concatenate([[0], np.cumsum([len(passages) for passages in rows])]).astype(np.int32)
    flat = [passage for passages in rows for passage in passages]
    columns = zip(*flat) if flat else [[] for _ in _PASSAGE]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _PASSAGE)]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(arrays, fields=list(_PASSAGE)))


def _parsed_row(row: Row) -> tuple[Any, ...]:
    query_key = text_key(row.query)
    positives = {passage_key(p.title, p.text): p for p in reversed(row.positives)}  # of equal ones the first stays
    positives = dict(reversed(positives.items()))
    negatives: dict[bytes, Passage] = {}
    dropped = 0
    for passage in row.negatives:
        key = passage_key(passage.title, passage.text)
        dropped += key in positives
        if key not in positives:
            negatives.setdefault(key, passage)
    passages = [(p.docid, p.title, p.text, key) for key, p in (*positives.items(), *negatives.items())]
    given: dict[bytes, float] = {}
    for passage, score in zip((*row.positives, *row.negatives), row.scores):
        if score is not None:
            given.setdefault(passage_key(passage.title, passage.text), score)
    scores = [given.get(key) for key in (*positives, *negatives)] if given else None
    content = json.dumps(
        [
            row.id,
            row.query,
            len(positives),
            [(docid, key.hex()) for docid, _, _, key in passages],
            *([scores] if given else []),
        ]
    )
    content_key = blake2b(content.encode(), digest_size=KEY_BYTES).digest()
    return (
        row.id,
        row.query,
        query_key,
        row_key(query_key, positives),
        content_key,
        passages,
        scores,
        len(positives),
        dropped,
        None,
    )


def _parsed_reject(reject: Reject) -> tuple[Any, ...]:
    empty = bytes(KEY_BYTES)
    return "", "", empty, empty, empty, [], None, 0, 0, json.dumps(reject)
