"""Sequences grouped by length under a token budget. Pure numpy.

S sequences, each of a length in tokens; a chunk is padded to its longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
CPU_CHUNK_TOKENS = 512  # activations of more leave a core's cache: a step of MiniLM took 1.5 times as long at 4,096
CPU_ENCODE_TOKENS = 2048  # of a forward without a backward: 1.5 times as fast as 16,384
CPU_GRAPH_BYTES = 2 << 30  # of a kept graph; without it a second forward: MiniLM's step takes 1.5 times as long


def chunk_tokens(token_budget: int, device: str) -> int:
    """Return how many padded tokens a chunk may hold on a device of that type ("cpu", "cuda")."""
    return min(token_budget, CPU_CHUNK_TOKENS) if device == "cpu" else token_budget


def graph_tokens(token_budget: int, device: str, bytes_per_token: int) -> int:
    """Return of how many padded tokens the graph may be kept, `bytes_per_token` being what one token's takes."""
    return min(token_budget, CPU_GRAPH_BYTES // max(1, bytes_per_token)) if device == "cpu" else token_budget


def length_chunks(length_S: npt.ArrayLike, token_budget: int, packed: bool = False) -> list[Ints]:
    """Return index arrays that cover all sequences once, longest first, each padding to at most `token_budget` tokens.

    A sequence longer than the budget gets a chunk of its own. `packed` sequences are not padded: their tokens are summed.
    """
    length_S = np.asarray(length_S, np.int64)
    order = np.argsort(-length_S, kind="stable")
    ends = np.cumsum(length_S[order])
    chunks, start = [], 0
    while start < len(order):
        if packed:
            before = ends[start] - length_S[order[start]]
            count = max(1, int(np.searchsorted(ends, before + token_budget, side="right")) - start)
        else:
            count = max(1, token_budget // max(1, int(length_S[order[start]])))
        chunks.append(order[start : start + count])
        start += count
    return chunks


def embed_in_chunks(
    sequences: Sequence[Sequence[int]],
    dim: int,
    token_budget: int,
    run: Callable[[npt.NDArray[np.int32], Ints, Ints, Ints], npt.NDArray[np.float32]],
) -> npt.NDArray[np.float32]:
    """Return the vectors (S, dim) of token id sequences, float32, run by length in chunks of `token_budget`.

    `run(flat, offset_S, length_S, chunk)` takes what `pad_rows` takes and returns the chunk's vectors.
    """
    length_S = np.array([len(s) for s in sequences], np.int64)
    out_SD = np.empty((len(sequences), dim), np.float32)
    if len(sequences):
        flat = np.concatenate([np.asarray(s, np.int32) for s in sequences])
        offset_S = np.cumsum(length_S) - length_S
        for chunk in length_chunks(length_S, token_budget):
            out_SD[chunk] = run(flat, offset_S, length_S, chunk)
    return out_SD


def padded_tokens(length_S: npt.ArrayLike, chunks: list[Ints], packed: bool = False) -> int:
    """Return how many tokens, padding included where the chunks are not `packed`, they hold."""
    length_S = np.asarray(length_S, np.int64)
    if packed:
        return int(sum(length_S[c].sum() for c in chunks))
    return int(sum(length_S[c].max() * len(c) for c in chunks if len(c)))


def pad_rows(
    flat: npt.NDArray[np.int32], offset_S: Ints, length_S: Ints, chunk: Ints, pad_id: int
) -> npt.NDArray[np.int64]:
    """Return the (len(chunk), longest) token ids of a chunk, padded on the right, from the flattened batch.

    Sequence i occupies ``flat[offset_S[i] : offset_S[i] + length_S[i]]``.
    """
    width = int(length_S[chunk].max())
    ids = np.full((len(chunk), width), pad_id, np.int64)
    keep = np.arange(width) < length_S[chunk, None]
    ids[keep] = flat[(offset_S[chunk, None] + np.arange(width))[keep]]
    return ids
