"""Which rows every training step uses. Pure numpy: knows nothing of Ray, files or models.

A plan is a function of (sizes, weights, steps, batch size, seed), never of the number of workers. Any step can be
asked for without replaying the ones before it, which is what makes resume exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from tdro_ray.errors import ConfigError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """A part of every task's rows, drawn by seed: fold `number` of `count` equal ones, or with `rest` all the others."""

    number: int
    count: int
    rest: bool = False


class Plan:
    """Rows of every step.

    `mode="homogeneous"`: one task per step; after any number of steps s the batches of a task differ from
    weight x s by less than one (Tijdeman 1980, the chairman assignment problem).
    `mode="stratified"`: every step holds an equal share of every task, to within one row; weights must be uniform.

    Rows of a task come from one seeded permutation per pass over the task. With `fold` only that part of each task's
    rows is drawn.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        num_steps: int,
        batch_size: int,
        seed: int,
        mode: Literal["homogeneous", "stratified"] = "homogeneous",
        fold: Fold | None = None,
    ) -> None:
        self.sizes, self.fold = [int(n) for n in sizes], fold
        num_tasks = len(self.sizes)
        w = np.full(num_tasks, 1 / num_tasks) if weights is None else np.asarray(weights, np.float64)
        _check(self.sizes, w, num_steps, batch_size, mode, fold)
        self.weights = w / w.sum()
        self.num_steps, self.batch_size, self.seed, self.mode = int(num_steps), int(batch_size), int(seed), mode
        if mode == "homogeneous":
            self._task_S = _schedule(self.weights, self.num_steps, self.seed)
            self._nth_S = np.zeros(self.num_steps, np.int64)  # how many earlier steps had the same task
            for task in range(num_tasks):
                at = np.flatnonzero(self._task_S == task)
                self._nth_S[at] = np.arange(len(at))

    def step(self, s: int) -> list[tuple[int, Ints]]:
        """Return ``[(task index, row indices), …]`` of step `s`; in all `batch_size` rows."""
        if not 0 <= s < self.num_steps:
            raise IndexError(f"step {s} is outside the plan of {self.num_steps} steps")
        if self.mode == "homogeneous":
            task, nth = int(self._task_S[s]), int(self._nth_S[s])
            return [(task, self._rows(task, nth * self.batch_size, self.batch_size))]
        # Cumulative floors: shares sum to batch_size in every step and to within one row over all steps.
        num_tasks, order = len(self.sizes), np.arange(len(self.sizes))
        start_G = (s * self.batch_size + order) // num_tasks
        stop_G = ((s + 1) * self.batch_size + order) // num_tasks
        return [(g, self._rows(g, int(a), int(b - a))) for g, (a, b) in enumerate(zip(start_G, stop_G)) if b > a]

    def rows(self, s: int) -> tuple[Ints, Ints]:
        """Return (task_N, row_N) of step `s` in batch order; a stratified step is shuffled (seeded).

        The shuffle lets any consecutive group of rows, a worker's share or the 512 rows over which the `official`
        measure normalises, hold a mixture of tasks.
        """
        parts = self.step(s)
        task_N = np.concatenate([np.full(len(rows), task, np.int64) for task, rows in parts])
        row_N = np.concatenate([rows for _, rows in parts])
        if self.mode == "stratified":
            order = np.random.default_rng((self.seed, 1, s)).permutation(len(row_N))
            task_N, row_N = task_N[order], row_N[order]
        return task_N, row_N

    def counts(self) -> Ints:
        """Return steps per task (homogeneous) or rows per task (stratified)."""
        if self.mode == "homogeneous":
            return np.bincount(self._task_S, minlength=len(self.sizes)).astype(np.int64)
        num_tasks = len(self.sizes)
        return (self.num_steps * self.batch_size + np.arange(num_tasks)) // num_tasks

    def _rows(self, task: int, start: int, count: int) -> Ints:
        """Rows `start` … `start + count - 1` of the endless stream of passes over a task."""
        part = None if self.fold is None else _fold_rows(self.sizes[task], self.seed, task, self.fold)
        size, out = self.sizes[task] if part is None else len(part), []
        while count > 0:
            passage, offset = divmod(start, size)
            take = min(count, size - offset)
            out.append(_permutation(size, self.seed, task, passage)[offset : offset + take])
            start, count = start + take, count - take
        rows = np.concatenate(out)
        return (rows if part is None else part[rows]).astype(np.int64)


@lru_cache(maxsize=128)
def fold_numbers(size: int, seed: int, task: int, count: int) -> npt.NDArray[np.uint8]:
    """Return the fold, 0 to count - 1, of every row of a task of `size` rows (size,)."""
    out = np.empty(size, np.uint8)
    for number in range(count):
        out[_fold_rows(size, seed, task, Fold(number, count))] = number
    return out


@lru_cache(maxsize=128)
def _fold_rows(size: int, seed: int, task: int, fold: Fold) -> npt.NDArray[np.uint32]:
    order = np.random.default_rng((seed, 4, task)).permutation(size).astype(np.uint32)
    start, stop = size * fold.number // fold.count, size * (fold.number + 1) // fold.count
    return np.sort(np.concatenate([order[:start], order[stop:]]) if fold.rest else order[start:stop])


def shares(num_rows: int, num_workers: int) -> list[slice]:
    """Return each worker's consecutive share of a batch's rows; the first ones get the remainder."""
    bounds = [num_rows * rank // num_workers for rank in range(num_workers + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def draw_negatives(available_B: Sequence[int], count: int, seed: int, s: int, part: slice, num_rows: int) -> Ints:
    """Return (B, count) positions into each row's negatives: without replacement where there are enough, else with.

    A row without negatives gets -1. B is the `part` of the step's `num_rows` rows whose numbers of negatives are
    `available_B`; the draw of a row depends on (seed, step, place in the global batch) alone, so that `score` sees
    what stage 1 will see on any number of workers.
    """
    uniform_BK = np.random.default_rng((seed, 2, s)).random((num_rows, count))[part]
    out = np.full((len(available_B), count), -1, np.int64)
    for i, have in enumerate(available_B):
        if have >= count:
            left = list(range(have))
            out[i] = [left.pop(int(u * len(left))) for u in uniform_BK[i]]
        elif have > 0:
            out[i] = np.floor(uniform_BK[i] * have)
    return out


@lru_cache(maxsize=128)
def _permutation(size: int, seed: int, task: int, nth_pass: int) -> npt.NDArray[np.uint32]:
    order = np.random.default_rng((seed, 0, task, nth_pass)).permutation(size)
    return order.astype(np.uint32)


def _schedule(weights_G: npt.NDArray[np.float64], num_steps: int, seed: int) -> npt.NDArray[np.int32]:
    """Task of every step by Tijdeman's rule, tasks renumbered by seed so that ties carry no order of names."""
    order = np.random.default_rng((seed, 3)).permutation(len(weights_G))
    kept = order[weights_G[order] > 1e-12]  # below, no run is long enough for one batch
    w, count_G = weights_G[kept], np.zeros(len(kept))
    slack = 1 / (2 * len(kept) - 2) if len(kept) > 1 else 0.0
    out = np.empty(num_steps, np.int32)
    for s in range(num_steps):
        # Among the tasks that may take a batch without running ahead, the one whose deadline comes first.
        eligible = w * (s + 1) - count_G >= slack - 1e-9
        deadline = np.where(eligible, (count_G + 1 - slack) / w, np.inf)
        pick = int(np.argmin(deadline))
        count_G[pick] += 1
        out[s] = kept[pick]
    return out


def _check(
    sizes: list[int],
    weights: npt.NDArray[np.float64],
    num_steps: int,
    batch_size: int,
    mode: str,
    fold: Fold | None,
) -> None:
    if fold is not None and sizes and min(sizes) < fold.count:
        raise ConfigError(
            f"A task of {min(sizes)} rows cannot be split into {fold.count} folds. Set optimize.folds lower, or leave that task out."
        )
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"A plan needs at least one row in every task; sizes are {sizes}. Leave empty tasks out.")
    if len(weights) != len(sizes) or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ConfigError(f"A plan needs one weight >= 0 per task ({len(sizes)} tasks); got {weights.tolist()}.")
    if num_steps < 1 or batch_size < 1:
        raise ConfigError(f"A plan needs at least one step and one row a step; got {num_steps} and {batch_size}.")
    if mode not in ("homogeneous", "stratified"):
        raise ConfigError(f"Plan mode {mode!r} is unknown. Valid: homogeneous, stratified.")
    if mode == "stratified" and not np.allclose(weights, weights[0]):
        raise ConfigError("A stratified plan takes an equal share of every task; weights have no effect. Pass None.")
