"""How many rows a source has, and how long its texts are, from a look at a small part of it. Knows no Ray, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tdro_ray.config import ModelSettings
from tdro_ray.data.collection import Collection
from tdro_ray.data.hub import HubDataset
from tdro_ray.data.layouts import judgements
from tdro_ray.data.place import Place, decompressed, open_anywhere, stamp
from tdro_ray.data.sources import TaskSource

LOOK_BYTES = 1 << 20  # of text read of a file of lines; a longer file's rows follow from its size
SAMPLE_ROWS = 32  # of a task
SAMPLE_TASKS = 16
CHARACTERS_PER_TOKEN = 4.0  # where the tokenizer is not there yet: English prose under a 30,000-word vocabulary


def count_rows(task: TaskSource) -> tuple[int, bool]:
    """Return (rows before ingest drops any, whether they were counted rather than estimated)."""
    counts = [_rows_of(path) for path, _ in task.files]
    return sum(n for n, _ in counts), all(exact for _, exact in counts)


def _rows_of(path: Place | HubDataset) -> tuple[int, bool]:
    if isinstance(path, HubDataset):
        rows = path.rows()
        return rows or 0, rows is not None
    if path.is_dir():  # a row per query; judgements are counted instead
        return max(0, _lines(judgements(path, "train")[0])[0] - 1), False
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with open_anywhere(path) as file:
            return pq.ParquetFile(file).metadata.num_rows, True
    return _lines(path)


def _lines(path: Place) -> tuple[int, bool]:
    """Lines of a text file: counted where it ends within LOOK_BYTES, else by the share of its bytes that these took."""
    with path.open("rb") as raw:
        try:
            stream = decompressed(path, raw)  # held: one that is dropped closes `raw`
            head = stream.read(LOOK_BYTES)
        except (OSError, EOFError):  # damaged: ingest will say so
            return 0, False
        used = raw.tell() if path.suffix in (".gz", ".zst") else len(head)
    lines = head.count(b"\n") + (not head.endswith(b"\n") and bool(head))
    if len(head) < LOOK_BYTES:
        return lines, True
    return round(lines * stamp(path)[1] / max(1, used)), False


def sample_tokens(tasks: Sequence[Collection], model: ModelSettings, base: Path) -> tuple[float, float]:
    """Return mean tokens of (a query, a passage) over a sample of every task, cut at the model's lengths.

    Counted by the tokenizer of the model folder `base` where it is there, else from characters.
    """
    tokenizer = None
    if (base / "tdro.json").exists():
        from tdro_ray.model.tokenize import TextTokenizer

        tokenizer = TextTokenizer(base)
    queries: list[float] = []
    passages: list[float] = []
    for task in tasks[:: max(1, len(tasks) // SAMPLE_TASKS)]:
        texts = task.take_rows(_spread(task.manifest.rows), ["query"])["query"].to_pylist()
        found = task.take_texts(_spread(task.manifest.passages))
        if tokenizer:
            queries.append(float(np.mean([len(s) for s in tokenizer.encode(texts, "query", task.name)])))
            passages.append(float(np.mean([len(s) for s in tokenizer.encode(found, "passage", task.name)])))
        else:
            info = task.manifest.info
            query_length, passage_length = info.lengths(model.query_length, model.passage_length)
            queries.append(_by_characters(texts, query_length, len(info.query_prompt) if model.instructions else 0))
            passages.append(_by_characters(found, passage_length))
    return float(np.mean(queries)), float(np.mean(passages))


def _spread(size: int) -> list[int]:
    return list(range(0, size, max(1, size // SAMPLE_ROWS)))[:SAMPLE_ROWS]


def _by_characters(texts: list[str], longest: int, prompt: int = 0) -> float:
    lengths = [min(longest, 1 + (len(text) + prompt) / CHARACTERS_PER_TOKEN) for text in texts]
    return float(np.mean(lengths))
