"""A version's documents once more, mapped into memory: a hit's text is read in microseconds, by all replicas of a node
from the same pages. Lance keeps what filters, merges and builds read.

    documents.arrow    Arrow IPC file, record batches of BATCH_ROWS rows: id, title, text, metadata (JSON)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tdro_ray.errors import DataError

BATCH_ROWS = 4096
COLUMNS = ("id", "title", "text", "metadata")


class Lookup:
    """An opened file; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as err:
            raise DataError(f"{path} cannot be read: {err}. Build the index again with `tdro index`.") from err
        self._columns = [[batch.column(name) for name in COLUMNS] for batch in batches]
        self._rows = sum(len(batch) for batch in batches)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """``{"id", "title", "text", "metadata"}`` of a row number."""
        at, inside = divmod(row, BATCH_ROWS)
        id, title, text, metadata = self._columns[at]
        return {
            "id": id[inside].as_py(),
            "title": title[inside].as_py(),
            "text": text[inside].as_py(),
            "metadata": json.loads(metadata[inside].as_py()),
        }


def beside(documents: str | Path) -> Path:
    """Return where the file stands beside a store's folder."""
    return Path(documents).with_suffix(".arrow")


def written_beside(documents: str | Path, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a store that is being written, all of BATCH_ROWS rows but the last, and write them here too."""
    writer = None
    try:
        for batch in batches:
            columns = batch.select(list(COLUMNS))
            writer = writer or pa.ipc.new_file(str(beside(documents)), columns.schema)
            writer.write_batch(columns)
            yield batch
    finally:
        if writer is not None:
            writer.close()
