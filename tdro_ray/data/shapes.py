"""What one training record may look like and how it becomes a row. Knows nothing of files.

`SHAPES` is the table: Tevatron rows, sentence-transformers columns, JSON lists. A new shape is one function, one line in
the table and one in `shape_of`. A record that cannot be used raises `Bad`, which its reader turns into a reject.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import Any

from tdro_ray.data.dedup import passage_key
from tdro_ray.types import Passage, Row

QUERY_COLUMNS = ("query", "anchor", "question", "sentence1")
POSITIVE_COLUMNS = ("positive", "pos", "answer", "document", "passage", "sentence2")
NEGATIVE_COLUMNS = ("negative", "neg")


class Bad(Exception):
    """Raised by a shape for a record that it cannot use."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def tevatron(record: dict[str, Any], number: str) -> Row:
    """`{"_id", "text" or "query", "positive_passages": [{"docid", "title"?, "text"}], "negative_passages": […]}`.

    A passage may carry a teacher's `"score"`, a number.
    """
    query = record["query"] if "query" in record else record.get("text")
    identity = next((record[k] for k in ("_id", "query_id", "id") if record.get(k) is not None), number)
    positives, negatives = record.get("positive_passages"), record.get("negative_passages")
    row = _row(identity, query, positives, negatives)
    scores = tuple(_score(passage) for passage in [*positives, *(negatives or [])])
    return row if all(score is None for score in scores) else replace(row, scores=scores)


def columns(record: dict[str, Any], number: str) -> Row:
    """`{"query" or "anchor", "positive", "negative"?, "negative_1"?, …}`; a value is a text or a list of texts."""
    query = next(record[k] for k in QUERY_COLUMNS if k in record)
    positive = next((record[k] for k in POSITIVE_COLUMNS if k in record), None)
    negatives: list[Any] = []
    for key, value in record.items():
        if key.split("_")[0] in NEGATIVE_COLUMNS and value is not None:
            negatives += value if isinstance(value, list) else [value]
    identity = next((record[k] for k in ("_id", "query_id", "id") if record.get(k) is not None), number)
    return _row(identity, query, positive if isinstance(positive, list) else [positive], negatives)


def json_list(record: list[Any], number: str) -> Row:
    """`[query, positive]` or `[query, positive, negative, …]`."""
    if len(record) < 2:
        raise Bad("wrong shape", f"a JSON list needs a query and a positive, got {len(record)} values")
    return _row(number, record[0], record[1] if isinstance(record[1], list) else [record[1]], list(record[2:]))


SHAPES: dict[str, Callable[[Any, str], Row]] = {"tevatron": tevatron, "columns": columns, "list": json_list}


def shape_of(record: Any) -> str:
    """Return the name in `SHAPES` that reads this record; raises Bad when none does."""
    if isinstance(record, list):
        return "list"
    if isinstance(record, dict):
        if "positive_passages" in record:
            return "tevatron"
        if any(k in record for k in QUERY_COLUMNS) and any(k in record for k in POSITIVE_COLUMNS):
            return "columns"
        raise Bad(
            "wrong shape",
            f"fields {sorted(map(str, record))[:8]}; expected positive_passages, or query/anchor and positive",
        )
    raise Bad("wrong shape", f"expected a JSON object or list, got {type(record).__name__}")


def _row(identity: Any, query: Any, positives: Any, negatives: Any) -> Row:
    if not isinstance(query, str):
        raise Bad("wrong type", f"the query must be a string, got {query!r:.60}")
    if not query.strip():
        raise Bad("empty query")
    if not isinstance(identity, str | int):
        raise Bad("wrong type", f"the id must be a string, got {identity!r:.60}")
    found = _passages(positives, "positive")
    if not found:
        raise Bad("no positive")
    return Row(str(identity), query, found, _passages(negatives, "negative"))


def _score(passage: Any) -> float | None:
    score = passage.get("score") if isinstance(passage, dict) else None
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not isfinite(score)):
        raise Bad("wrong type", f"a passage's score must be a finite number, got {score!r:.60}")
    return score


def _passages(values: Any, role: str) -> tuple[Passage, ...]:
    if values is None:
        return ()
    if not isinstance(values, list):
        raise Bad("wrong type", f"{role} passages must be a list, got {values!r:.60}")
    return tuple(_passage(value, role) for value in values)


def _passage(value: Any, role: str) -> Passage:
    if isinstance(value, dict):
        title, text = value.get("title") or "", value.get("text")
        docid = value["docid"] if value.get("docid") is not None else value.get("_id")
    else:
        title, text, docid = "", value, None
    if not isinstance(text, str) or not isinstance(title, str):
        raise Bad("wrong type", f"a {role} passage must have a text, got {value!r:.60}")
    if not text.strip() and not title.strip():
        raise Bad(f"empty {role}")
    return Passage(passage_key(title, text).hex() if docid is None else str(docid), text, title)
