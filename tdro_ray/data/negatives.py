"""Which passages become a row's hard negatives, given what a search found. Knows nothing of Ray, search or files.

Passages are compared by class: two that differ only in case, width or white space are one, so that neither a
positive's twin nor the query's own text is ever a negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from tdro_ray.data.dedup import text_key


@dataclass(frozen=True)
class PassageClasses:
    """`class_P[p]` is the smallest number of a passage with the same normalised text as passage p."""

    class_P: np.ndarray
    by_key: dict[bytes, int]  # text key -> class

    @classmethod
    def of(cls, batches: Iterable[Sequence[str]]) -> PassageClasses:
        by_key: dict[bytes, int] = {}
        classes: list[int] = []
        for batch in batches:
            for text in batch:
                classes.append(by_key.setdefault(text_key(text), len(classes)))
        return cls(np.asarray(classes, np.int64), by_key)


def shared_positives(query_keys: np.ndarray, positives: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Return, for each row whose normalised query other rows have too, the positives of all of them."""
    _, group, size = np.unique(query_keys, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(size[group] > 1)
    union: dict[int, set[int]] = {}
    for row in shared.tolist():
        union.setdefault(int(group[row]), set()).update(positives[row])
    return {row: sorted(union[int(group[row])]) for row in shared.tolist()}


@dataclass(frozen=True)
class Chosen:
    """A row's negatives in the order in which they are used, and where they came from."""

    negatives: list[int]
    given: int
    mined: int
    random: int


def choose(
    given: Sequence[int],
    found: Sequence[int],
    forbidden: set[int],
    class_P: np.ndarray,
    num_negatives: int,
    rng: Random,
) -> Chosen:
    """Return the given negatives, then a random draw of `found`, then random passages, up to `num_negatives`.

    `forbidden` holds classes. All given negatives stay, even beyond `num_negatives`; no class is taken twice.
    """
    taken = set(forbidden)
    negatives = _fresh(given, taken, class_P)
    num_given = len(negatives)
    wanted = max(0, num_negatives - num_given)
    candidates = _fresh(found, taken, class_P) if wanted else []
    mined = rng.sample(candidates, min(wanted, len(candidates)))
    filled = _random_passages(wanted - len(mined), taken, class_P, rng)
    return Chosen(negatives + mined + filled, num_given, len(mined), len(filled))


def _fresh(passages: Iterable[int], taken: set[int], class_P: np.ndarray) -> list[int]:
    fresh = []
    for passage in passages:
        of_class = int(class_P[passage])
        if of_class not in taken:
            taken.add(of_class)
            fresh.append(int(passage))
    return fresh


def _random_passages(count: int, taken: set[int], class_P: np.ndarray, rng: Random) -> list[int]:
    """Up to `count` passages of the task: by trial where that soon succeeds, by listing in a small task."""
    filled: list[int] = []
    for _ in range(8 * count):
        if len(filled) == count:
            break
        filled += _fresh([rng.randrange(len(class_P))], taken, class_P)
    if len(filled) < count:
        left = _fresh(range(len(class_P)), taken, class_P)
        filled += rng.sample(left, min(count - len(filled), len(left)))
    return filled
