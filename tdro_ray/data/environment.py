"""The installed Python environment as a source of retrieval tasks: real text that every machine has.

Samples files (`environment_files`), has them parsed into records (`environment_parse`, through a map that the
caller may run in parallel), adds package metadata (`environment_metadata`), and turns the records of each task into
training rows and a held-out test. Knows nothing of Ray, stores or models.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_ray.config import EnvironmentSettings
from tdro_ray.data.environment_files import (
    WELL_KNOWN,
    chunk_files,
    environment_roots,
    held_out,
    sample_files,
    stable_hash,
)
from tdro_ray.data.environment_metadata import c_function_records, installed, readme_records, topic_records
from tdro_ray.data.environment_pairs import override_pairs, parameter_pairs
from tdro_ray.data.environment_parse import parse_files
from tdro_ray.data.environment_source import Record
from tdro_ray.data.environment_texts import normalise
from tdro_ray.errors import DataError
from tdro_ray.types import Passage, RetrievalTest, Row, TaskData, TaskInfo

VERSION = 1  # raise it when the same environment gives other tasks
KNOWN_SHARE = 0.6  # at most this share of a task's rows comes from the well-known modules
MAX_POSITIVES = 3  # a query with more right answers than this is too vague to keep
SMALL_CORPUS = 300  # a smaller test corpus is filled up with passages that are training positives

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")

MapFn = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


def _info(description: str, query_prompt: str, symmetric: bool = False) -> TaskInfo:
    return TaskInfo(
        description=description,
        symmetric=symmetric,
        language="en",
        query_prompt=query_prompt,
        source="the installed Python environment",
        licence="each text under the licence of the installed package that it comes from; standard library: PSF-2.0",
    )


TASKS: dict[str, TaskInfo] = {
    "py_comment_code": _info(
        "comment -> the lines of code below it",
        "Given a code comment, retrieve the lines of code that it explains",
    ),
    "py_docstring_source": _info(
        "first paragraph of a docstring -> source of the function without its docstring",
        "Given a description of what a function does, retrieve the source code of that function",
    ),
    "py_exception_source": _info(
        "exception with message -> source of the function that raises it",
        "Given an error message, retrieve the source code of the function that raises it",
    ),
    "py_language_reference": _info(
        "heading or definition in the Python language reference -> its text",
        "Given a topic of the Python language, retrieve the text of the language reference about it",
    ),
    "py_module_names": _info(
        "summary of a module -> its public functions and classes",
        "Given a description of a Python module, retrieve the names of the functions and classes that it defines",
    ),
    "py_option_help": _info(
        "command-line option with the module that defines it -> its help text",
        "Given a command-line option, retrieve its help text",
    ),
    "py_parameter_description": _info(
        "parameter of a function or class -> its description",
        "Given a parameter of a function, retrieve the description of that parameter",
    ),
    "py_paraphrases": _info(
        "description of a method or parameter <-> another description of the same",
        "Given a description of a method or a parameter, retrieve another description of the same thing",
        symmetric=True,
    ),
    "py_readme_section": _info(
        "package with a heading of its README -> the section",
        "Given a package and a heading of its documentation, retrieve the section under that heading",
    ),
    "py_signature_docstring": _info(
        "signature of a function or class -> its docstring",
        "Given the signature of a function or class, retrieve its documentation",
    ),
}


@dataclass(frozen=True, slots=True)
class Example:
    """A query with its right answers, on one side of the split."""

    id: str
    query: str
    positives: tuple[Passage, ...]
    known: bool  # of a well-known module
    held_out: bool


def environment_key(settings: EnvironmentSettings) -> str:
    """Return a fingerprint of what `environment_tasks` depends on: Python, installed distributions, settings, VERSION."""
    distributions = [(d.name, d.version) for d in installed(environment_roots())]
    python = [platform.python_implementation(), platform.python_version(), sys.platform]
    facts = [VERSION, python, distributions, settings.model_dump()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def environment_tasks(
    settings: EnvironmentSettings, map_fn: MapFn = map, roots: Sequence[Path] | None = None
) -> list[TaskData]:
    """Return the tasks of the installed environment by name, the same for a given environment.

    `map_fn(parse_files, chunks)` carries the parsing: `map`, the map of a process pool, or one over Ray Data. It may
    return the results in any order. With `roots` only the files and package metadata under these folders are read.
    Raises DataError when no task has a row.
    """
    folders = environment_roots() if roots is None else list(roots)
    chunks = chunk_files(sample_files(settings.max_files, folders))
    records: dict[str, list[Record]] = defaultdict(list)
    for part in map_fn(parse_files, chunks):
        for record in part:
            records[record.task].append(record)
    others = [*readme_records(folders), *(() if roots is not None else (*topic_records(), *c_function_records()))]
    for record in others:
        records[record.task].append(record)
    records["py_paraphrases"] = [
        *override_pairs(records["methods"]),
        *parameter_pairs(records["py_parameter_description"]),
    ]
    tasks = [build_task(name, info, records[name], settings) for name, info in sorted(TASKS.items())]
    tasks = [task for task in tasks if task.rows]
    if not tasks:
        raise DataError(
            f"No retrieval task could be made from the Python files under {', '.join(map(str, folders))}: no documented "
            f"source was found there. Raise data.environment.max_files (now {settings.max_files}), install the packages "
            f"with their .py files, or set other data.sources."
        )
    return tasks


def build_task(name: str, info: TaskInfo, records: Iterable[Record], settings: EnvironmentSettings) -> TaskData:
    """Return the task with at most `max_rows` rows and `test_queries` test queries, the rest of the held-out side as distractors."""
    examples = distinct_examples(records, info.symmetric)
    test = [e for e in examples if e.held_out]
    train = [e for e in examples if not e.held_out]
    known = [e for e in train if e.known][: max(1, int(settings.max_rows * KNOWN_SHARE))]
    chosen = [*known, *(e for e in train if not e.known)][: settings.max_rows]
    ids = {e.id for e in chosen}
    spare = [e for e in train if e.id not in ids]
    rows = tuple(Row(e.id, e.query, e.positives) for e in sorted(chosen, key=lambda e: e.id))
    asked, rest = test[: settings.test_queries], test[settings.test_queries :]
    return TaskData(name, info, rows, _test(asked, [*rest, *spare], chosen, settings.test_corpus) if asked else None)


def _test(asked: list[Example], distractors: list[Example], train: list[Example], size: int) -> RetrievalTest:
    # A query's id must differ from its passage's: evaluation never counts a document with the query's own id.
    corpus = [p for e in asked for p in e.positives]
    corpus += [p for e in distractors for p in e.positives][: max(0, size - len(corpus))]
    corpus += [p for e in train for p in e.positives][: max(0, min(size, SMALL_CORPUS) - len(corpus))]
    return RetrievalTest(
        corpus=tuple(sorted(corpus, key=lambda p: p.docid)),
        queries={f"q:{e.id}": e.query for e in asked},
        qrels={f"q:{e.id}": {p.docid: 1 for p in e.positives} for e in asked},
    )


def distinct_examples(records: Iterable[Record], symmetric: bool) -> list[Example]:
    """Return examples in a fixed pseudo-random order, no normalised passage and no normalised query twice.

    A passage that comes again is dropped with its query. Queries of equal text become one example with several
    positives, or are dropped where they are too many or on both sides of the split. In a symmetric task no text
    comes again on either side of a pair.
    """
    ordered = sorted(records, key=lambda r: (not _known(r), stable_hash(f"{r.task} {r.id}"), r.id))
    seen: set[str] = set()
    same_query: dict[str, list[Record]] = defaultdict(list)
    for record in map(_clean, ordered):
        query, passage = normalise(record.query), normalise(record.passage)
        if not query or not passage or passage in seen or (symmetric and (query in seen or query == passage)):
            continue
        seen |= {passage, query} if symmetric else {passage}
        same_query[query].append(record)
    return [
        _example(same)
        for same in same_query.values()
        if len(same) <= MAX_POSITIVES and len({held_out(r.group) for r in same}) == 1
    ]


def _example(same: list[Record]) -> Example:
    first = same[0]
    positives = tuple(Passage(r.docid or r.id, r.passage) for r in same)
    return Example(first.id, first.query, positives, _known(first), held_out(first.group))


def _known(record: Record) -> bool:
    """Return whether a record is of a public name in a well-known module."""
    top, *rest = [part for part in record.id.replace(":", ".").split(".") if part]
    return top in WELL_KNOWN and not any(part.startswith("_") for part in rest)


def _clean(record: Record) -> Record:
    """Return the record without control characters and lone surrogates, which docstrings can hold as escapes."""
    return record._replace(query=_printable(record.query), passage=_printable(record.passage))


def _printable(text: str) -> str:
    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub("", text)
