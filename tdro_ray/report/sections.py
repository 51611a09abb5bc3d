"""The parts of the page that hold results: models, tasks, mixture, training. Each returns HTML, or says what is missing."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from tdro_ray.report import plots
from tdro_ray.report.collect import BASELINE, RunFacts
from tdro_ray.report.findings import (
    Comparisons,
    effective_tasks,
    p_text,
    passes,
    rows_kept,
    shown_model,
    significant,
    title,
    total_rejects,
    weight_shift,
    worst_task,
)
from tdro_ray.report.markup import (
    HALF,
    WIDE,
    below,
    breakable,
    difference,
    duration,
    esc,
    figure,
    missing,
    number,
    share,
    table,
)

BARS = 4  # mixtures beside the baseline whose bars are drawn
CURVES = 7  # loss curves in one plot


def results(facts: RunFacts, found: Comparisons) -> str:
    """Models against the baseline, then task by task."""
    if not facts.evals:
        return missing("Evaluation: not run yet.") + _task_table(facts, found)
    parts = [_model_table(facts, found), _score_bars(facts), _differences_map(facts)]
    parts += [_task_table(facts, found), _differences(facts, found)]
    return "\n".join(parts)


def mixture(facts: RunFacts) -> str:
    """Weights before and after, over time, and the weight files."""
    name, learned = facts.learned
    if not learned:
        return missing("Stage 1 (optimize): not run yet, so there are no learned weights.")
    parts = [_weight_changes(facts, name, learned)]
    path = facts.trajectory
    if path is None:
        parts.append(missing("Trajectory: not written yet."))
    else:
        shift = weight_shift(facts)
        moved = (
            ""
            if shift is None
            else f" {shift:.1%} of the weight changed hands between the last two tenths of the steps."
        )
        lines = {task: path.alpha_SG[:, i].tolist() for i, task in enumerate(path.tasks)}
        draw = partial(plots.trajectories, steps=path.steps, lines=lines, start=1 / len(path.tasks))
        parts.append(
            figure(f"Weights over the {path.steps[-1]:,} steps of stage 1; dotted: uniform.{moved}", draw, "trajectory")
        )
    return "\n".join([*parts, _weight_files(facts), _influence(facts)])


def _influence(facts: RunFacts) -> str:
    found = facts.influence
    if not found:
        return ""
    judged = [task for task in found["tasks"] if task in found["all"]]
    values = [[found["all"][t] - found["without"][task][t] for t in judged] for task in found["tasks"]]
    noise = sum(found["noise"].values()) / len(found["noise"])
    caption = (
        f"Influence: how much each task (row) adds to another's (column) {title(found['measure'])} on dev queries, in hundredths, "
        f"by leaving it out of {found['steps']} steps of fine-tuning. Another seed alone moves a task by {100 * noise:.1f} on average."
    )
    draw = partial(
        plots.heat, rows=found["tasks"], columns=judged, values=values, label="Influence of each task on each other"
    )
    return "<h3>What each task does to the others</h3>" + figure(caption, draw, "influence")


def training(facts: RunFacts) -> str:
    """Loss curves: stages 0 and 2 together (the same loss), stage 1 on its own."""
    runs = {}
    for stage, steps in facts.metrics.items():
        model = (
            BASELINE
            if stage == "reference"
            else stage.removeprefix("finetune-")
            if stage.startswith("finetune")
            else None
        )
        if model and (curve := _curve(steps, "loss")):
            runs[model] = curve
    parts = []
    if runs:
        order = sorted(runs, key=lambda m: (m != BASELINE, list(facts.evals).index(m) if m in facts.evals else 99))
        order = order[:CURVES]
        draw = partial(
            plots.curves,
            series={m: runs[m] for m in order},
            label="contrastive loss of the batch",
            baseline=BASELINE in runs,
        )
        parts.append(
            figure(
                "Stages 0 and 2: the reference (uniform) and every fine-tuning. Batches differ in task, hence the noise.",
                draw,
                "loss",
                HALF,
            )
        )
    proxy = {label: curve for label, key in _PROXY.items() if (curve := _curve(facts.metrics.get("optimize", []), key))}
    if proxy:
        draw = partial(plots.curves, series=proxy, label="loss of the proxy", baseline=False)
        parts.append(figure("Stage 1: loss of the proxy over the row's own passages.", draw, "proxy", HALF))
    if not parts:
        return missing("Training: no step logged yet.")
    return f'<div class="pair">{"".join(parts)}</div>' + _speed_table(facts)


_PROXY = {
    "weighted by alpha": "loss",
    "proxy, mean over tasks": "proxy_loss",
    "reference, mean over tasks": "reference_loss",
}


def _curve(steps: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]] | None:
    """(steps, values) of a logged quantity; one logged per task is averaged over the tasks that the batch held."""
    found = []
    for step in steps:
        value = step.get(key)
        if isinstance(value, (list, dict)):
            per_task = value.values() if isinstance(value, dict) else value
            held = [v for v in per_task if isinstance(v, (int, float)) and v != 0]  # 0: no row in the batch
            value = sum(held) / len(held) if held else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((float(step["step"]), float(value)))
    return ([at for at, _ in found], [value for _, value in found]) if len(found) > 1 else None


def _model_table(facts: RunFacts, found: Comparisons) -> str:
    measure, rows = facts.measure, []
    others = [m for m in next(iter(facts.evals.values()))["mean"] if m != measure]
    for model, result in facts.evals.items():
        test = found.overall.get(model)
        change = "baseline" if model == BASELINE else "–"
        if test:
            comparison, p = test
            interval = f"<small>{number(comparison.low, '+.3f')} to {number(comparison.high, '+.3f')}</small>"
            change = difference(comparison.mean_diff, significant(p)) + interval
        moved = [(c.mean_diff, significant(p)) for c, p in found.tasks.get(model, {}).values()]
        better, worse = sum(d > 0 and s for d, s in moved), sum(d < 0 and s for d, s in moved)
        stage = facts.stages.get("reference" if model == BASELINE else f"finetune-{model}", {})
        cells = [
            esc(model),
            number(result["mean"].get(measure), ".3f"),
            change,
            esc(p_text(test[1]).removeprefix("p ").removeprefix("= ")) if test else "",
            number(result["worst"].get(measure), ".3f") + below(worst_task(facts, model)),
            *(number(result["mean"].get(other), ".3f") for other in others),
            f"{better}, {worse}" if moved else "",
            duration(stage.get("seconds")),
        ]
        rows.append((cells, ""))
    head = ["Model", f"Mean {title(measure)}", f"Against {BASELINE}", "p", f"Worst {title(measure)}"]
    head += [*(f"Mean {title(other)}" for other in others), "Tasks better, worse*", "Training time"]
    return "<h3>Models</h3>" + table([esc(h) for h in head], rows)


def _score_bars(facts: RunFacts) -> str:
    """The baseline and the best few others: more bars a task than that nobody reads."""
    ranked = sorted(
        (m for m in facts.evals if m != BASELINE), key=lambda m: -facts.evals[m]["mean"].get(facts.measure, 0)
    )
    shown = {BASELINE, *ranked[:BARS]}
    tasks = [task for task in facts.tasks if any(task in result["tasks"] for result in facts.evals.values())]
    scores = {
        model: [
            result["mean"].get(facts.measure),
            result["worst"].get(facts.measure),
            *(facts.score(model, t) for t in tasks),
        ]
        for model, result in facts.evals.items()
        if model in shown
    }
    if BASELINE not in scores:  # the first colour is the baseline's
        scores = {BASELINE: [None] * (len(tasks) + 2), **scores}
    draw = partial(plots.grouped_bars, groups=["mean", "worst", *tasks], scores=scores, label=title(facts.measure))
    which = f" The best {BARS} of {len(ranked)} mixtures and {BASELINE}." if len(ranked) > BARS else ""
    return figure(
        f"{title(facts.measure)} on the held-out tests; tasks by learned weight, the largest first.{which}",
        draw,
        "scores",
    )


def _differences_map(facts: RunFacts) -> str:
    """Every mixture on every task, where there are more than the bars show."""
    models = [m for m in facts.evals if m != BASELINE]
    if len(models) <= BARS or BASELINE not in facts.evals:
        return ""
    tasks = [task for task in facts.tasks if task in facts.evals[BASELINE]["tasks"]]
    values = [[_gain(facts, model, task) for model in models] for task in tasks]
    draw = partial(
        plots.heat, rows=tasks, columns=models, values=values, label="Differences of every mixture on every task"
    )
    caption = (
        f"{title(facts.measure)} of every mixture less that of {BASELINE}, in hundredths: blue better, orange worse."
    )
    return figure(caption, draw, "map")


def _gain(facts: RunFacts, model: str, task: str) -> float | None:
    ours, theirs = facts.score(model, task), facts.score(BASELINE, task)
    return None if ours is None or theirs is None else ours - theirs


def _task_table(facts: RunFacts, found: Comparisons) -> str:
    if not facts.tasks:
        return missing("Tasks: none ingested yet.")
    name, learned = facts.learned
    times, total = passes(facts, learned), len(learned)
    head = ["Task", "Rows", "Weight before", "Weight after", "Change", "Passes", *facts.evals]
    rows = []
    for task in facts.tasks:
        after = learned.get(task)
        cells = [
            breakable(task),
            number(facts.rows(task)),
            share(1 / total if after is not None else None),
            share(after),
            "–" if after is None else f"× {after * total:.2g}" if after * total < 0.095 else f"× {after * total:.2f}",
            number(times.get(task), ".2f"),
        ]
        rows.append((cells + [_task_score(facts, found, model, task) for model in facts.evals], ""))
    for kind in ("mean", "worst") if facts.evals else ():
        sums = [number(result[kind].get(facts.measure), ".3f") for result in facts.evals.values()]
        rows.append(([kind.capitalize(), *[""] * 5, *sums], "sum"))
    note = (
        f"Weight after: the weight file {name}. Passes: how often fine-tuning with it draws each row. " if name else ""
    )
    if facts.evals:
        note += f"Below a score its difference to {BASELINE}; * significant (p < 0.05, Holm-corrected over the tasks)."
    lead = f"<h3>Tasks{f': {esc(title(facts.measure))}' if facts.evals else ''}</h3>"
    return f'{lead}<p class="note">{esc(note)}</p>{table([esc(h) for h in head], rows)}{_task_facts(facts)}'


def _task_facts(facts: RunFacts) -> str:
    """What the tasks are, folded away."""
    rows = []
    for task, info in facts.ingested.items():
        counts = [number(info.get(key)) for key in ("rows", "passages", "test_queries")]
        kind = "symmetric" if info.get("symmetric") else "query to passage"
        cells = [breakable(task), *counts, number(total_rejects(info)), esc(info.get("language") or "–"), kind]
        rows.append(([*cells, esc(info.get("description") or "")], ""))
    if not rows:
        return ""
    head = ["Task", "Rows", "Passages", "Test queries", "Refused lines", "Language", "Kind", "What it asks"]
    return f"<details><summary>What the tasks are</summary>{table(head, rows, text_columns=(7,))}</details>"


def _task_score(facts: RunFacts, found: Comparisons, model: str, task: str) -> str:
    score = facts.score(model, task)
    if score is None:
        return '<span class="missing">no test</span>'
    if task in found.tasks.get(model, {}):
        comparison, p = found.tasks[model][task]
        return f"{number(score, '.3f')} <small>{difference(comparison.mean_diff, significant(p))}</small>"
    base = facts.score(BASELINE, task) if BASELINE in facts.evals and model != BASELINE else None
    return number(score, ".3f") + (f" <small>{difference(score - base, False)}</small>" if base is not None else "")


def _differences(facts: RunFacts, found: Comparisons) -> str:
    model = shown_model(facts)
    if model is None or model not in found.tasks:
        return missing(f"Paired differences to {BASELINE}: no per-query scores of {BASELINE} and another model.")
    rows = [
        (task, c.mean_diff, c.low, c.high, significant(p))
        for task in facts.tasks
        if task in found.tasks[model]
        for c, p in [found.tasks[model][task]]
    ]
    caption = (
        f"{model} against {BASELINE}, task by task, with 95% bootstrap intervals over the test queries. "
        "Filled and coloured: significant after Holm's correction over the tasks; hollow and grey: not."
    )
    draw = partial(plots.differences, rows=rows, label=f"{title(facts.measure)}, {model} − {BASELINE}")
    return figure(caption, draw, "differences")


def _weight_changes(facts: RunFacts, name: str, learned: dict[str, float]) -> str:
    rows = {task: facts.rows(task) for task in learned}
    total = sum(r for r in rows.values() if r) if all(rows.values()) else None
    data = [
        (t, 1 / len(learned), (rows[t] or 0) / total if total else None, learned[t])
        for t in facts.tasks
        if t in learned
    ]
    caption = f"Sampling weights before (uniform) and after stage 1 (weight file {name})."
    return figure(caption, partial(plots.weight_changes, rows=data, before="uniform", after=name), "weights", WIDE)


def _weight_files(facts: RunFacts) -> str:
    rows = []
    for name, file in facts.weights.items():
        positive = {task: w for task, w in file.weights.items() if w > 0}
        top = max(positive, key=lambda task: positive[task])
        kept = rows_kept(facts, file.weights)
        cells = [esc(name), f"{len(positive)}", number(effective_tasks(positive.values()), ".1f")]
        even = max(positive.values()) - min(positive.values()) < 1e-6
        cells += [number(kept, ".0%"), share(positive[top]) + below("each task" if even else top)]
        rows.append(([*cells, "yes" if name.removesuffix(".current") in facts.evals else "no"], ""))
    head = ["Weight file", "Tasks kept", "Effective tasks", "Rows kept", "Largest weight", "Evaluated"]
    return "<h3>Mixtures and data kept</h3>" + table([esc(h) for h in head], rows)


def _speed_table(facts: RunFacts) -> str:
    rows = []
    for stage, steps in facts.metrics.items():
        if not steps:
            continue
        last = _median(steps[-max(1, len(steps) // 10) :], "loss")
        memory = [m for step in steps if (m := step.get("peak_memory_mb")) is not None]
        cells = [esc(stage), number(steps[-1]["step"]), number(last, ".3f"), number(_median(steps, "tokens_per_s"))]
        cells += [number(_median(steps, key, 1000), ",.0f") for key in ("step_s", "data_wait_s")]
        rows.append(([*cells, number(max(memory, default=None))], ""))
    head = [
        "Training stage",
        "Steps",
        "Loss at the end",
        "Tokens / s",
        "Step, ms",
        "Waiting for data, ms",
        "Peak memory, MB",
    ]
    return table([esc(h) for h in head], rows)


def _median(steps: list[dict[str, Any]], key: str, scale: float = 1) -> float | None:
    values = sorted(step[key] for step in steps if isinstance(step.get(key), (int, float)))
    return values[len(values) // 2] * scale if values else None
