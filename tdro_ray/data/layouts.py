"""Judged collections: queries, documents and judgements in the layouts of BEIR, MIRACL and Mr.TyDi, for tests and for training.

    BEIR      corpus.jsonl, queries.jsonl, qrels/<split>.tsv
    MIRACL    topics/topics.*-<split>.tsv, qrels/qrels.*-<split>.tsv, docs-*.jsonl
    Mr.TyDi   topic.<split>.tsv and qrels.<split>.txt, or <split>.jsonl of rows with docids; collection/docs.jsonl or corpus.jsonl

Each also `.gz` or `.zst`. The documents of MIRACL and Mr.TyDi may lie in the folder, in its `corpus/` or `collection/`, or
where their publishers' corpus repository was put beside it. A corpus is read whenever it is gone through, never held whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tdro_ray.data.place import Place, first_existing, open_stream, place
from tdro_ray.errors import DataError
from tdro_ray.types import Passage, RetrievalTest

SPLITS = ("train", "dev", "test")
_DOCS = re.compile(r"(docs|corpus)(-(\d+))?\.jsonl(\.gz|\.zst)?")


class Document(NamedTuple):
    """A record of a corpus, its texts not yet looked at."""

    docid: str
    title: Any
    text: Any
    at: str  # file and line


class Judgement(NamedTuple):
    line: int
    query: str
    document: str
    score: int


@dataclass(frozen=True)
class Layout:
    """How one kind of judged collection lies in its folder."""

    judged: Callable[[Place, str], Place | None]  # (folder, split) -> the file of its judgements
    judgements: Callable[[Place], Iterator[Judgement]]
    queries: Callable[[Place, str], Iterator[tuple[str, Any, str]]]  # (folder, split) -> id, text, file and line


# BEIR


def _beir_judged(folder: Place, split: str) -> Place | None:
    return first_existing(folder / "qrels", f"{split}.tsv")


def _beir_queries(folder: Place, split: str) -> Iterator[tuple[str, Any, str]]:
    path = first_existing(folder, "queries.jsonl")
    if path is None:
        raise DataError(
            f"{folder} has no queries.jsonl (or .gz, .zst); a BEIR folder needs corpus.jsonl, queries.jsonl and qrels/{split}.tsv."
        )
    for record, at in json_lines(path):
        yield _id_of(record, ("_id",), at), record.get("text"), at


def qrels_lines(path: Place) -> Iterator[Judgement]:
    """Yield the judgements of a qrels file: three columns (BEIR) or four (TREC), tabs or spaces, a header or none."""
    with open_stream(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.decode("utf-8", "replace")
            if not line.strip():
                continue
            parts = line.split("\t") if "\t" in line else line.split()
            if len(parts) == 4:
                parts = [parts[0], parts[2], parts[3]]
            is_number = parts[-1].strip().lstrip("-").isdigit()
            if number == 1 and not is_number:
                continue  # header
            if len(parts) != 3 or not is_number:
                raise DataError(
                    f"{path}:{number}: expected query-id, corpus-id and an integer relevance separated by tabs, got {line.rstrip()!r:.120}."
                )
            yield Judgement(number, parts[0].strip(), parts[1].strip(), int(parts[2]))


# MIRACL and Mr.TyDi


def _miracl_judged(folder: Place, split: str) -> Place | None:
    return _named(folder / "qrels", rf"qrels\..+-{split}\.tsv")


def _miracl_queries(folder: Place, split: str) -> Iterator[tuple[str, Any, str]]:
    return _topics(folder, _named(folder / "topics", rf"topics\..+-{split}\.tsv"), f"topics/topics.*-{split}.tsv")


def _mrtydi_judged(folder: Place, split: str) -> Place | None:
    if path := first_existing(folder, f"qrels.{split}.txt"):
        return path
    if split == "train" or not corpus_files(folder):  # train.jsonl has its texts, and is a training file like any other
        return None
    return first_existing(folder, f"{split}.jsonl")


def _mrtydi_judgements(path: Place) -> Iterator[Judgement]:
    if ".txt" in path.name:
        yield from qrels_lines(path)
        return
    for number, (record, at) in enumerate(json_lines(path), 1):
        query = _id_of(record, ("query_id", "_id", "id"), at)
        for role, score in (("positive_passages", 1), ("negative_passages", 0)):
            for passage in record.get(role) or []:
                yield Judgement(number, query, _id_of(passage, ("docid", "_id"), at), score)


def _mrtydi_queries(folder: Place, split: str) -> Iterator[tuple[str, Any, str]]:
    if first_existing(folder, f"qrels.{split}.txt"):
        yield from _topics(folder, first_existing(folder, f"topic.{split}.tsv"), f"topic.{split}.tsv")
        return
    path = first_existing(folder, f"{split}.jsonl")
    assert path is not None, "it has the judgements too"
    for record, at in json_lines(path):
        yield _id_of(record, ("query_id", "_id", "id"), at), record.get("query", record.get("text")), at


def _topics(folder: Place, path: Place | None, wanted: str) -> Iterator[tuple[str, Any, str]]:
    if path is None:
        raise DataError(f"{folder} has judgements but no {wanted} (or .gz, .zst) with their queries.")
    with open_stream(path) as file:
        for number, raw in enumerate(file, 1):
            identity, tab, text = raw.decode("utf-8", "replace").rstrip("\r\n").partition("\t")
            if not tab and identity.strip():
                raise DataError(
                    f"{path}:{number}: expected a query's id and text separated by a tab, got {identity!r:.120}."
                )
            if identity.strip():
                yield identity.strip(), text, f"{path}:{number}"


LAYOUTS = {
    "beir": Layout(_beir_judged, qrels_lines, _beir_queries),
    "miracl": Layout(_miracl_judged, qrels_lines, _miracl_queries),
    "mrtydi": Layout(_mrtydi_judged, _mrtydi_judgements, _mrtydi_queries),
}


# All layouts


def layout_of(folder: Place, split: str) -> str | None:
    """Return the name in `LAYOUTS` of a folder with judgements of this split, or None."""
    return next((name for name, layout in LAYOUTS.items() if layout.judged(folder, split)), None)


def test_split(folder: Place) -> str | None:
    """Return the split that tests are taken from: `test`, else `dev` (MIRACL publishes no judgements of its test), or None."""
    return next((split for split in ("test", "dev") if layout_of(folder, split)), None)


def judged_files(folder: Place, split: str) -> list[Place]:
    """Return the files that a split is read from, the documents among them."""
    layout = LAYOUTS[layout_of(folder, split) or "beir"]
    named = [layout.judged(folder, split), first_existing(folder, "queries.jsonl")]
    named += [first_existing(folder, f"topic.{split}.tsv"), _named(folder / "topics", rf"topics\..+-{split}\.tsv")]
    return [path for path in named if path is not None] + corpus_files(folder)


def judgements(folder: Place, split: str) -> tuple[Place, Iterator[Judgement]]:
    """Return the file of a split's judgements, and these. Raises DataError where there is none."""
    name = layout_of(folder, split)
    path = LAYOUTS[name].judged(folder, split) if name else None
    if name is None or path is None:
        raise DataError(
            f"{folder} has no qrels/{split}.tsv; a BEIR test needs corpus.jsonl, queries.jsonl and qrels/{split}.tsv. MIRACL and "
            f"Mr.TyDi folders are read as they are published."
        )
    return path, LAYOUTS[name].judgements(path)


