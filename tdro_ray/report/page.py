"""One self-contained HTML page from a run folder: no script, nothing fetched, every text escaped.

`write_report` is the whole interface. A part of the run that is not there yet is said to be missing.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from tdro_ray.report import cleaning, mining, sections
from tdro_ray.report.collect import BASELINE, STAGES, RunFacts, collect
from tdro_ray.report.collect import summary_table as summary_table  # the page's table for a terminal
from tdro_ray.report.findings import (
    Comparisons,
    best_model,
    compare_models,
    effective_tasks,
    shown_model,
    title,
    verdict,
    warnings,
    worst_task,
)
from tdro_ray.report.markup import duration, esc, missing, number, table
from tdro_ray.report.repeat import commands, flatten
from tdro_ray.report.seeds import over_seeds

HIT_TEXT = 320  # characters shown of a hit


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path; the page before it stays until the new one is whole.

    Raises DataError when the folder does not exist.
    """
    facts = collect(run_folder)
    path = facts.folder / "report.html"
    temporary = path.with_name("report.html.tmp")
    temporary.write_text(render(facts), encoding="utf-8")
    temporary.replace(path)
    return path


def render(facts: RunFacts) -> str:
    """Return the page; the same facts give the same bytes."""
    found = compare_models(facts)
    parts = [
        ("results", "Results", sections.results(facts, found)),
        ("seeds", "Over seeds", over_seeds(facts)),
        ("mixture", "The mixture", sections.mixture(facts)),
        ("data", "The data", cleaning.data(facts) + mining.negatives(facts)),
        ("training", "Training", sections.training(facts)),
        ("stages", "Stages and cost", _stages(facts)),
        ("searches", "Sample searches", _searches(facts)),
        ("repeat", "Repeat it", _repeat(facts)),
        ("method", "How to read this", _method(facts)),
    ]
    links = "".join(f'<a href="#{name}">{esc(heading)}</a>' for name, heading, _ in parts)
    body = _head(facts, found, links) + "".join(
        f'\n<section id="{name}"><h2>{esc(heading)}</h2>\n{content}</section>' for name, heading, content in parts
    )
    template = Template(files("tdro_ray.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=esc(f"{facts.name}: tdro-ray report"), body=body)


def _head(facts: RunFacts, found: Comparisons, links: str) -> str:
    finished = max((str(s.get("finished") or "") for s in facts.stages.values()), default="")
    when = f", {finished[:16].replace('T', ' ')} UTC" if finished else ""
    tone, text = verdict(facts, found)
    wary = "".join(f"<li>{esc(line)}</li>" for line in warnings(facts, found))
    return (
        f'<header><div class="eyebrow">tdro-ray run report{esc(when)}</div><h1>{esc(facts.name)}</h1>'
        f"<p>{esc(_what(facts))}</p><nav>{links}</nav></header>"
        f'<div class="verdict {tone}"><p>{esc(text)}</p></div>{_tiles(facts, found)}'
        + (f'<h3>Before you rely on this</h3><ul class="warnings">{wary}</ul>' if wary else "")
    )


def _what(facts: RunFacts) -> str:
    """What was trained on what, in two sentences, as far as it is known."""
    config, tasks = facts.config, facts.ingested or {task: {} for task in facts.tasks}
    rows = [facts.rows(task) for task in tasks]
    data = f"{len(tasks)} tasks" + (f" with {sum(r or 0 for r in rows):,} training rows" if any(rows) else "")
    if not config:
        return f"{data}." if tasks else "Nothing has been run here yet."
    model, finetune, optimize = config.get("model", {}), config.get("finetune", {}), config.get("optimize", {})
    name = str(model.get("name", "?"))
    if name == "tiny":
        tiny = model.get("tiny", {})
        name = f"a small encoder from scratch ({tiny.get('num_layers', '?')} layers, {tiny.get('hidden_size', '?')} dimensions)"
    text = f"Fine-tuned {name} on {data}" if tasks else f"To be fine-tuned: {name}"
    if finetune:
        text += f", {finetune.get('steps', 0):,} steps of {finetune.get('batch_size', 0):,} queries per model"
    if optimize:
        measure, eta, steps = (optimize.get(key, "?") for key in ("measure", "eta", "steps"))
        text += f". Task weights by tDRO: measure {measure}, eta {eta}, {steps} steps of a proxy. Seed {config.get('seed', '?')}"
    return text + "."


def _tiles(facts: RunFacts, found: Comparisons) -> str:
    tiles: list[tuple[str, str]] = []  # (HTML, text)
    best, rival, measure = best_model(facts), shown_model(facts), facts.measure
    if best:
        tiles.append((number(facts.evals[best]["mean"][measure], ".3f"), f"best mean {title(measure)}: {best}"))
    if rival in found.overall:
        comparison, _ = found.overall[rival]
        ends = f"{number(comparison.low, '+.3f')} to {number(comparison.high, '+.3f')}"
        tiles.append((number(comparison.mean_diff, "+.3f"), f"{rival} against {BASELINE}, 95% interval {ends}"))
    if best:
        worst = number(facts.evals[best]["worst"].get(measure), ".3f")
        tiles.append((worst, f"worst task of {best}: {worst_task(facts, best)}"))
    name, learned = facts.learned
    if learned:
        tiles.append(
            (
                f"{effective_tasks(learned.values()):.1f} of {len(learned)}",
                f"effective tasks in the learned weights ({name})",
            )
        )
    seconds = [s.get("seconds") for s in facts.stages.values() if isinstance(s.get("seconds"), (int, float))]
    if seconds:
        tiles.append((duration(sum(seconds)), f"in all, {len(seconds)} stages"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{esc(text)}</span></div>' for value, text in tiles)
        + "</div>"
    )


def _stages(facts: RunFacts) -> str:
    longest = max((float(s.get("seconds") or 0) for s in facts.stages.values()), default=0.0) or 1.0
    rows = []
    for stage, manifest in facts.stages.items():
        seconds = float(manifest.get("seconds") or 0)
        bar = f'<span class="bar" style="width:{100 * seconds / longest:.0f}px"></span>'
        finished = str(manifest.get("finished") or "–")[:19].replace("T", " ")
        key = f"<code>{esc(str(manifest.get('key') or '–')[:12])}</code>"
        rows.append(
            (
                [
                    esc(stage),
                    duration(seconds),
                    bar,
                    esc(finished),
                    key,
                    esc(manifest.get("line") or _facts_text(manifest.get("summary"))),
                ],
                "",
            )
        )
    ran = {stage.partition("-")[0] for stage in facts.stages}
    rows += [([esc(s), "", "", '<span class="missing">not run yet</span>', "", ""], "") for s in STAGES if s not in ran]
    return table(["Stage", "Time", "", "Finished, UTC", "Key", "What came of it"], rows, text_columns=(2, 5))


def _facts_text(summary: Any) -> str:
    """The plain facts of a stage's summary on one line, for a manifest that has no line of its own."""
    if not isinstance(summary, dict):
        return ""
    plain = {key: value for key, value in summary.items() if isinstance(value, (str, int, float))}
    texts = [
        f"{key.replace('_', ' ')} {v if isinstance(v, str) else f'{v:,.4g}' if isinstance(v, float) else f'{v:,}'}"
        for key, v in plain.items()
    ]
    return " · ".join(texts)


def _searches(facts: RunFacts) -> str:
    if not facts.searches:
        return missing("Serve: not run yet, so there are no sample searches.")
    parts = []
    for search in facts.searches:
        hits = "".join(_hit(hit) for hit in search.get("hits") or [] if isinstance(hit, dict))
        parts.append(f'<div class="search"><h3>{esc(search["query"])}</h3><ol>{hits or missing("no hit")}</ol></div>')
    return '<p class="note">Sent over HTTP to the served index, best hits first with their cosine.</p>' + "".join(parts)


def _hit(hit: dict[str, Any]) -> str:
    text = " ".join(str(hit.get("text") or "").split())
    text = text if len(text) <= HIT_TEXT else f"{text[:HIT_TEXT].rstrip()}…"
    score = hit.get("score")
    cosine = f'<span class="score">{number(score, ".3f")}</span>' if isinstance(score, (int, float)) else ""
    return f'<li><b>{esc(hit.get("title") or hit.get("id") or "")}</b>{cosine}<div class="text">{esc(text)}</div></li>'


def _repeat(facts: RunFacts) -> str:
    lines = [f"# {what}\n{command}" for what, command in commands(facts)]
    parts = [
        f"<pre>{esc(chr(10).join(lines))}</pre>"
        if lines
        else missing("config.json: not written yet, so there is no command to give.")
    ]
    versions = [([esc(name), esc(value)], "") for name, value in flatten(facts.versions).items()]
    parts.append(
        "<h3>Versions</h3>"
        + (
            table(["Package", "Version"], versions, text_columns=(1,))
            if versions
            else missing("versions.json: not written yet.")
        )
    )
    settings = [
        ([f"<code>{esc(key)}</code>", f"<code>{esc(json.dumps(value, ensure_ascii=False))}</code>"], "")
        for key, value in flatten(facts.config).items()
    ]
    if settings:
        parts.append(
            f"<details><summary>All {len(settings)} settings</summary>{table(['Setting', 'Value'], settings, text_columns=(1,))}</details>"
        )
    return "".join(parts)


def _method(facts: RunFacts) -> str:
    terms = {
        title(facts.measure): "Quality of a ranking, 0 to 1, with trec_eval's definition. The mean gives every task the same weight; the worst is the lowest task.",
        "Interval": "95% percentile bootstrap of the mean difference over test queries, drawn anew within each task.",
        "p, *": "Two-sided paired randomisation test over queries. In the table of models Holm-corrected over the models, in the table of tasks over the tasks of a model; * is p < 0.05.",
        "Weight": "Share of the fine-tuning batches that a task gives. Before: every task the same. After: as stage 1 left it.",
        "Effective tasks": "exp of the entropy of the weights: as many equally weighted tasks are as spread out.",
        "Rows kept": "Share of all training rows in tasks that the mixture draws from at all.",
    }  # fmt: skip
    return "<dl>" + "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in terms.items()) + "</dl>"
