"""The change log beside the versions of an index: what was written since, in order, durable before it is acknowledged.

    <out>/changes.lance    seq     int64     1, 2, 3, … without a gap
                           op      string    "upsert" or "delete"
                           id, title, text, metadata   as in the document store; null for a delete
                           vector  list<float>   unit length, null for a delete (no fixed size: models may change)
                           model   string    hash of the model that made the vector
                           time    int64     microseconds since 1970
    <out>/.changes.lock    held while a batch is appended

One append is one Lance commit, which a killed process has either made or not. Data and commit are flushed to the disk, so
an acknowledged change outlives the machine too. What a version has merged (`merged_seq` in its manifest) is pruned later,
all but the last row, from which the next number follows.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdro_ray.errors import DataError
from tdro_ray.index.versions import flush, sync

SCHEMA = pa.schema(
    [
        ("seq", pa.int64()),
        ("op", pa.string()),
        ("id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("metadata", pa.string()),
        ("vector", pa.list_(pa.float32())),
        ("model", pa.string()),
        ("time", pa.int64()),
    ]
)
MAX_FRAGMENTS = 256  # one more with every append; a commit lists them all, so they are joined from time to time
KEPT_S = 30.0  # how long replaced files stay for those who read them just now
READ_TRIES = 5


class StaleError(DataError):
    """The log no longer holds what an opened version has yet to see: a later version is current and must be opened."""


@dataclass(frozen=True, slots=True)
class Change:
    """One upsert or delete. `metadata` is JSON; `vector` is of unit length, float32 (D,)."""

    op: Literal["upsert", "delete"]
    id: str
    title: str = ""
    text: str = ""
    metadata: str = "{}"
    vector: np.ndarray | None = None


class ChangeLog:
    """The log of one index folder; any number of processes may append and follow."""

    def __init__(self, out_folder: str | Path) -> None:
        self.out_folder = Path(out_folder)
        self.path = self.out_folder / "changes.lance"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the right to append, across processes and threads; the system lets go of it when the process dies."""
        with (self.out_folder / ".changes.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, changes: Sequence[Change], first_seq: int, model: str) -> None:
        """Write `changes` numbered from `first_seq` as one commit; on return they are on the disk. Needs `locked`."""
        import lance
        from lance.fragment import write_fragments

        table, dataset = _table(changes, first_seq, model), _open(self.path)
        if dataset is None:
            lance.write_dataset(table, str(self.path), mode="create")
            flush(self.path)
            sync(self.out_folder)
            return
        written = write_fragments(table, dataset, mode="append")
        _flush_files(self.path / "data", [file.path for fragment in written for file in fragment.files])
        dataset = lance.LanceDataset.commit(dataset, lance.LanceOperation.Append(written), read_version=dataset.version)
        _flush_files(self.path / "_versions", [_manifest_name(dataset.version)])
        if len(dataset.get_fragments()) > MAX_FRAGMENTS:
            self._tidy(dataset)

    def prune(self, upto: int) -> None:
        """Remove the changes up to seq `upto`, which every kept version must have merged; the last one always stays."""
        with self.locked():
            dataset = _open(self.path)
            if dataset is None:
                return
            last = max(dataset.to_table(columns=["seq"])["seq"].to_pylist())
            if dataset.delete(f"seq <= {upto} AND seq < {last}")["num_deleted_rows"]:
                self._tidy(_open(self.path))

    def last_seq(self) -> int:
        """The number of the last change, 0 where there has been none."""
        dataset = _open(self.path)
        return max(dataset.to_table(columns=["seq"])["seq"].to_pylist()) if dataset else 0

    def follow(self, seq: int) -> Tail:
        """Return a reader of the changes after `seq`."""
        return Tail(self.path, seq)

    def _tidy(self, dataset: Any) -> None:
        dataset.optimize.compact_files()
        dataset.cleanup_old_versions(older_than=timedelta(seconds=KEPT_S), delete_unverified=False)


class Tail:
    """Reads a log's changes once each, in order. Asking when there is nothing new costs two looks at the file system."""

    def __init__(self, path: Path, seq: int) -> None:
        self.path, self.seq = path, seq
        self._folder = path / "_versions"
        self._stamp: int | None = None
        self._next = self._folder  # manifest of the version after the one read last
        self._fragment = -1

    def news(self) -> pa.Table | None:
        """Return the changes since the last call, None where there are none.

        Raises StaleError where some of them have been pruned.
        """
        stamp = _modified(self._folder)
        # Two commits within one tick of the file system's clock share a time: so the next manifest is asked for too.
        if stamp is None or (stamp == self._stamp and not self._next.exists()):
            return None
        table = self._read()
        self._stamp = stamp
        if not len(table):
            return None
        seqs = table["seq"].to_numpy()
        if seqs[0] != self.seq + 1 or seqs[-1] - seqs[0] + 1 != len(seqs):
            raise StaleError(
                f"Changes {self.seq + 1} to {seqs[0] - 1} of {self.path} are merged into a later version of the index and pruned; "
                "open the current version."
            )
        self.seq = int(seqs[-1])
        return table

    def _read(self) -> pa.Table:
        for attempt in range(READ_TRIES):
            try:
                dataset = _open(self.path)
                if dataset is None:
                    return SCHEMA.empty_table()
                fresh = [f for f in dataset.get_fragments() if f.fragment_id > self._fragment]
                table = dataset.scanner(fragments=fresh).to_table() if fresh else SCHEMA.empty_table()
                break
            except (OSError, ValueError):  # its files were tidied away meanwhile
                if attempt == READ_TRIES - 1:
                    raise
        self._fragment = max((f.fragment_id for f in fresh), default=self._fragment)
        self._next = self._folder / _manifest_name(dataset.version + 1)
        return table.filter(pc.field("seq") > self.seq).sort_by("seq")


def _open(path: Path) -> Any:
    """Return the log as a dataset, None before the first commit: a writer killed in it leaves a folder without manifest."""
    import lance

    try:
        return lance.dataset(str(path))
    except ValueError:
        if any(path.glob("_versions/*.manifest")):
            raise
        return None


def _table(changes: Sequence[Change], first_seq: int, model: str) -> pa.Table:
    now = time.time_ns() // 1000
    columns = {
        "seq": range(first_seq, first_seq + len(changes)),
        "op": [c.op for c in changes],
        "id": [c.id for c in changes],
        **{
            key: [None if c.op == "delete" else getattr(c, key) for c in changes]
            for key in ("title", "text", "metadata")
        },
        "vector": [c.vector for c in changes],
        "model": [model] * len(changes),
        "time": [now] * len(changes),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def _manifest_name(version: int) -> str:
    return f"{2**64 - 1 - version:020d}.manifest"  # Lance's names count down, so that the newest comes first


def _modified(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _flush_files(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        sync(folder / name)
    sync(folder)
