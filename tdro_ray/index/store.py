"""The document store: one Lance dataset per index version. Knows nothing of FAISS, Ray or models.

    row         int64                   0, 1, 2, … in the order of the source: the number FAISS answers with
    id, title, text  string
    metadata    string                  the document's metadata as JSON
    meta_<key>  string|int64|double|bool   one column per metadata key that filters may use
    vector      fixed_size_list<float>  unit length, added once the documents are embedded

A metadata key is a filter field when its values are of one scalar type (integers and floats mix to double) and
its name is made of letters, digits and `_`; other keys are stored and returned, but cannot be filtered by.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdro_ray.errors import DataError
from tdro_ray.index import filters, lookup
from tdro_ray.index.lookup import BATCH_ROWS

MAX_LOOKUPS = 1000  # ids looked up one by one; more are found sooner by reading all ids
MAX_FIELDS = 64  # filter fields of one store
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
SCHEMA = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("metadata", pa.string())]
)
ARROW = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}

Document = tuple[str, str, str, dict[str, Any]]  # id, title, text, metadata


class DocumentStore:
    """A complete store, opened for reading; safe to use from several threads."""

    def __init__(self, folder: str | Path) -> None:
        import lance

        self.dataset: Any = lance.dataset(str(folder))
        self.lookup = lookup.Lookup(lookup.beside(folder))
        columns = {f.name: str(f.type) for f in self.dataset.schema}
        self.fields = {"id": "string"}  # field -> type, of every field that filters may use
        self.fields |= {name.removeprefix("meta_"): kind for name, kind in columns.items() if name.startswith("meta_")}
        self.rows_where = lru_cache(maxsize=32)(self._rows_where)  # filters repeat, a scan costs milliseconds

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    def take(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return ``{"id", "title", "text", "metadata"}`` of each row number, in that order, repeats allowed."""
        return [self.lookup[row] for row in np.asarray(rows, np.int64).tolist()]

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the row number of each of `ids` that the store holds."""
        if len(ids) <= MAX_LOOKUPS:
            literals = ", ".join(filters.literal(id, "string") or "''" for id in ids)
            table = self.dataset.to_table(columns=["id", "row"], filter=f"id IN ({literals})")
        else:
            table = self.dataset.to_table(columns=["id", "row"])
            table = table.filter(pc.is_in(table["id"], value_set=pa.array(ids, pa.string())))
        return dict(zip(table["id"].to_pylist(), table["row"].to_pylist(), strict=True))

    def documents(self) -> Iterator[Document]:
        """Yield all documents in row order."""
        for batch in self.dataset.to_batches(columns=["id", "title", "text", "metadata"], batch_size=BATCH_ROWS):
            for record in batch.to_pylist():
                yield record["id"], record["title"], record["text"], json.loads(record["metadata"])

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the unit vectors of ascending row numbers, float32 (n, D)."""
        return matrix(self.dataset.take(np.asarray(rows).tolist(), columns=["vector"])["vector"])

    def vector_range(self, start: int, stop: int) -> np.ndarray:
        """Return the unit vectors of rows start .. stop - 1, float32 (n, D)."""
        return matrix(self.dataset.to_table(columns=["vector"], offset=start, limit=stop - start)["vector"])

    def vector_blocks(self) -> Iterator[np.ndarray]:
        """Yield all vectors in row order, float32 (n, D) at a time."""
        for batch in self.dataset.to_batches(columns=["vector"], batch_size=BATCH_ROWS):
            yield matrix(batch["vector"])

    def where(self, filter: dict[str, Any]) -> np.ndarray:
        """Return the ascending row numbers that satisfy `filter`, int64. Raises FilterError (see `filters`)."""
        sql = filters.to_sql(filter, self.fields, lambda field: "id" if field == "id" else f"meta_{field}")
        return self.rows_where(sql)

    def _rows_where(self, sql: str) -> np.ndarray:
        return np.sort(self.dataset.to_table(columns=["row"], filter=sql)["row"].to_numpy())


