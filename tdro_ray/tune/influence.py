"""What each task does to the others: short fine-tunings with one task left out at a time, judged on the dev queries.

Every fine-tuning has the same number of steps, so the other tasks get the steps of the one that is left out. One seed:
a difference says something where it is larger than what two equal runs with other seeds differ by (`noise`).

    influence/influence.json   {"measure", "tasks", "all", "without", "noise", "steps"}
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdro_ray import stages
from tdro_ray.errors import DataError
from tdro_ray.pipeline import Progress, Run, Stage, key_of, read_json, write_json
from tdro_ray.tune.study import bare_study
from tdro_ray.tune.trial import Study, fine_tuned

WAIT = 2.0  # seconds between two looks at the runs


def influence(run: Run) -> list[list[str]]:
    """Write `influence/influence.json` into the run folder and return it as rows of text; G + 2 short fine-tunings.

    Raises DataError when no task has dev queries or there is only one task.
    """
    for stage in (stages.ingest, stages.clean, stages.mine, stages.model):
        stage(run)
    recipe, found = run.recipe, stages.collections(run)
    if len(found) < 2 or not any(c.manifest.dev_queries for c in found):
        raise DataError(
            "Influence needs at least two tasks, and dev queries to judge by. Set data.dev_queries to at least 1 (50 is usual)."
        )
    study = bare_study(run, "influence")
    key = key_of("influence", study.key)
    out = run.folder / "influence" / "influence.json"

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        names = list(study.tasks.names)
        scores = _run_all(study, len(names), recipe.tune.cpus_per_trial, recipe.scale.use_gpu, progress)
        record = {
            "measure": f"ndcg@{recipe.evaluate.ndcg_at}",
            "tasks": names,
            "all": scores[None],
            "without": {name: scores[number] for number, name in enumerate(names)},
            "noise": {task: abs(scores[None][task] - scores[-1][task]) for task in scores[None]},
            "steps": study.finetune.steps,
        }
        write_json(out, record)
        shutil.rmtree(study.folder, ignore_errors=True)
        effects = {name: effect(record, name) for name in names}
        best, worst = max(effects, key=effects.__getitem__), min(effects, key=effects.__getitem__)
        return f"{len(names)} tasks left out in turn; the others gain most by {best}, least by {worst}", {
            "mean": effects
        }

    run.do(Stage("influence", key, (out,), work))
    return rows_of(read_json(out))


def effect(record: dict[str, Any], task: str) -> float:
    """Return what a task gives the others: their mean score with it less their mean score without it."""
    others = [t for t in record["all"] if t != task]
    return sum(record["all"][t] - record["without"][task][t] for t in others) / max(1, len(others))


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """Return the tasks as rows of text, those that help the others most first."""
    noise = sum(record["noise"].values()) / len(record["noise"])
    rows = [["left out", "others, mean", "itself", "helps most", "hurts most"]]
    for task in sorted(record["tasks"], key=lambda t: -effect(record, t)):
        gains = {t: record["all"][t] - record["without"][task][t] for t in record["all"]}
        others = {t: g for t, g in gains.items() if t != task}
        best, worst = max(others, key=others.__getitem__), min(others, key=others.__getitem__)
        itself = f"{gains[task]:+.3f}" if task in gains else "-"
        marks = [f"{t} {others[t]:+.3f}" for t in (best, worst)]
        rows.append([task, f"{effect(record, task):+.4f}", itself, *marks])
    return [*rows, ["another seed moves a task by", "", f"{noise:.3f}", "", ""]]


def _run_all(
    study: Study, num_tasks: int, cpus: float, use_gpu: bool, progress: Progress
) -> dict[int | None, dict[str, float]]:
    """Scores per task by what was left out: None nothing, -1 nothing under another seed."""
    import ray

    task = ray.remote(_scores).options(num_cpus=cpus, num_gpus=1 if use_gpu else 0, name="tdro_influence")
    asked = {task.remote(study, number): number for number in (None, -1, *range(num_tasks))}
    waiting, found = list(asked), {}
    while waiting:
        done, waiting = ray.wait(waiting, timeout=WAIT)
        found |= {asked[reference]: ray.get(reference) for reference in done}
        progress.update(f"{len(found)} of {len(asked)} fine-tunings", len(found) / len(asked))
    return found


def _scores(study: Study, left_out: int | None) -> dict[str, float]:
    """nDCG per task after fine-tuning without one task; kept, so that a study that was killed repeats none."""
    folder = study.folder / ("all" if left_out is None else "seed" if left_out < 0 else f"without-{left_out}")
    path = Path(f"{folder}.json")
    kept = read_json(path)
    if not kept:
        alpha = [1.0] * len(study.tasks.names)
        if left_out is not None and left_out >= 0:
            alpha[left_out] = 0.0
        if left_out == -1:
            study = replace(study, seed=study.seed + 1)
        kept = fine_tuned(study, [a / sum(alpha) for a in alpha], folder)
        write_json(path, kept)
        shutil.rmtree(folder, ignore_errors=True)
    return kept
