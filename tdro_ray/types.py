"""Plain records that rooms pass to each other. Knows nothing of Ray, torch or config."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["query", "passage"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One document. Two passages are equal when title and text are equal, whatever their docid."""

    docid: str
    text: str
    title: str = ""

    @property
    def full_text(self) -> str:
        """Title and text as the encoder reads them: joined by one space, the title first."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: a query with at least one positive and any number of given hard negatives."""

    id: str
    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    scores: tuple[float | None, ...] = ()  # a teacher's, of positives then negatives; () where it scored none


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a task is, beside its rows. Every field has a default that a folder of files alone can live with."""

    description: str = ""
    symmetric: bool = False  # query and passage are of one kind (duplicates, paraphrases, bitext)
    language: str = ""
    query_prompt: str = ""  # instruction put before a query, E5 style; on both sides of a symmetric task
    in_batch: bool = True  # other rows' passages are negatives in stages 0 and 2
    temperature: float | None = None  # overrides the run's tau for this task
    source: str = ""
    licence: str = ""
    query_length: int | None = None  # tokens of this task's queries, EOS included, where fewer than the model's
    passage_length: int | None = None  # tokens of this task's passages, likewise

    def lengths(self, query: int, passage: int) -> tuple[int, int]:
        """Return the most tokens of a query and of a passage under a model that reads `query` and `passage`."""
        return min(query, self.query_length or query), min(passage, self.passage_length or passage)


@dataclass(frozen=True, slots=True)
class RetrievalTest:
    """A held-out test in BEIR terms. `qrels[query_id][docid]` is the graded relevance (> 0 is relevant)."""

    corpus: Collection[Passage]  # gone through in order; a stored one is read anew each time
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class TaskData:
    """One whole task in memory, as the environment source makes it and the ingest writes it."""

    name: str
    info: TaskInfo
    rows: tuple[Row, ...]
    test: RetrievalTest | None = None


@dataclass(frozen=True, slots=True)
class RetrieverSpec:
    """How a model folder encodes text; stored as `tdro.json` beside the Hugging Face files."""

    pooling: Literal["last", "mean", "cls"] = "last"
    query_length: int = 128  # tokens, EOS included
    passage_length: int = 512  # tokens, EOS included
    append_eos: bool = True  # False where the tokenizer itself ends every text with a special token
    eos_token_id: int = 0
    pad_token_id: int = 0
    query_prompt: str = ""  # used when no task is named
    task_prompts: dict[str, str] = field(default_factory=dict)  # task -> query prompt
    symmetric_tasks: tuple[str, ...] = ()  # tasks whose prompt goes on passages too
    task_lengths: dict[str, tuple[int, int]] = field(default_factory=dict)  # task -> tokens of a query, of a passage

    def length(self, kind: Kind, task: str = "") -> int:
        """Return the most tokens of a text, EOS included; a task's own length never exceeds the model's."""
        query, passage = self.task_lengths.get(task, (self.query_length, self.passage_length))
        return min(query, self.query_length) if kind == "query" else min(passage, self.passage_length)
