"""Every input format: what a training file looks like and how it becomes rows. Knows nothing of Ray or the store.

Two tables. `FORMATS`: how a file or folder is cut into chunks of raw records (JSON lines, Parquet, a BEIR folder);
a chunk is small, so that no file is ever held whole. `SHAPES`: what one record may look like (Tevatron rows,
sentence-transformers columns, JSON lists). A new format is one function and one line in one of them.

A record that cannot be used becomes a `Reject` with its file, line and reason; nothing is dropped in silence.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tdro_ray.data.dedup import passage_key
from tdro_ray.errors import DataError, nearest
from tdro_ray.types import Passage, Row

CHUNK_BYTES = 2 << 20  # of raw lines; the unit that one parse task works on
CHUNK_ROWS = 2000  # of Parquet and joined records
UNREADABLE = "unreadable"  # reason of a reject that stands for a whole damaged file; the ingest fails on it


class Chunk(NamedTuple):
    """Raw records in a row: `lines` of a text file, or `records` where the file has none. `first` counts from 1."""

    file: str
    first: int
    lines: bytes = b""
    records: list[Any] | None = None


class Reject(NamedTuple):
    """An input record that was refused. `reason` is one of few (it is counted), `detail` says more."""

    file: str
    line: int
    reason: str
    detail: str = ""


class Bad(Exception):
    """Raised by a shape for a record that it cannot use."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# Opening


def open_stream(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressed by its ending (`.gz`, `.zst`)."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True))  # type: ignore[arg-type]
    return path.open("rb")


# Formats: file or folder -> chunks


def jsonl_chunks(path: Path) -> Iterator[Chunk]:
    """Chunks of whole lines of a JSON-lines file."""
    first, rest = 1, b""
    with open_stream(path) as file:
        while block := file.read(CHUNK_BYTES):
            block = rest + block
            cut = block.rfind(b"\n") + 1
            lines, rest = block[:cut], block[cut:]
            if lines:
                yield Chunk(str(path), first, lines)
                first += lines.count(b"\n")
    if rest:
        yield Chunk(str(path), first, rest)


def parquet_chunks(path: Path) -> Iterator[Chunk]:
    """Chunks of rows of a Parquet file; the line of a row is its number from 1."""
    import pyarrow.parquet as pq

    first = 1
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=CHUNK_ROWS):
            yield Chunk(str(path), first, records=batch.to_pylist())
            first += batch.num_rows


def beir_chunks(folder: Path, split: str = "train") -> Iterator[Chunk]:
    """Rows of a BEIR folder with train qrels; score 0 or less is a given negative. Lines are those of the qrels.

    Held in memory: the judgements and the text of judged queries and documents, never the whole corpus.
    """
    qrels_path = folder / "qrels" / f"{split}.tsv"
    judged: dict[str, list[tuple[str, int]]] = {}
    first_line: dict[str, int] = {}
    for number, query, document, score in qrels_lines(qrels_path):
        judged.setdefault(query, []).append((document, score))
        first_line.setdefault(query, number)
    wanted = {document for pairs in judged.values() for document, _ in pairs}
    queries = {r["_id"]: r.get("text") for r in _beir_records(folder, "queries") if r["_id"] in judged}
    corpus = {r["_id"]: r for r in _beir_records(folder, "corpus") if r["_id"] in wanted}
    records: list[Any] = []
    for query, pairs in judged.items():
        known = [(corpus.get(d), s, d) for d, s in pairs]
        record = {
            "_id": query,
            "text": queries.get(query),
            "positive_passages": [_beir_passage(r, d) for r, s, d in known if s > 0],
            "negative_passages": [_beir_passage(r, d) for r, s, d in known if s <= 0],
        }
        records.append((first_line[query], record))
        if len(records) == CHUNK_ROWS:
            yield Chunk(str(qrels_path), 0, records=records)
            records = []
    if records:
        yield Chunk(str(qrels_path), 0, records=records)


