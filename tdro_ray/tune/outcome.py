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
NOT_CLEAR = "the best trial is not clearly better than the recipe's own setting"


def best_of(recipe: Recipe, trials: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return what `best.json` holds: the best finished trial, its settings as `--set` strings, and how it compares.

    `folder` holds the trials' folders. Compared with the recipe's own setting, trial 0, is its `rival`: the best trial,
    or the next best where trial 0 is the best itself; paired over the dev queries.
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
    if own is None or len(finished) == 1:
        wary = [] if own is best else ["the recipe's own setting has no result to compare with"]
        return {**found, "line": line, "warnings": wary}
    rival = best if best is not own else max((t for t in finished if t is not own), key=lambda t: t["objective"])
    ours, theirs = (read_json(folder / t["id"] / "result.json")["per_query"] for t in (rival, own))
    mean = compare_mean(ours, theirs, resamples=RESAMPLES)
    tasks = compare_tasks(ours, theirs, resamples=RESAMPLES)
    return {
        **found,
        "default": {key: own[key] for key in ("number", "setting", "objective", "mean", "worst")},
        "rival": rival["number"],
        "rival_setting": rival["setting"],
        "mean_against_default": asdict(mean),
        "tasks_against_default": {task: {**asdict(c), "p_holm": p} for task, (c, p) in tasks.items()},
        "line": f"{line}, the recipe's own setting" + ("" if best is own else f" {own['objective']:.3f}"),
        "warnings": [] if best is own or mean.low > 0 else [NOT_CLEAR],
    }


def confirmed(best: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """Return `best` with the comparison over further seeds: `runs` holds the seeds and both settings' mean nDCG.

    The interval is Student's t of the differences of runs of one seed; the seed of the search is left out, since the
    best trial was picked on it.
    """
    from scipy.stats import t as student

    gains = [a - b for a, b in zip(runs["rival"], runs["default"], strict=True)]
    mean = sum(gains) / len(gains)
    error = (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5
    half = float(student.ppf(0.975, len(gains) - 1)) * error
    found = {**runs, "mean_diff": mean, "low": mean - half, "high": mean + half}
    clear = best["trial"] != best["rival"] or found["low"] > 0
    warnings = [w for w in best["warnings"] if w != NOT_CLEAR] + ([] if clear else [NOT_CLEAR])
    line = f"{best['line']}; trial {best['rival']} against it over {len(gains)} further seeds {mean:+.3f} on average"
    return {**best, "seeds": found, "warnings": warnings, "line": line}


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
