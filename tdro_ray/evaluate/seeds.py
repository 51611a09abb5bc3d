"""Runs of one recipe under several seeds, summed up. Reads run folders; knows numpy, scipy and the files' names.

An interval over seeds asks whether another start, another draw of batches and another stage 1 would agree: Student's t
of the seeds' values, or of the paired differences to the baseline of the same seed. The p-value over queries asks
whether other test queries would: the paired test on each query's mean score over the seeds.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import DataError
from tdro_ray.evaluate.significance import compare_mean

RESAMPLES = 4000


def summarise(folders: Sequence[Path], stages1: Mapping[str, tuple[str, str]], baseline: str) -> dict[str, Any]:
    """Return results and learned weights over the run folders of several seeds.

        measure   name of the headline measure
        models    model -> {"mean", "worst": interval; "tasks": task -> interval}
        against   model -> {"mean", "worst": interval of the paired differences; "p_queries"}
        weights   rival -> {"mean": task -> weight, "tasks": task -> interval, "kendall", "loss_rank", "effective"}

    An interval is {"values", "average", "low", "high"}. `stages1` gives each rival's (stage, start of its weight files).
    Only what every folder holds is summed up. Raises DataError when no model was evaluated in all of them.
    """
    evals = [_evals(folder) for folder in folders]
    names = [name for name in evals[0] if all(name in found for found in evals)]
    if not names:
        raise DataError(
            f"No model is evaluated in all of {', '.join(map(str, folders))}. Run `tdro evaluate` for each."
        )
    measure = next(m for m in evals[0][names[0]]["mean"] if m.startswith("ndcg@"))
    models, against = {}, {}
    for name in names:
        per_seed = [_scores(found[name], measure) for found in evals]
        tasks = [t for t in per_seed[0]["tasks"] if all(t in seed["tasks"] for seed in per_seed)]
        models[name] = {
            **{kind: interval([seed[kind] for seed in per_seed]) for kind in ("mean", "worst")},
            "tasks": {task: interval([seed["tasks"][task] for seed in per_seed]) for task in tasks},
        }
    for name in names:
        if name != baseline and baseline in models:
            pairs = {kind: _paired(models[name][kind], models[baseline][kind]) for kind in ("mean", "worst")}
            against[name] = {**pairs, "p_queries": _p_queries(folders, name, baseline)}
    weights = {rival: found for rival, where in stages1.items() if (found := _weights(folders, *where))}
    return {"measure": measure, "models": models, "against": against, "weights": weights}


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Return the values, their average and its Student's t interval; a single value has no interval (None)."""
    from scipy.stats import t as student

    average = float(np.mean(values))
    if len(values) < 2:
        return {"values": list(values), "average": average, "low": None, "high": None}
    half = float(student.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"values": list(values), "average": average, "low": average - half, "high": average + half}


def agreement(alphas: Sequence[Mapping[str, float]]) -> float | None:
    """Return Kendall's tau-b of the tasks' order, mean over all pairs of weights; None for a single one or without an order."""
    from scipy.stats import kendalltau

    tasks = list(alphas[0])
    taus = [
        float(kendalltau([a[t] for t in tasks], [b[t] for t in tasks]).statistic)
        for a, b in itertools.combinations(alphas, 2)
    ]
    taus = [tau for tau in taus if math.isfinite(tau)]
    return float(np.mean(taus)) if taus else None


def table_of(found: Mapping[str, Any], order: Sequence[str]) -> list[list[str]]:
    """Return the summary as rows of text: a header, then one row per model in the given order."""
    rows = [["over seeds", "mean", "± seed", "worst", "against uniform", "95 % over seeds", "p over queries"]]
    for name in (n for n in order if n in found["models"]):
        model, pair = found["models"][name], found["against"].get(name)
        spread = f"{np.std(model['mean']['values'], ddof=1):.4f}"
        cells = [name, f"{model['mean']['average']:.4f}", spread, f"{model['worst']['average']:.4f}"]
        if pair:
            mean = pair["mean"]
            cells += [
                f"{mean['average']:+.4f}",
                f"{mean['low']:+.4f} to {mean['high']:+.4f}",
                f"{pair['p_queries']:.4f}",
            ]
        rows.append(cells + [""] * (len(rows[0]) - len(cells)))
    return rows


def _evals(folder: Path) -> dict[str, Any]:
    paths = sorted(p for p in (folder / "eval").glob("*.json") if not p.stem.endswith(".per_query"))
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in paths}


def _scores(found: Mapping[str, Any], measure: str) -> dict[str, Any]:
    tasks = {task: float(values[measure]) for task, values in found["tasks"].items()}
    return {"mean": float(found["mean"][measure]), "worst": min(tasks.values()), "tasks": tasks}


def _paired(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return interval([a - b for a, b in zip(ours["values"], theirs["values"], strict=True)])


def _p_queries(folders: Sequence[Path], name: str, baseline: str) -> float:
    ours, theirs = (_query_means(folders, model) for model in (name, baseline))
    return compare_mean(ours, theirs, resamples=RESAMPLES).p


def _query_means(folders: Sequence[Path], model: str) -> dict[str, dict[str, float]]:
    """Return each query's mean score over the seeds."""
    found = [json.loads((f / "eval" / f"{model}.per_query.json").read_text(encoding="utf-8")) for f in folders]
    return {
        task: {q: float(np.mean([seed[task][q] for seed in found])) for q in scores}
        for task, scores in found[0].items()
    }


def _weights(folders: Sequence[Path], stage: str, start: str) -> dict[str, Any]:
    """What the stage 1 of every seed learned; {} where one of them has not run."""
    from scipy.stats import spearmanr

    from tdro_ray.dro.files import read_weights

    paths = [folder / "weights" / f"{start}current.json" for folder in folders]
    if not all(path.exists() for path in paths):
        return {}
    files = [read_weights(path) for path in paths]
    alphas = [file.weights for file in files]
    ranks = []
    for folder, alpha in zip(folders, alphas, strict=True):
        loss_G = _reference_loss(folder / "stages" / stage / "metrics.jsonl")
        if len(loss_G) == len(alpha) > 2 and np.ptp(loss_G) > 0 and np.ptp(list(alpha.values())) > 0:
            ranks.append(float(spearmanr(list(alpha.values()), loss_G).statistic))
    tasks = {task: interval([alpha[task] for alpha in alphas]) for task in alphas[0]}
    return {
        "mean": {task: values["average"] for task, values in tasks.items()},
        "tasks": tasks,
        "kendall": agreement(alphas),
        "loss_rank": float(np.mean(ranks)) if ranks else None,
        "effective": [file.meta.get("effective_tasks") for file in files],
    }


def _reference_loss(path: Path) -> np.ndarray:
    """Mean reference loss of each task over the logged steps of a stage 1 (G,)."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line).get("reference_loss") for line in lines]
    return np.mean([loss for loss in found if loss], axis=0) if any(found) else np.zeros(0)
