"""Which training rows become the dev split, and the test that they make. Knows nothing of Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdro_ray.data.dedup import KEY_BYTES
from tdro_ray.types import Passage, RetrievalTest


def dev_rows(staged: pa.Table, passage_keys: list[bytes], wanted: int) -> np.ndarray:
    """Return the indices of rows to hold out: at most `wanted` and a tenth of all, by a hash of their first positive.

    Rows that share a positive or a normalised query are held out together or not at all, so that no dev positive and
    no dev query is a train one; groups that are larger than what is still wanted are passed over.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = staged.num_rows
    wanted = min(wanted, rows // 10)
    if not wanted:
        return np.empty(0, np.int64)
    lists = staged["positives"].combine_chunks()
    passages, lengths = lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy()
    queries = np.unique(np.asarray(staged["query_key"].to_pylist(), f"S{KEY_BYTES}"), return_inverse=True)[1]
    row_of = np.repeat(np.arange(rows), lengths)
    left = np.concatenate([row_of, np.arange(rows)])
    right = np.concatenate([rows + passages, rows + len(passage_keys) + queries])
    size = rows + len(passage_keys) + int(queries.max()) + 1
    groups = connected_components(
        coo_array((np.ones(len(left), np.int8), (left, right)), (size, size)), directed=False
    )[1][:rows]
    first = passages[np.cumsum(lengths) - lengths]
    order = np.argsort(np.asarray([passage_keys[p] for p in first], f"S{KEY_BYTES}"), kind="stable")
    sizes = np.bincount(groups)
    taken: set[int] = set()
    left_over = wanted
    for group in dict.fromkeys(groups[order].tolist()):
        if sizes[group] <= left_over:
            taken.add(group)
            left_over -= int(sizes[group])
        if not left_over:
            break
    return np.flatnonzero(np.isin(groups, list(taken)))


def dev_test(passages: Path, dev: pa.Table, passage_keys: list[bytes], most: int) -> RetrievalTest | None:
    """Return the test of the rows `dev`: their positives among at most `most` other passages, drawn by their keys."""
    if not dev.num_rows:
        return None
    import lance

    positives = dict.fromkeys(number for row in dev["positives"].to_pylist() for number in row)
    others = sorted((n for n in range(len(passage_keys)) if n not in positives), key=passage_keys.__getitem__)[:most]
    numbers = sorted([*positives, *others])
    taken = lance.dataset(str(passages)).take(numbers).to_pylist()
    corpus = tuple(Passage(str(n), p["text"], p["title"]) for n, p in zip(numbers, taken))
    queries = {f"dev{at}": query for at, query in enumerate(dev["query"].to_pylist())}
    qrels = {f"dev{at}": {str(n): 1 for n in row} for at, row in enumerate(dev["positives"].to_pylist())}
    return RetrievalTest(corpus, queries, qrels)
