"""The collection store: where ingested tasks live and how they are read. Knows nothing of Ray or torch.

    <store>/<task>/rows.lance       one row per query; passages by index into passages.lance
    <store>/<task>/passages.lance   one row per distinct passage (title and text), in order of first use
    <store>/<task>/test, dev        held-out tests, BEIR layout
    <store>/<task>/rejects.jsonl    input lines that were refused: file, line, reason
    <store>/<task>/manifest.json    written last: a task without it does not exist

Passages are stored once and referred to by number: equal passages are equal numbers, and eight negatives a row
cost 64 bytes, not eight texts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from tdro_ray.data.layouts import open_test
from tdro_ray.errors import DataError, nearest
from tdro_ray.types import Passage, RetrievalTest, TaskInfo

ROW_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("query", pa.string()),
        ("positives", pa.list_(pa.int64())),  # indices into passages.lance
        ("given_negatives", pa.list_(pa.int64())),  # as the source gave them
        ("scores", pa.list_(pa.float32())),  # a teacher's, of positives and given negatives; null where none is given
    ]
)  # mining adds `negatives: list<int64>`, and RESCORED where a cross-encoder scored them
RESCORED = "rescored"  # list<float>: of positives, then negatives; null where there is none
PASSAGE_SCHEMA = pa.schema([("docid", pa.string()), ("title", pa.string()), ("text", pa.string())])


@dataclass(frozen=True)
class TaskManifest:
    """What `manifest.json` of a task holds."""

    name: str
    rows: int
    passages: int
    hash: str  # of rows and passages in order
    source_key: str  # changes when the source files or the settings that read them change
    info: TaskInfo
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> count
    counts: dict[str, int] = field(default_factory=dict)  # further counts: duplicates dropped, dev rows, …
    test_queries: int = 0
    dev_queries: int = 0
    negatives: dict[str, Any] = field(default_factory=dict)  # of the last mining: key, method, hash, mean per row
    tests_hash: str = ""  # of the test and the dev split
    clean: dict[str, Any] = field(default_factory=dict)  # of the last cleaning: key, version, what ingest had written

    @property
    def ingested_hash(self) -> str:
        """The hash of rows and passages as ingest wrote them."""
        return str(self.clean.get("ingested_hash", self.hash))

    @property
    def ingested_rows(self) -> int:
        return int(self.clean.get("ingested_rows", self.rows))

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> TaskManifest:
        return cls(**{**raw, "info": TaskInfo(**raw["info"])})


class Collection:
    """One task, opened for reading. Cheap to make; the Lance datasets open at first use."""

    def __init__(self, folder: Path, version: int | None = None) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self._version = version

    def at_version(self, version: int) -> Collection:
        """Return the same task with its rows as of a Lance version: what a plan was made for stays what it reads."""
        return Collection(self.folder, version)

    @cached_property
    def manifest(self) -> TaskManifest:
        return TaskManifest.parse(json.loads((self.folder / "manifest.json").read_text(encoding="utf-8")))

    @cached_property
    def rows(self) -> Any:
        """The `lance.LanceDataset` of rows, at the version that the manifest knows: work cut short is not seen."""
        import lance

        version = self._version or self.manifest.negatives.get("version") or self.manifest.clean.get("version", 1)
        return lance.dataset(str(self.folder / "rows.lance"), version=version)

    @cached_property
    def passages(self) -> Any:
        """The `lance.LanceDataset` of passages."""
        import lance

        return lance.dataset(str(self.folder / "passages.lance"))

    def __len__(self) -> int:
        return self.manifest.rows

    def take_rows(self, indices: Sequence[int], columns: list[str] | None = None) -> pa.Table:
        """Return the rows at `indices`, in that order, repeats allowed."""
        return _take(self.rows, indices, columns)

    def take_texts(self, indices: Sequence[int]) -> list[str]:
        """Return the full text (title and text) of the passages at `indices`, in that order, repeats allowed."""
        table = _take(self.passages, indices, ["title", "text"])
        titles, texts = table["title"].to_pylist(), table["text"].to_pylist()
        return [f"{title} {text}" if title else text for title, text in zip(titles, texts, strict=True)]

    def test(self, split: str = "test") -> RetrievalTest | None:
        """Return the held-out test (`split` "test" or "dev"), its corpus read when it is gone through, or None where the task has none."""
        folder = self.folder / split
        return open_test(folder, split) if (folder / "qrels").is_dir() else None


def _take(dataset: Any, indices: Sequence[int], columns: list[str] | None) -> pa.Table:
    """Lance `take` in the order asked for: each distinct row is read once, then spread."""
    distinct = sorted(set(indices))
    table = dataset.take(distinct, columns=columns)
    place = {row: at for at, row in enumerate(distinct)}
    return table.take(pa.array([place[i] for i in indices], pa.int64()))


class CollectionStore:
    """All tasks under one folder, in name order."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def names(self) -> list[str]:
        """Names of the tasks that are complete (have a manifest), sorted."""
        if not self.root.is_dir():
            return []
        return sorted(p.parent.name for p in self.root.glob("*/manifest.json"))

    def __getitem__(self, name: str) -> Collection:
        if name not in self.names():
            raise DataError(f"No task {name!r} in the store {self.root}.{nearest(name, self.names())}")
        return Collection(self.root / name)

    def collections(self) -> list[Collection]:
        """All tasks; raises DataError when there is none."""
        names = self.names()
        if not names:
            raise DataError(
                f"The collection store {self.root} holds no task. Run `tdro ingest` first, or set data.store."
            )
        return [Collection(self.root / name) for name in names]


def write_beir(folder: Path, test: RetrievalTest, split: str = "test", corpus: Iterable[Passage] | None = None) -> None:
    """Write a test in BEIR layout, corpus (as given, else the test's) and queries gzipped with a fixed time stamp."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write_jsonl_gz(
        folder / "corpus.jsonl.gz",
        ({"_id": p.docid, "title": p.title, "text": p.text} for p in (test.corpus if corpus is None else corpus)),
    )
    _write_jsonl_gz(folder / "queries.jsonl.gz", ({"_id": q, "text": t} for q, t in test.queries.items()))
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"{q}\t{d}\t{score}" for q, judged in test.qrels.items() for d, score in judged.items()]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_jsonl_gz(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=3, fileobj=raw, mtime=0) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
