"""Which texts nearly repeat another: MinHash signatures (rensa), candidates by bands, exact similarity. Knows no Ray, no files.

Two texts are near duplicates where the Jaccard similarity of their sets of character trigrams is at least the
threshold: one letter of 60 changed gives 0.9, letters work in every script. Bands only propose pairs, the exact
similarity decides, so nothing is ever called a duplicate by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tdro_ray.data.dedup import normalise

SHINGLE = 3  # characters
BANDS, BAND_ROWS = 16, 8  # finds a pair of similarity 0.9 with probability 0.9999, of 0.8 with 0.95
SEED = 42
BUCKET = 32  # texts of one bucket that are compared all with all; the rest with the first ones
_ODD = np.random.default_rng(SEED).integers(1 << 63, size=BAND_ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def shingles(text: str) -> set[str]:
    """Return the character trigrams of the normalised text; a shorter text is its own only one."""
    text = normalise(text)
    return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} or {text}


def similarity(one: str, other: str) -> float:
    """Return the Jaccard similarity of the two texts' trigrams, 0 to 1."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def band_keys(texts: Sequence[str]) -> np.ndarray:
    """Return uint32 keys (texts, BANDS): two texts that share one are candidates."""
    if not texts:
        return np.zeros((0, BANDS), np.uint32)
    from rensa import RMinHash

    digests = RMinHash.digests_from_token_sets([sorted(shingles(t)) for t in texts], BANDS * BAND_ROWS, SEED)
    slots = np.asarray(digests, np.uint32).reshape(len(texts), BANDS, BAND_ROWS).astype(np.uint64)
    return ((slots * _ODD).sum(axis=2) >> np.uint64(32)).astype(np.uint32)  # multilinear hashing modulo 2**64


def candidates(keys_XB: np.ndarray) -> np.ndarray:
    """Return the pairs (P, 2) of texts that share a band, each once, the smaller number first."""
    count = np.int64(max(1, len(keys_XB)))
    seen = np.zeros(0, np.int64)  # a pair as one number: sorting rows of an array takes many times as long
    for key_X in keys_XB.T:
        order = np.argsort(key_X, kind="stable")
        edges = np.concatenate([[0], np.flatnonzero(np.diff(key_X[order])) + 1, [len(order)]])
        sizes = np.diff(edges)
        two = edges[:-1][sizes == 2]  # by far the most
        found = [np.stack([order[two], order[two + 1]], axis=1)]
        found += [_pairs(order[edges[at] : edges[at + 1]]) for at in np.flatnonzero(sizes > 2)]
        pairs = np.concatenate(found).astype(np.int64)
        seen = np.union1d(seen, pairs[:, 0] * count + pairs[:, 1])
    return np.stack([seen // count, seen % count], axis=1)


def _pairs(members: np.ndarray) -> np.ndarray:
    first = members[:BUCKET]
    left, right = np.triu_indices(len(first), 1)
    pairs = [np.stack([first[left], first[right]], axis=1)]
    if len(members) > BUCKET:
        rest = members[BUCKET:]
        pairs.append(np.stack([np.tile(first, len(rest)), np.repeat(rest, len(first))], axis=1))
    return np.concatenate(pairs)


@dataclass(frozen=True)
class Finding:
    """Why a row is one too many. `near` is the number of the text beside it, `similarity` of both queries."""

    task: str
    row: int
    reason: str  # contaminated, across_tasks, near_duplicates
    owner: tuple[str, int | str]  # of the other text: (task, row), or (test, query id)
    similarity: float


@dataclass
class Texts:
    """Distinct texts by number: which rows and which test queries have each, and which texts are near which."""

    rows: dict[str, np.ndarray]  # task -> text of each of its rows
    tests: Mapping[int, tuple[str, str]]  # text -> one (test, query id) that asks it
    near: dict[int, dict[int, float]] = field(default_factory=dict)  # text -> {near text: similarity}

    def link(self, pairs: Iterable[tuple[int, int, float]]) -> None:
        for one, other, how in pairs:
            self.near.setdefault(one, {})[other] = how
            self.near.setdefault(other, {})[one] = how


def findings(texts: Texts, drop: set[str]) -> list[Finding]:
    """Return every row that is contaminated, or repeats a row kept before it; `drop` names the reasons that drop a row.

    The smallest task goes first: of a text that two tasks have it keeps its row. Rows of one task with the same
    query are no near duplicates of each other: they are its several positives.
    """
    found: list[Finding] = []
    kept: dict[int, dict[str, int]] = {}  # text -> {task: first row kept}
    shared = _shared(texts.rows)
    for task in sorted(texts.rows, key=lambda name: (len(texts.rows[name]), name)):
        of_row = texts.rows[task]
        wanted = np.isin(of_row, np.fromiter({*texts.near, *texts.tests, *shared}, np.int64))
        for row in np.flatnonzero(wanted).tolist():
            text = int(of_row[row])
            own = list(_reasons(texts, kept, task, row, text))
            found += own
            if not drop.intersection(f.reason for f in own):
                kept.setdefault(text, {}).setdefault(task, row)
    return found


def _reasons(texts: Texts, kept: Mapping[int, Mapping[str, int]], task: str, row: int, text: int) -> Iterable[Finding]:
    around = {text: 1.0, **texts.near.get(text, {})}
    around = dict(sorted(around.items(), key=lambda item: -item[1]))  # the nearest is the one that is named
    for other, how in around.items():
        if other in texts.tests:
            yield Finding(task, row, "contaminated", texts.tests[other], how)
            break
    for other, how in around.items():
        elsewhere = [(t, r) for t, r in kept.get(other, {}).items() if t != task]
        if elsewhere:
            yield Finding(task, row, "across_tasks", elsewhere[0], how)
            break
    for other, how in around.items():
        if other != text and task in kept.get(other, {}):
            yield Finding(task, row, "near_duplicates", (task, kept[other][task]), how)
            break


def _shared(rows: Mapping[str, np.ndarray]) -> set[int]:
    """Texts that more than one task has."""
    every = np.concatenate([np.unique(of_row) for of_row in rows.values()]) if rows else np.zeros(0, np.int64)
    values, counts = np.unique(every, return_counts=True)
    return set(values[counts > 1].tolist())