def matrix(column: Any) -> np.ndarray:
    """Return a column of fixed-size lists as an array (n, D)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def write_documents(
    folder: str | Path, documents: Iterable[Document], fields: dict[str, str] | None = None
) -> tuple[int, dict[str, str]]:
    """Write the documents as a new Lance dataset; return their number and the filter fields with their types.

    `fields` are there in any case, with their types. Raises DataError for no document, a repeated id, or a value that cannot be stored; the message names the document.
    """
    import lance

    seen = _Fields(fields or {})
    batches = _document_batches(documents, seen)
    first = next(batches, None)  # a bad first document is reported before anything is written
    if first is None:
        raise DataError("There are no documents to index; give at least one.")
    failure: list[DataError] = []
    kept = _keep_error(itertools.chain([first], batches), failure)
    reader = pa.RecordBatchReader.from_batches(SCHEMA, lookup.written_beside(folder, kept))
    try:
        lance.write_dataset(reader, str(folder), mode="create")
    except OSError:
        if failure:  # Lance reports the error of the stream as an OSError of its own
            raise failure[0] from None
        raise
    return seen.count, seen.types()


def add_vectors(folder: str | Path, vectors: np.ndarray, fields: dict[str, str]) -> None:
    """Add the vectors, float32 (documents, D) in row order, one column per filter field, and a lookup table of the ids."""
    import lance

    source = lance.dataset(str(folder))
    schema = pa.schema(
        [
            ("vector", pa.list_(pa.float32(), vectors.shape[1])),
            *((f"meta_{name}", ARROW[kind]) for name, kind in fields.items()),
        ]
    )

    def batches() -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in source.to_batches(columns=["metadata"], batch_size=BATCH_ROWS):
            block = np.ascontiguousarray(vectors[start : start + len(batch)], np.float32)
            start += len(batch)
            metadata = [json.loads(text) for text in batch["metadata"].to_pylist()]
            columns = [pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), vectors.shape[1])]
            columns += [
                pa.array([filters.fitting(m.get(name), kind) for m in metadata], ARROW[kind])
                for name, kind in fields.items()
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    # The reader runs inside add_columns, which holds its dataset: it must read through another handle.
    lance.dataset(str(folder)).add_columns(pa.RecordBatchReader.from_batches(schema, batches()))
    # Of a million ids one is found in 1 ms, against 18 ms by a scan; the table takes 0.15 s and 11 MB.
    lance.dataset(str(folder)).create_scalar_index("id", "BTREE")


def _document_batches(documents: Iterable[Document], fields: _Fields) -> Iterator[pa.RecordBatch]:
    ids: set[str] = set()
    pending: list[dict[str, Any]] = []
    for number, (id, title, text, metadata) in enumerate(documents):
        where = f"Document {number} (id {id!r:.80})"
        if not isinstance(id, str) or not id:
            raise DataError(f"{where}: the id must be a string that is not empty.")
        if id in ids:
            raise DataError(f"{where}: the id occurs twice; ids must be unique, e.g. put the task's name in front.")
        ids.add(id)
        record = checked(id, title, text, metadata, where)
        fields.see(metadata)
        pending.append({"row": number, **record})
        if len(pending) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(pending, SCHEMA)
            pending = []
    if pending:
        yield pa.RecordBatch.from_pylist(pending, SCHEMA)


def full_text(record: Mapping[str, Any]) -> str:
    """Return what of a document is embedded: its title, where it has one, in front of its text."""
    return f"{record['title']} {record['text']}" if record["title"] else str(record["text"])


def checked(id: str, title: str, text: str, metadata: dict[str, Any], where: str) -> dict[str, str]:
    """Return a document as stored, its metadata as JSON. Raises DataError that begins with `where`."""
    record = {"id": id, "title": title or "", "text": text, "metadata": _dump(metadata, where)}
    for key in ("id", "title", "text"):
        if not isinstance(record[key], str):
            raise DataError(f"{where}: {key} must be a string, got {record[key]!r:.80}.")
        if not filters.is_unicode(record[key]):
            raise DataError(f"{where}: {key} holds a lone surrogate, which no UTF-8 text can; clean the source.")
    return record


def _dump(metadata: dict[str, Any], where: str) -> str:
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: metadata must be a dict, got {metadata!r:.80}.")
    try:
        text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as err:
        raise DataError(f"{where}: metadata cannot be written as JSON: {err}.") from err
    if not filters.is_unicode(text):
        raise DataError(f"{where}: metadata cannot be written as JSON: it holds a lone surrogate.")
    return text


class _Fields:
    """The types of metadata keys, gathered while documents pass."""

    def __init__(self, kept: dict[str, str]) -> None:
        self.count = 0
        self._kept = kept
        self._types: dict[str, str | None] = {**kept}  # None: not of one scalar type

    def see(self, metadata: dict[str, Any]) -> None:
        self.count += 1
        for key, value in metadata.items():
            if value is None or key in self._kept or (key in self._types and self._types[key] is None):
                continue
            kind = _scalar_type(value)
            known = self._types.get(key, kind)
            if {known, kind} == {"int64", "double"}:
                known = kind = "double"
            self._types[key] = kind if known == kind else None

    def types(self) -> dict[str, str]:
        """Field -> type of the keys that filters may use, in order of first use; names equal but for case count once."""
        fields: dict[str, str] = {}
        for key, kind in self._types.items():
            fresh = key.lower() not in {"id", *(f.lower() for f in fields)}
            if kind and fresh and FIELD_NAME.fullmatch(key) and key not in filters.LOGIC and len(fields) < MAX_FIELDS:
                fields[key] = kind
        return fields


def _scalar_type(value: Any) -> str | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) < value < 2**63 else None
    return {float: "double", str: "string"}.get(type(value))


def _keep_error(batches: Iterator[pa.RecordBatch], failure: list[DataError]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except DataError as err:
        failure.append(err)
        raise