def queries(folder: Place, split: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (id, text, file and line) of a split's queries, judged or not."""
    return LAYOUTS[layout_of(folder, split) or "beir"].queries(folder, split)


def documents(folder: Place) -> Iterator[Document]:
    """Yield the documents of a judged collection. Raises DataError where there are none, and for a line that is no document."""
    files = corpus_files(folder)
    if not files:
        raise DataError(
            f"{folder} has no corpus.jsonl (or .gz, .zst), nor docs-*.jsonl as MIRACL and Mr.TyDi have; a BEIR folder needs "
            f"corpus.jsonl, queries.jsonl and qrels/<split>.tsv."
        )
    for path in files:
        for record, at in json_lines(path):
            text = record["text"] if "text" in record else record.get("contents")
            yield Document(_id_of(record, ("_id", "docid", "id"), at), record.get("title"), text, at)


def corpus_files(folder: Place) -> list[Place]:
    """Return the files of a collection's documents, in the order of their numbers; [] where there are none."""
    places = [folder, folder / "corpus", folder / "collection"]
    name, above = folder.name, folder.parent
    if "-v1" in name and above.name:  # as the publishers' repositories lie beside each other
        corpus = name.replace("-v1", "-corpus-v1", 1)
        places += [
            above / corpus,
            *(above.parent / r / n for r in ("miracl-corpus", "mr-tydi-corpus") for n in (corpus, name)),
        ]
    for at in places:
        found = [(int(m[3] or 0), p) for p in _entries(at) if (m := _DOCS.fullmatch(p.name))]
        if found:
            return [path for _, path in sorted(found)]
    return []


def _named(folder: Place, pattern: str) -> Place | None:
    return next((p for p in sorted(_entries(folder)) if re.fullmatch(rf"{pattern}(\.gz|\.zst)?", p.name)), None)


def _entries(folder: Place) -> list[Place]:
    return list(folder.iterdir()) if folder.is_dir() else []


def json_lines(path: Place) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (record, file and line) of a file of JSON objects; raises DataError at the first line that is none."""
    with open_stream(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as err:
                raise DataError(f"{path}:{number}: not valid JSON: {err}") from err
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}.")
            yield record, f"{path}:{number}"


def _id_of(record: Any, keys: tuple[str, ...], at: str) -> str:
    value = (
        next((record[key] for key in keys if record.get(key) is not None), None) if isinstance(record, dict) else None
    )
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{at}: field {keys[0]!r} must be a string, got {value!r:.80}.")


# Tests


@dataclass(frozen=True)
class StoredCorpus:
    """The documents of a folder, in their order. Every pass reads them anew: a million of them take no memory."""

    folder: str  # path or URL

    def __iter__(self) -> Iterator[Passage]:
        for document in documents(place(self.folder)):
            yield Passage(document.docid, _text(document.text, document.at), document.title or "")

    def __len__(self) -> int:
        return self._length

    def __contains__(self, passage: object) -> bool:
        return any(passage == own for own in self)

    @cached_property
    def _length(self) -> int:
        return sum(bool(line.strip()) for path in corpus_files(place(self.folder)) for line in open_stream(path))


def open_test(folder: Place, split: str | None = None) -> RetrievalTest:
    """Return the test in a folder of any layout, its corpus unread. `split` None takes `test`, else `dev`.

    Only judged queries stay. Raises DataError that names the file and line of the first bad record, or the missing file.
    """
    texts, qrels = read_judged(folder, split)
    if not corpus_files(folder):
        next(documents(folder))  # says what is missing
    return RetrievalTest(StoredCorpus(str(folder)), texts, qrels)


def read_judged(folder: Place, split: str | None = None) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Return the judged queries of a collection and their judgements, without reading its corpus."""
    split = split or test_split(folder) or "test"
    path, lines = judgements(folder, split)
    texts = {identity: _text(text, at) for identity, text, at in queries(folder, split)}
    qrels: dict[str, dict[str, int]] = {}
    for _, query, document, score in lines:
        if query in texts:
            qrels.setdefault(query, {})[document] = score
    if not qrels:
        raise DataError(f"{path} judges none of the queries beside it in {folder}.")
    return {query: texts[query] for query in qrels}, qrels


def _text(value: Any, at: str) -> str:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{at}: field 'text' must be a string, got {value!r:.80}.")
