"""When two texts are the same: normalisation and 16-byte keys. Knows nothing of Ray, files or torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

KEY_BYTES = 16  # two different texts meet once in 2**64 texts


def normalise(text: str) -> str:
    """Return `text` as duplicates are compared: NFKC, case folded, white space collapsed."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> bytes:
    """Return the key of a text: equal for texts that are equal after `normalise`."""
    return _key(normalise(text).encode("utf-8", "surrogatepass"))


def passage_key(title: str, text: str) -> bytes:
    """Return the key of a passage: equal where title and text are equal, character by character."""
    return _key(title.encode("utf-8", "surrogatepass") + b"\0" + text.encode("utf-8", "surrogatepass"))


def row_key(query_key: bytes, positive_keys: Iterable[bytes]) -> bytes:
    """Return the key of a training row: the same normalised query with the same set of positives."""
    return _key(query_key + b"".join(sorted(set(positive_keys))))


def _key(data: bytes) -> bytes:
    return blake2b(data, digest_size=KEY_BYTES).digest()
