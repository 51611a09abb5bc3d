"""What a study found: the best trial, as settings to paste, against the recipe's own setting. Knows nothing of Ray."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tdro_ray.config import Recipe
from tdro_ray.evaluate.significance import compare_mean, compare_tasks
from tdro_ray.pipeline import read_json
from tdro_ray.tune.study import as_typed

RESAMPLES = 4000  # of the bootstrap


def best_of(recipe: Recipe, trials: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return what `best.json` holds: the best finished trial, its settings as `--set` strings, and how it compares.

    `folder` holds the trials' folders. The comparison with the recipe's own setting, trial 0, is paired over the dev
    queries; it is left out where one of both has no result or they are the same.
    """
    finished = [t for t in trials if t["status"] == "done"]
    best = max(finished, key=lambda t: t["objective"])
    own = next((t for t in finished if t["number"] == 0), None)
    options = [f"optimize.{name}={_yaml(value)}" for name, value in best["setting"].items()]
    if recipe.optimize.measure_options and best["setting"]["measure"] != recipe.optimize.measure:
        options.append("optimize.measure_options={}")  # they are of the recipe's measure
    facts = {key: best[key] for key in ("setting", "objective", "mean", "worst")}
    command = " ".join(["tdro run", as_typed(recipe), *(f"--set {shlex.quote(o)}" for o in options)])
    line = (
        f"best {recipe.tune.objective} nDCG@{recipe.evaluate.ndcg_at} {best['objective']:.3f} (trial {best['number']})"
    )
    found = {"trial": best["number"], **facts, "set": options, "command": command}
    if own is best:
        return {**found, "line": f"{line}, the recipe's own setting", "warnings": []}
    if own is None:
        return {**found, "line": line, "warnings": ["the recipe's own setting has no result to compare with"]}
    ours, theirs = (read_json(folder / t["id"] / "result.json")["per_query"] for t in (best, own))
    mean = compare_mean(ours, theirs, resamples=RESAMPLES)
    tasks = compare_tasks(ours, theirs, resamples=RESAMPLES)
    return {
        **found,
        "default": {key: own[key] for key in ("number", "setting", "objective", "mean", "worst")},
        "mean_against_default": asdict(mean),
        "tasks_against_default": {task: {**asdict(c), "p_holm": p} for task, (c, p) in tasks.items()},
        "line": f"{line}, the recipe's own setting {own['objective']:.3f}",
        "warnings": [] if mean.low > 0 else ["the best trial is not clearly better than the recipe's own setting"],
    }


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
