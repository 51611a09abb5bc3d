"""Vectors of texts seen before: bounded by bytes, least recently used out first. Knows neither the model nor HTTP.

Not locked: the engine uses it from its event loop alone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

ENTRY_BYTES = 320  # of an entry beside its vector: key, tuple, array header, the table's share


class VectorCache:
    """Digest -> (vector, tokens). `max_bytes` 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._entries: OrderedDict[bytes, tuple[np.ndarray, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> tuple[np.ndarray, int] | None:
        """Return the vector and the token count kept under a key, or None; counts a hit or a miss."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, vector: np.ndarray, tokens: int) -> None:
        """Keep a vector, and drop the ones not asked for longest while there are too many bytes."""
        if key in self._entries or vector.nbytes + ENTRY_BYTES > self.max_bytes:
            return
        self._entries[key] = (vector.copy(), tokens)  # a row of a batch would keep the whole batch
        self.bytes += vector.nbytes + ENTRY_BYTES
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1][0].nbytes + ENTRY_BYTES


def text_key(text: str, *settings: str) -> bytes:
    """Return the digest of a text and all that its vector depends on: the model's hash, kind, task, truncation."""
    head = "".join(f"{len(part)}:{part}" for part in settings)  # lengths, so that no two lists of parts read the same
    return hashlib.blake2b((head + "\0" + text).encode(), digest_size=20).digest()
