"""From weights to mixtures: selection of tasks, baselines to compare with, caps on repeats. Pure Python on dicts.

A mixture maps task names to sampling weights that sum to 1. Sizes are training rows per task. Order of tasks is kept
where nothing else is said; a selection is ordered by weight, the largest first, as in the released files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tdro_ray.errors import ConfigError


def by_weight(weights: Mapping[str, float]) -> list[str]:
    """Return the tasks by falling weight; equal weights keep their order."""
    return sorted(weights, key=lambda task: -weights[task])


def uniform(tasks: Mapping[str, object] | list[str] | tuple[str, ...]) -> dict[str, float]:
    """Return weight 1 / G for every task."""
    return {task: 1 / len(tasks) for task in tasks}


def temperature(sizes: Mapping[str, int], a: float) -> dict[str, float]:
    """Return weights n^a / sum n^a: a = 1 is proportional to rows, a = 0 uniform, between them the usual compromise."""
    largest = max(sizes.values())
    scaled = {task: (size / largest) ** a for task, size in sizes.items()}
    return normalised(scaled)


def proportional(sizes: Mapping[str, int]) -> dict[str, float]:
    """Return weights n / sum n: every row is drawn equally often."""
    return temperature(sizes, 1.0)


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights divided by their sum."""
    total = math.fsum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def select_top(weights: Mapping[str, float], percent: float) -> dict[str, float]:
    """Return uniform weights on the floor(G * percent / 100) tasks (at least 1) of largest weight, as released.

    Raises ConfigError for a percentage outside (0, 100].
    """
    _check_share(percent / 100, f"top {percent} %")
    count = max(1, math.floor(len(weights) * percent / 100 + 1e-9))
    return uniform(by_weight(weights)[:count])


def select_amount(weights: Mapping[str, float], amounts: Mapping[str, float], share: float) -> dict[str, float]:
    """Return uniform weights on the tasks of largest weight that together hold at most `share` of the data.

    `amounts` counts each task's data (rows, tokens, …). Tasks are dropped from the smallest weight upwards until the
    rest fits; the task of largest weight always stays. The share that is really kept, `kept_share`, is lower than
    asked by up to one task. Raises ConfigError for a share outside (0, 1].
    """
    _check_share(share, f"share {share}")
    ranking = by_weight(weights)
    budget = share * math.fsum(amounts[task] for task in ranking) * (1 + 1e-12)
    kept, used = ranking[:1], amounts[ranking[0]]
    for task in ranking[1:]:
        used += amounts[task]
        if used > budget:
            break
        kept.append(task)
    return uniform(kept)


def kept_share(selected: Mapping[str, float], amounts: Mapping[str, float]) -> float:
    """Return the share of all data (rows, tokens, …) that tasks of weight above 0 hold."""
    kept = math.fsum(amounts[task] for task, weight in selected.items() if weight > 0)
    return kept / math.fsum(amounts.values())


def mixed(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Return (1 - share) * weight + share / G: learned weights with part of the budget spread evenly.

    Unlike the floor of `TaskWeights`, which DoReMi applies at every update and which therefore holds alpha back, this
    is applied once, to what the training run samples. It keeps tasks alive that the proxy had solved: they need few
    rows, not none.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"An even share of {share} is not valid: it must be from 0 (none) to 1 (uniform).")
    return {task: (1 - share) * weight + share / len(weights) for task, weight in weights.items()}


def _check_share(share: float, what: str) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"Selection of {what} is not valid: keep more than none and at most all of the data.")


def repeats(weights: Mapping[str, float], sizes: Mapping[str, int], budget: float | None = None) -> dict[str, float]:
    """Return how often each row of a task is drawn: weight * budget / task rows.

    `budget` is the rows drawn in all; by default the rows of all tasks in `weights`, one pass over the data. With
    that default this is the `epoch` field of the weight files.
    """
    budget = math.fsum(sizes[task] for task in weights) if budget is None else budget
    return {task: weight * budget / sizes[task] for task, weight in weights.items()}


def cap_repeats(
    weights: Mapping[str, float], sizes: Mapping[str, int], cap: float, budget: float | None = None
) -> dict[str, float]:
    """Return the weights with no task drawn more than `cap` times over: weight * budget <= cap * task rows.

    Water filling: tasks above their limit are set to it, and what they give up goes to the others in proportion to
    their weights, which may bring further tasks to their limit; at most G rounds. A task of weight 0 stays at 0, and
    weights that break no limit come back unchanged. `budget` is the rows drawn in all, as in `repeats`.
    Raises ConfigError when the tasks with weight cannot fill the budget under the cap.
    """
    budget = math.fsum(sizes[task] for task in weights) if budget is None else budget
    limits = {task: cap * sizes[task] / budget for task, weight in weights.items() if weight > 0}
    if math.fsum(limits.values()) < 1 - 1e-9:
        rows = sum(sizes[task] for task in limits)
        raise ConfigError(
            f"A cap of {cap} repeats cannot hold: {len(limits)} tasks with {rows} rows give {cap * rows:.0f} draws, the run "
            f"draws {budget:.0f}. Allow at least {budget / rows:.3g} repeats, or train fewer steps."
        )
    full: dict[str, float] = {}
    free = normalised({task: weights[task] for task in limits})
    while over := [task for task, weight in free.items() if weight > limits[task] * (1 + 1e-12)]:
        full |= {task: limits[task] for task in over}
        rest = {task: weights[task] for task in limits if task not in full}
        left, total = 1 - math.fsum(full.values()), math.fsum(rest.values())
        free = {task: weight * left / total for task, weight in rest.items()}
    return {task: full.get(task, free.get(task, 0.0)) for task in weights}
