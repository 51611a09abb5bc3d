"""Which training rows become the dev split. Knows nothing of Ray or of the store."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdro_ray.data.dedup import KEY_BYTES


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
