"""Writes one task of the collection store from a stream of parsed rows. Knows nothing of Ray.

Everything goes into `<store>/.tmp-<task>-<pid>`, the manifest last, and the folder is renamed into place: a killed
ingest leaves no half task. Memory holds 16-byte keys of passages and rows, never their texts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdro_ray.config import PolicySettings
from tdro_ray.data.collection import PASSAGE_SCHEMA, ROW_SCHEMA, TaskManifest, write_beir
from tdro_ray.data.dedup import passage_key, text_key
from tdro_ray.data.formats import UNREADABLE, Reject
from tdro_ray.data.parsed import KEY
from tdro_ray.data.publish import publish
from tdro_ray.data.split import dev_rows, dev_test
from tdro_ray.errors import DataError
from tdro_ray.types import Passage, RetrievalTest, TaskInfo

_STAGED_SCHEMA = pa.schema([*ROW_SCHEMA, pa.field("query_key", KEY), pa.field("content_key", KEY)])
POLICY_TEXTS = {
    "duplicated_id": "an earlier row has this id",
    "docid_with_two_texts": "one of its docids stood for another text before",
    "positive_in_negatives": "a positive is among its negatives",
    "query_is_passage": "the query is its own positive passage",
}
FLUSH_BYTES = 64 << 20  # of passages per append to Lance


@dataclass(frozen=True)
class WriteSettings:
    """What the writer must know of the recipe."""

    max_reject_share: float
    dev_queries: int
    dev_corpus: int
    policies: PolicySettings = field(default_factory=PolicySettings)


class TaskWriter:
    """Takes parsed tables in source order, then `finish` makes the task appear in the store."""

    def __init__(
        self,
        store: Path,
        name: str,
        info: TaskInfo,
        source_key: str,
        test: RetrievalTest | None,
        settings: WriteSettings,
    ) -> None:
        self.store, self.name, self.info, self.source_key, self.settings = store, name, info, source_key, settings
        self.folder = store / f".tmp-{name}-{os.getpid()}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.test = test
        self.test_query_keys = {text_key(q) for q in test.queries.values()} if test else set()
        self.numbers: dict[bytes, int] = {}  # passage key -> number, in order of first use
        self.seen: set[bytes] = set()
        self.kept = 0  # rows
        self.ids: set[str] = set()  # of rows, kept only where the policy asks for it, as are the texts of docids
        self.text_of: dict[str, bytes] = {}  # docid -> passage key
        self.counts: Counter[str] = Counter(lines=0, duplicates=0, decontaminated=0, self_negatives=0)
        self.rejects: Counter[str] = Counter()
        self.first_rejects: list[str] = []
        self._passages: list[pa.Table] = []
        self._staged_path = self.folder / "rows.arrow"
        self._staged = pa.ipc.new_file(str(self._staged_path), _STAGED_SCHEMA)
        self._rejects_path = self.folder / "rejects.jsonl"
        self._rejects_file = self._rejects_path.open("w", encoding="utf-8")

    # Taking rows

    def add(self, table: pa.Table) -> None:
        """Take the next parsed rows."""
        self.counts["lines"] += table.num_rows
        refused = pc.is_valid(table["reject"])
        for line in table["reject"].filter(refused).to_pylist():
            self._reject(Reject(*json.loads(line)))
        table = table.filter(pc.invert(refused))
        table = table.filter(pa.array(self._wanted(table), pa.bool_()))
        if self.settings.policies != PolicySettings():
            table = table.filter(pa.array([self._allowed(row) for row in table.to_pylist()], pa.bool_()))
        if not table.num_rows:
            return
        self.kept += table.num_rows
        self.counts["self_negatives"] += pc.sum(table["self_negatives"]).as_py()
        lists = table["passages"].combine_chunks()
        numbers = self._number(lists.flatten())
        positives, negatives = _split(
            numbers, pc.list_value_length(lists).to_numpy(), table["num_positives"].to_numpy()
        )
        if scored := table.num_rows - table["scores"].null_count:
            self.counts["scored"] += scored
        given, keys = [table["id"], table["query"]], [table["query_key"], table["content_key"]]
        columns = [*given, positives, negatives, table["scores"], *keys]
        self._staged.write_table(pa.table(columns, schema=_STAGED_SCHEMA))

    def _reject(self, reject: Reject) -> None:
        if reject.reason == UNREADABLE:
            raise DataError(f"Task {self.name!r}: {reject.detail}")
        self.rejects[reject.reason] += 1
        if len(self.first_rejects) < 3:
            self.first_rejects.append(
                f"{reject.file}:{reject.line}: {reject.reason}" + (f" ({reject.detail})" if reject.detail else "")
            )
        self._rejects_file.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")

    def _wanted(self, table: pa.Table) -> list[bool]:
        """Which rows stay: not seen before, and not a test query."""
        wanted = []
        for query, row in zip(table["query_key"].to_pylist(), table["row_key"].to_pylist()):
            if query in self.test_query_keys:
                self.counts["decontaminated"] += 1
            elif row in self.seen:
                self.counts["duplicates"] += 1
            else:
                self.seen.add(row)
                wanted.append(True)
                continue
            wanted.append(False)
        return wanted

    def _allowed(self, row: dict[str, Any]) -> bool:
        """Apply the policies to a row that would stay; count what they drop. Raises DataError under `fail`."""
        policies, row_id, passages = self.settings.policies, row["id"], row["passages"]
        positives = [Passage(p["docid"], p["text"], p["title"] or "") for p in passages[: row["num_positives"]]]
        found = {
            "query_is_passage": any(text_key(p.full_text) == row["query_key"] for p in positives),
            "positive_in_negatives": row["self_negatives"] > 0,
        }
        if policies.duplicated_id != "keep":
            found["duplicated_id"] = row_id in self.ids
            self.ids.add(row_id)
        if policies.docid_with_two_texts != "keep":
            named = [p for p in passages if p["docid"]]
            found["docid_with_two_texts"] = any(self.text_of.get(p["docid"], p["key"]) != p["key"] for p in named)
        for name in (name for name, is_so in found.items() if is_so):
            if getattr(policies, name) == "fail":
                raise DataError(
                    f"Task {self.name!r}, row {row_id!r}: {POLICY_TEXTS[name]}. Mend the source, or set data.policies.{name}=drop."
                )
            if name != "positive_in_negatives" and getattr(policies, name) == "drop":
                self.counts[name] += 1
                return False
        if policies.docid_with_two_texts != "keep":
            self.text_of.update((p["docid"], p["key"]) for p in named)
        return True

    def _number(self, passages: pa.StructArray) -> np.ndarray:
        """Number the passages, new ones in order of first use, and keep the new ones for writing."""
        numbers, fresh = [], []
        for at, key in enumerate(passages.field("key").to_pylist()):
            number = self.numbers.get(key)
            if number is None:
                number = self.numbers[key] = len(self.numbers)
                fresh.append(at)
            numbers.append(number)
        if fresh:
            taken = passages.take(pa.array(fresh))
            self._passages.append(pa.table([taken.field(name) for name in PASSAGE_SCHEMA.names], schema=PASSAGE_SCHEMA))
            if sum(t.nbytes for t in self._passages) > FLUSH_BYTES:
                self._flush()
        return np.asarray(numbers, np.int64)

    def _flush(self) -> None:
        import lance

        if not self._passages:  # the last of them filled the bytes of a flush
            return
        path = self.folder / "passages.lance"
        lance.write_dataset(pa.concat_tables(self._passages), str(path), mode="append" if path.exists() else "create")
        self._passages = []

    # Finishing

    def finish(self) -> TaskManifest:
        """Write rows, splits and manifest and rename the folder into the store; return the manifest.

        Raises DataError, leaving the store as it was, when no row is left or too many lines were refused.
        """
        self._staged.close()
        self._rejects_file.close()
        self._check_rejects()
        if not self.kept:
            self.abandon()
            raise DataError(self._empty_message())
        self._flush()
        staged = pa.ipc.open_file(pa.memory_map(str(self._staged_path))).read_all()
        dev = dev_rows(staged, list(self.numbers), self.settings.dev_queries)
        is_dev = np.isin(np.arange(staged.num_rows), dev)
        test_key, dev_key = self._write_tests(staged.filter(pa.array(is_dev)))
        content = self._write_rows(staged, ~is_dev)
        manifest = TaskManifest(
            name=self.name,
            rows=int((~is_dev).sum()),
            passages=len(self.numbers),
            hash=content,
            source_key=self.source_key,
            info=self.info,
            rejects=dict(sorted(self.rejects.items())),
            counts={**self.counts, "dev_rows": len(dev)},
            test_queries=len(self.test.queries) if self.test else 0,
            dev_queries=len(dev),
            tests_hash=blake2b((test_key + dev_key).encode(), digest_size=16).hexdigest(),
        )
        del staged
        self._staged_path.unlink()
        return publish(self.store, self.folder, manifest)

    def abandon(self) -> None:
        """Remove what was written; the store stays as it was."""
        self._staged.close()
        self._rejects_file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_rejects(self) -> None:
        refused, lines = self.rejects.total(), self.counts["lines"]
        if refused <= self.settings.max_reject_share * lines:
            return
        kept = self.store / f"{self.name}.rejects.jsonl"
        self._rejects_path.replace(kept)
        self.abandon()
        raise DataError(
            f"Task {self.name!r}: {refused} of {lines} input lines were refused ({refused / lines:.2%}; data.max_reject_share allows "
            f"{self.settings.max_reject_share:.2%}). First: {'; '.join(self.first_rejects)}. All are listed in {kept}. "
            f"Mend the file, or allow more with --set data.max_reject_share={min(1.0, np.ceil(refused / lines * 1000) / 1000):g}."
        )

    def _empty_message(self) -> str:
        left_out = ", ".join(f"{count} {what}" for what, count in self.counts.items() if count) or "no input line"
        return f"Task {self.name!r} has no training row left ({left_out}). Its files must hold at least one usable row."

    def _write_rows(self, staged: pa.Table, keep: np.ndarray) -> str:
        """Write rows.lance in source order; return the hash of rows and passages in order."""
        import lance

        rows = staged.filter(pa.array(keep))
        lance.write_dataset(
            rows.select(ROW_SCHEMA.names).to_reader(), str(self.folder / "rows.lance"), schema=ROW_SCHEMA
        )
        hasher = blake2b(digest_size=16)
        for chunk in rows["content_key"].chunks:
            hasher.update(b"".join(chunk.to_pylist()))
        hasher.update(b"|" + b"".join(self.numbers))
        return hasher.hexdigest()

    def _write_tests(self, dev: pa.Table) -> tuple[str, str]:
        """Write the test as it came and the dev split; return their keys."""
        keys = []
        passages, most = self.folder / "passages.lance", self.settings.dev_corpus
        for split, test in (("test", self.test), ("dev", dev_test(passages, dev, list(self.numbers), most))):
            keys.append("" if test is None else _write_test(self.folder / split, test, split))
        return keys[0], keys[1]


def _split(numbers: np.ndarray, lengths: np.ndarray, num_positives: np.ndarray) -> tuple[pa.ListArray, pa.ListArray]:
    """Cut the flat numbers of all rows into lists of positives and lists of negatives."""
    ends = np.cumsum(lengths)
    place = np.arange(len(numbers)) - np.repeat(ends - lengths, lengths)
    positive = place < np.repeat(num_positives, lengths)
    return _lists(numbers[positive], num_positives), _lists(numbers[~positive], lengths - num_positives)


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int64()))


def _write_test(folder: Path, test: RetrievalTest, split: str) -> str:
    """Write a test and return its key; its corpus passes by once."""
    hasher = blake2b(digest_size=16)

    def passing() -> Iterator[Passage]:
        for passage in test.corpus:
            hasher.update(passage.docid.encode() + b"\0" + passage_key(passage.title, passage.text))
            yield passage

    write_beir(folder, test, split, passing())
    hasher.update(json.dumps([test.queries, test.qrels]).encode())
    return hasher.hexdigest()
