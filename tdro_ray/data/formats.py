"""Every input format: what a training file looks like and how it becomes rows. Knows nothing of Ray or the store.

Two tables. `FORMATS`, here: how a file or folder is cut into chunks of raw records (JSON lines, Parquet, a folder of
judgements); a chunk is small, so that no file is ever held whole. `SHAPES`, in `shapes.py`: what one record may look
like. A new format is one function and one line in one of them.

A record that cannot be used becomes a `Reject` with its file, line and reason; nothing is dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tdro_ray.data.hub import PREFIX, HubDataset
from tdro_ray.data.layouts import LAYOUTS, Document, documents, judgements, layout_of, queries
from tdro_ray.data.place import (
    Place,
    RemotePath,
    name_in,
    open_anywhere,
    open_stream,
    place,
    plain_suffix,
    remote_message,
)
from tdro_ray.data.shapes import SHAPES, Bad, shape_of
from tdro_ray.errors import DataError, nearest
from tdro_ray.types import Row

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


# Formats: file or folder -> chunks


def jsonl_chunks(path: Place) -> Iterator[Chunk]:
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


def parquet_chunks(path: Place) -> Iterator[Chunk]:
    """Chunks of rows of a Parquet file; the line of a row is its number from 1."""
    import pyarrow.parquet as pq

    first = 1
    with open_anywhere(path) as raw, pq.ParquetFile(raw, pre_buffer=True) as file:
        for batch in file.iter_batches(batch_size=CHUNK_ROWS):
            yield Chunk(str(path), first, records=batch.to_pylist())
            first += batch.num_rows


def judged_chunks(folder: Place, split: str = "train") -> Iterator[Chunk]:
    """Rows of a folder with train judgements; score 0 or less is a given negative. Lines are those of the judgements.

    Held in memory: the judgements and the text of judged queries and documents, never the whole corpus.
    """
    path, lines = judgements(folder, split)
    judged: dict[str, list[tuple[str, int]]] = {}
    first_line: dict[str, int] = {}
    for number, query, document, score in lines:
        judged.setdefault(query, []).append((document, score))
        first_line.setdefault(query, number)
    wanted = {document for pairs in judged.values() for document, _ in pairs}
    texts = {identity: text for identity, text, _ in queries(folder, split) if identity in judged}
    corpus = {document.docid: document for document in documents(folder) if document.docid in wanted}
    records: list[Any] = []
    for query, pairs in judged.items():
        record = {
            "_id": query,
            "text": texts.get(query),
            "positive_passages": [_passage(corpus, d) for d, s in pairs if s > 0],
            "negative_passages": [_passage(corpus, d) for d, s in pairs if s <= 0],
        }
        records.append((first_line[query], record))
        if len(records) == CHUNK_ROWS:
            yield Chunk(str(path), 0, records=records)
            records = []
    if records:
        yield Chunk(str(path), 0, records=records)


def _passage(corpus: Mapping[str, Document], docid: str) -> dict[str, Any]:
    found = corpus.get(docid)
    return (
        {"docid": docid, "text": None} if found is None else {"docid": docid, "title": found.title, "text": found.text}
    )


def hub_chunks(dataset: HubDataset) -> Iterator[Chunk]:
    """Chunks of rows of a Hugging Face dataset; the line of a row is its number from 1."""
    first = 1
    for records in dataset.batches(CHUNK_ROWS):
        yield Chunk(str(dataset), first, records=records)
        first += len(records)


FORMATS: dict[str, Callable[[Any], Iterator[Chunk]]] = {
    "jsonl": jsonl_chunks,
    "parquet": parquet_chunks,
    "hf": hub_chunks,
    **dict.fromkeys(LAYOUTS, judged_chunks),
}
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}  # after .gz and .zst


def format_of(path: Place) -> str | None:
    """Return the name in `FORMATS` that reads this file or folder, or None."""
    if path.is_dir():
        return layout_of(path, "train")
    return ENDINGS.get(plain_suffix(path))


# Reading


def parse_chunk(chunk: Chunk) -> Iterator[Row | Reject]:
    """Yield a Row or a Reject for each record of a chunk, in order. Blank lines are no records."""
    stem = name_in(chunk.file).split(".")[0]
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


def located(source: str) -> Place | HubDataset:
    """Return what a source's text stands for, on any node."""
    return HubDataset.parse(source) if source.startswith(PREFIX) else place(source)


def read_chunks(path: Place | HubDataset, name: str) -> Iterator[Chunk]:
    """Chunks of a source by the name of its format; raises DataError for a damaged file."""
    if name not in FORMATS:
        raise DataError(f"No format {name!r}.{nearest(name, FORMATS)}")
    import zlib

    import pyarrow as pa
    import zstandard

    try:
        yield from FORMATS[name](path)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException) as err:
        if isinstance(path, RemotePath) and type(err) is OSError:  # the filesystem's, which says no more of its kind
            raise DataError(remote_message(str(path), err)) from err
        raise DataError(
            f"{path} cannot be read as {name}: {err or type(err).__name__}. Is it damaged, or does its ending not tell what it is?"
        ) from err


def read(path: Place, name: str | None = None) -> Iterator[Row | Reject]:
    """Yield the rows and rejects of one file or folder, lazily; the format is told by its ending unless named."""
    name = name or format_of(path)
    if name is None:
        raise DataError(
            f"{path} is in no known format. Valid endings: {', '.join(sorted(ENDINGS))} (also .gz, .zst), or a BEIR, MIRACL or Mr.TyDi folder "
            f"with train judgements."
        )
    for chunk in read_chunks(path, name):
        yield from parse_chunk(chunk)