def qrels_lines(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield (line, query id, document id, score) of a qrels file: three columns (BEIR) or four (TREC), tabs or spaces."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.split("\t") if "\t" in line else line.split()
            if len(parts) == 4:
                parts = [parts[0], parts[2], parts[3]]
            if number == 1 and not parts[-1:][0].strip().lstrip("-").isdigit():
                continue  # header
            if not line.strip():
                continue
            if len(parts) != 3 or not parts[2].strip().lstrip("-").isdigit():
                raise DataError(
                    f"{path}:{number}: expected query-id, corpus-id and an integer relevance separated by tabs, got {line!r:.120}."
                )
            yield number, parts[0].strip(), parts[1].strip(), int(parts[2])


def _beir_passage(record: dict[str, Any] | None, docid: str) -> dict[str, Any]:
    if record is None:
        return {"docid": docid, "text": None}
    return {"docid": docid, "title": record.get("title"), "text": record.get("text")}


def _beir_records(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = first_existing(folder, f"{name}.jsonl")
    if path is None:
        raise DataError(
            f"{folder} has qrels/train.tsv but no {name}.jsonl (.gz, .zst); a BEIR folder needs corpus, queries and qrels."
        )
    with open_stream(path) as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                record["_id"] = str(record["_id"])
            except (ValueError, TypeError, KeyError) as err:
                raise DataError(
                    f"{path}:{number}: expected a JSON object with '_id' and 'text': {err!r:.120}."
                ) from err
            yield record


def first_existing(folder: Path, name: str) -> Path | None:
    """Return `folder/name`, or its `.gz` or `.zst` form, whichever is there first."""
    return next((p for end in ("", ".gz", ".zst") if (p := folder / (name + end)).is_file()), None)


FORMATS: dict[str, Callable[[Path], Iterator[Chunk]]] = {
    "jsonl": jsonl_chunks,
    "parquet": parquet_chunks,
    "beir": beir_chunks,
}
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}  # after .gz and .zst


def format_of(path: Path) -> str | None:
    """Return the name in `FORMATS` that reads this file or folder, or None."""
    if path.is_dir():
        return "beir" if (path / "qrels" / "train.tsv").is_file() else None
    return ENDINGS.get(plain_suffix(path))


def plain_suffix(path: Path) -> str:
    """Return the ending of a file name without its compression."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


# Shapes: one record -> one row

QUERY_COLUMNS = ("query", "anchor", "question", "sentence1")
POSITIVE_COLUMNS = ("positive", "pos", "answer", "document", "passage", "sentence2")
NEGATIVE_COLUMNS = ("negative", "neg")


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


# Reading


def parse_chunk(chunk: Chunk) -> Iterator[Row | Reject]:
    """Yield a Row or a Reject for each record of a chunk, in order. Blank lines are no records."""
    stem = Path(chunk.file).name.split(".")[0]
    for line, raw in _numbered(chunk):
        try:
            record = _decode(raw) if isinstance(raw, bytes) else raw
            row = SHAPES[shape_of(record)](record, f"{stem}:{line}")
            row.query.encode()  # a lone surrogate (\\ud800 in JSON) is no text: neither Arrow nor a tokenizer takes it
            for passage in (*row.positives, *row.negatives):
                passage.full_text.encode()
        except Bad as err:
            yield Reject(chunk.file, line, err.reason, err.detail)
        except UnicodeEncodeError as err:
            yield Reject(chunk.file, line, "bad UTF-8", str(err)[:120])
        else:
            yield row


def _numbered(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    if chunk.records is None:
        for line, raw in enumerate(chunk.lines.split(b"\n"), chunk.first):
            if raw.strip():
                yield line, raw
    elif chunk.first:
        yield from enumerate(chunk.records, chunk.first)
    else:
        yield from chunk.records  # (line, record) pairs


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise Bad("bad UTF-8", str(err)[:120]) from err
    except (ValueError, RecursionError) as err:
        raise Bad("not JSON", str(err)[:120]) from err


def read_chunks(path: Path, name: str) -> Iterator[Chunk]:
    """Chunks of a source by the name of its format; raises DataError for a damaged file."""
    if name not in FORMATS:
        raise DataError(f"No format {name!r}.{nearest(name, FORMATS)}")
    import zlib

    import pyarrow as pa
    import zstandard

    try:
        yield from FORMATS[name](path)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException) as err:
        raise DataError(
            f"{path} cannot be read as {name}: {err or type(err).__name__}. Is it damaged, or does its ending not tell what it is?"
        ) from err


def read(path: Path, name: str | None = None) -> Iterator[Row | Reject]:
    """Yield the rows and rejects of one file or folder, lazily; the format is told by its ending unless named."""
    name = name or format_of(path)
    if name is None:
        raise DataError(
            f"{path} is in no known format. Valid endings: {', '.join(sorted(ENDINGS))} (also .gz, .zst), or a BEIR folder with qrels/train.tsv."
        )
    for chunk in read_chunks(path, name):
        yield from parse_chunk(chunk)
