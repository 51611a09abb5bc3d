"""The page of a study: one self-contained HTML file, no script, nothing fetched, every text escaped."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from tdro_ray.config import Recipe
from tdro_ray.report import plots as shared
from tdro_ray.report.markup import WIDE, breakable, difference, duration, esc, figure, missing, number, share, table
from tdro_ray.tune import plots
from tdro_ray.tune.study import as_typed

TOP = 3  # trials whose weights are drawn
MOST_GROWTH = 7  # lines in the plot of repeated evaluations


def write_report(recipe: Recipe, trials: list[dict[str, Any]], best: dict[str, Any], folder: Path, path: Path) -> Path:
    """Write the page under a temporary name, rename it, and return its path. `folder` holds the trials' folders."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(render(recipe, trials, best, folder), encoding="utf-8")
    temporary.replace(path)
    return path


def render(recipe: Recipe, trials: list[dict[str, Any]], best: dict[str, Any], folder: Path) -> str:
    """Return the page; the same study gives the same bytes."""
    parts = [
        ("settings", "Settings tried", _settings(recipe, trials, best)),
        ("against", "Against the recipe's own setting", _against(recipe, best)),
        ("weights", "Weights that the best trials learned", _weights(trials, folder)),
        ("cost", "Cost", _cost(trials)),
        ("repeat", "Use it", _use(recipe, best)),
        ("method", "How to read this", _method(recipe, trials)),
    ]
    links = "".join(f'<a href="#{name}">{esc(heading)}</a>' for name, heading, _ in parts)
    body = _head(recipe, trials, best, links) + "".join(
        f'\n<section id="{name}"><h2>{esc(heading)}</h2>\n{content}</section>' for name, heading, content in parts
    )
    template = Template(files("tdro_ray.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=esc(f"{recipe.name}: tdro-ray study"), body=body)


def label_of(recipe: Recipe) -> str:
    return f"{recipe.tune.objective} nDCG@{recipe.evaluate.ndcg_at}"


def describe(setting: dict[str, Any]) -> str:
    """A setting as people write it: eta 0.05, temperature 0.02, measure ratio."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in setting.items()
    )


def _head(recipe: Recipe, trials: list[dict[str, Any]], best: dict[str, Any], links: str) -> str:
    settings = recipe.tune
    what = (
        f"{len(trials)} settings of stage 1, found by {settings.search} search. Each learned weights in {settings.optimize_steps} steps "
        f"of the proxy, fine-tuned {settings.finetune_steps} steps with them and was judged by the {label_of(recipe)} on dev queries, "
        "which neither training nor the final tests contain."
    )
    wary = "".join(f"<li>{esc(line)}</li>" for line in _warnings(recipe, trials, best))
    return (
        f'<header><div class="eyebrow">tdro-ray study</div><h1>{esc(recipe.name)}: Tune</h1>'
        f"<p>{esc(what)}</p><nav>{links}</nav></header>{_verdict(recipe, best)}{_tiles(recipe, trials, best)}"
        f'<h3>Before you rely on this</h3><ul class="warnings">{wary}</ul>'
    )


def _verdict(recipe: Recipe, best: dict[str, Any]) -> str:
    text = (
        f"Trial {best['trial']} is the best: {describe(best['setting'])}, {label_of(recipe)} {best['objective']:.3f}."
    )
    if "rival" not in best:
        text += " It is the recipe's own setting." if best["trial"] == 0 else " The recipe's own setting has no result."
        return f'<div class="verdict"><p>{esc(text)}</p></div>'
    against = best["mean_against_default"]
    sure = against["low"] > 0
    if best["trial"] == 0:
        text += f" It is the recipe's own setting. The next best, trial {best['rival']}, against it: {_with_interval(against)}."
    else:
        ending = "" if sure else ", which does not rule out that they are equal"
        text += f" Against the recipe's own setting: {_with_interval(against)}{ending}."
    if "seeds" in best:
        sure = best["seeds"]["low"] > 0
        text += f" Over {len(best['seeds']['seeds'])} further seeds: {_with_interval(best['seeds'])}."
    return f'<div class="verdict{" good" if sure else ""}"><p>{esc(text)}</p></div>'


def _with_interval(found: dict[str, Any]) -> str:
    ends = f"{number(found['low'], '+.3f')} to {number(found['high'], '+.3f')}"
    return f"{number(found['mean_diff'], '+.3f')} (95% interval {ends})"


def _warnings(recipe: Recipe, trials: list[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    finished = sum(t["status"] == "done" for t in trials)
    lines = [
        f"The best of {finished} was picked on these dev queries, so its lead is flattered. {_confirming(best)}"
        "In the end only a run of the recipe with it counts, on the held-out tests.",
        f"Trials are short ({recipe.tune.optimize_steps} and {recipe.tune.finetune_steps} steps; the recipe takes "
        f"{recipe.optimize.steps} and {recipe.finetune.steps}): eta in particular depends on the number of steps.",
    ]
    lines += [
        f"Trial {t['number']} failed ({describe(t['setting'])}): {t['error'][:300]}"
        for t in trials
        if t["status"] == "failed"
    ]
    stopped = [str(t["number"]) for t in trials if t["status"] == "stopped"]
    if stopped:
        lines.append(
            f"Stopped early by {recipe.tune.scheduler}: {', '.join(stopped)}. Their last evaluation is not the objective."
        )
    return lines


def _confirming(best: dict[str, Any]) -> str:
    if "seeds" in best:
        return "The further seeds draw other rows for the fine-tuning; weights and dev queries stay. "
    return (
        "Intervals are over queries, not over seeds: --set tune.confirm=3 repeats both fine-tunings with three more. "
    )


def _tiles(recipe: Recipe, trials: list[dict[str, Any]], best: dict[str, Any]) -> str:
    done = [t for t in trials if t["status"] == "done"]
    values = sorted(t["objective"] for t in done)
    spent = sum(sum(t["seconds"].values()) for t in done)
    tiles = [(f"{best['objective']:.3f}", f"best {label_of(recipe)}: trial {best['trial']}")]
    if "default" in best and best["trial"] != 0:
        tiles.append((f"{best['default']['objective']:.3f}", "the recipe's own setting"))
    tiles += [
        (f"{values[0]:.3f}–{values[-1]:.3f}", "from the lowest to the highest trial"),
        (f"{len(done)} of {len(trials)}", "trials finished"),
        (duration(spent), "of trial time in all"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{v}</b><span>{esc(t)}</span></div>' for v, t in tiles)
        + "</div>"
    )


def _settings(recipe: Recipe, trials: list[dict[str, Any]], best: dict[str, Any]) -> str:
    done, label = [t for t in trials if t["status"] == "done"], label_of(recipe)
    points = [
        (t["number"], *(t["setting"][f] for f in ("eta", "temperature", "measure")), t["objective"]) for t in done
    ]
    lines = [(t["number"], t["setting"], t["objective"]) for t in done]
    parts = [
        figure(
            f"{label} over eta and temperature: the fuller a point, the higher. Numbers are trials, 0 the recipe's own setting.",
            partial(plots.landscape, points=points, label=label),
            "landscape",
        ),
        figure(
            "Every trial as a line through its settings; the three best in colour.",
            partial(plots.parallel, trials=lines, logs=("eta", "temperature"), label=label),
            "parallel",
        ),
    ]
    if recipe.tune.evaluations > 1:
        ranked = sorted(
            (t for t in trials if t["evaluations"]), key=lambda t: -t["evaluations"][-1][recipe.tune.objective]
        )
        curves = {
            f"trial {t['number']}": (
                [e["step"] for e in t["evaluations"]],
                [e[recipe.tune.objective] for e in t["evaluations"]],
            )
            for t in ranked[:MOST_GROWTH]
        }
        parts.append(
            figure(f"{label} along the fine-tuning.", partial(plots.growth, lines=curves, label=label), "growth")
        )
    return "\n".join([*parts, _trial_table(recipe, trials, best)])


def _trial_table(recipe: Recipe, trials: list[dict[str, Any]], best: dict[str, Any]) -> str:
    own = next((t["objective"] for t in trials if t["number"] == 0 and t["status"] == "done"), None)
    rows = []
    order = sorted(trials, key=lambda t: (-t.get("objective", -1.0), t["number"]))
    for t in order:
        value = t.get("objective")
        change = "" if value is None or own is None or t["number"] == 0 else difference(value - own, False)
        state = {"done": "", "stopped": "stopped early", "failed": f"failed: {t.get('error', '')[:120]}"}[t["status"]]
        name = f"{t['number']}" + ("<small>the recipe's own</small>" if t["number"] == 0 else "")
        cells = [name, *(esc(f"{v:g}" if isinstance(v, float) else v) for v in t["setting"].values())]
        cells += [number(t.get("mean"), ".3f"), number(t.get("worst"), ".3f"), change, esc(state)]
        rows.append((cells, "sum" if t["number"] == best["trial"] else ""))
    measure = f"nDCG@{recipe.evaluate.ndcg_at}"
    head = ["Trial", *trials[0]["setting"], f"Mean {measure}", f"Worst {measure}", "Against 0", ""]
    return "<h3>All trials</h3>" + table([esc(h) for h in head], rows, text_columns=(len(head) - 1,))


def _against(recipe: Recipe, best: dict[str, Any]) -> str:
    per_task = best.get("tasks_against_default")
    if not per_task:
        return missing("Nothing to compare: the recipe's own setting has no result, or no other trial has one.")
    rows = [
        (task, c["mean_diff"], c["low"], c["high"], c["p_holm"] < 0.05)
        for task, c in sorted(per_task.items(), key=lambda item: -item[1]["mean_diff"])
    ]
    caption = (
        f"Trial {best['rival']} against trial 0, task by task, with 95% bootstrap intervals over the dev queries. "
        "Filled and coloured: significant after Holm's correction over the tasks; hollow and grey: not."
    )
    return _seed_table(recipe, best) + figure(
        caption,
        partial(
            shared.differences, rows=rows, label=f"nDCG@{recipe.evaluate.ndcg_at}, trial {best['rival']} − trial 0"
        ),
        "differences",
    )


def _seed_table(recipe: Recipe, best: dict[str, Any]) -> str:
    """Both settings on every further seed."""
    if "seeds" not in best:
        return ""
    runs = best["seeds"]
    rows = [
        ([f"{seed}", number(a, ".3f"), number(b, ".3f"), difference(a - b, False)], "")
        for seed, a, b in zip(runs["seeds"], runs["rival"], runs["default"], strict=True)
    ]
    mean = [sum(runs[name]) / len(rows) for name in ("rival", "default")]
    ends = f"<small>{number(runs['low'], '+.3f')} to {number(runs['high'], '+.3f')}</small>"
    rows.append((["Mean", *(number(m, ".3f") for m in mean), number(runs["mean_diff"], "+.3f") + ends], "sum"))
    head = ["Seed of the fine-tuning", f"Trial {best['rival']}", "Trial 0", "Difference"]
    return f"<h3>Mean nDCG@{recipe.evaluate.ndcg_at} on further seeds</h3>" + table(head, rows)


def _weights(trials: list[dict[str, Any]], folder: Path) -> str:
    from tdro_ray.dro.files import read_trajectory

    done = sorted((t for t in trials if t["status"] == "done"), key=lambda t: -t["objective"])
    parts = []
    for t in done[:TOP]:
        path = read_trajectory(folder / t["id"] / "optimize" / "trajectory.parquet")
        lines = {task: path.alpha_SG[:, i].tolist() for i, task in enumerate(path.tasks)}
        draw = partial(shared.trajectories, steps=path.steps, lines=lines, start=1 / len(path.tasks))
        caption = f"Trial {t['number']} ({describe(t['setting'])}), objective {t['objective']:.3f}. Dotted: uniform."
        parts.append(figure(caption, draw, f"trajectory-{t['number']}", WIDE))
    tasks = sorted(done[0]["alpha"], key=lambda task: -done[0]["alpha"][task])
    rows = [([breakable(task), *(share(t["alpha"][task]) for t in done)], "") for task in tasks]
    head = ["Task", *(f"Trial {t['number']}" for t in done)]
    return "\n".join(parts) + "<h3>Weights at the end of stage 1, best trial first</h3>" + table(head, rows)


def _cost(trials: list[dict[str, Any]]) -> str:
    rows, done = [], [t for t in trials if t["status"] == "done"]
    for t in done:
        spent = t["seconds"]
        parts = [duration(spent[part]) for part in ("optimize", "finetune", "evaluate")]
        rows.append(([f"{t['number']}", *parts, duration(sum(spent.values()))], ""))
    sums = [duration(sum(t["seconds"][part] for t in done)) for part in ("optimize", "finetune", "evaluate")]
    total = duration(sum(sum(t["seconds"].values()) for t in done))
    rows.append((["All", *sums, total], "sum"))
    note = (
        "Collections, hard negatives, the reference model and its scores are made once for all trials; a process that "
        "runs several trials imports its libraries and reads the dev texts once."
    )
    return f'<p class="note">{esc(note)}</p>' + table(["Trial", "Stage 1", "Fine-tuning", "Evaluation", "In all"], rows)


def _use(recipe: Recipe, best: dict[str, Any]) -> str:
    yaml = "\n".join(f"  {option.removeprefix('optimize.').replace('=', ': ', 1)}" for option in best["set"])
    lines = f"# run the recipe with the best setting\n{best['command']}\n\n# or in a recipe file\noptimize:\n{yaml}"
    more = f"# more trials; those that are finished are not repeated\ntdro tune {as_typed(recipe)} --set tune.trials={2 * recipe.tune.trials}"
    return f"<pre>{esc(lines)}\n\n{esc(more)}</pre>"


def _method(recipe: Recipe, trials: list[dict[str, Any]]) -> str:
    terms = {
        "Objective": f"nDCG@{recipe.evaluate.ndcg_at} on the dev queries of each task, searched among its dev passages: the {recipe.tune.objective} over tasks. Never the proxy's loss, whose scale the temperature changes.",
        "eta": "Step size on the logarithm of the task weights.",
        "temperature": "The proxy's tau in stage 1; the fine-tuning keeps the recipe's own.",
        "measure": "What stage 1 takes for the need of a task: ratio, excess, … of proxy and reference loss.",
        "Trial 0": "The recipe's own setting, run under the same short budget.",
        "Further seeds": "The weights of a trial, fine-tuned with again; their interval is Student's t over paired runs.",
        "Interval": "95% percentile bootstrap of the mean difference over dev queries, drawn anew within each task.",
    }
    return "<dl>" + "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in terms.items()) + "</dl>"
