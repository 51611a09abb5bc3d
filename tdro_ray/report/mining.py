"""The part of the page on hard negatives: where they came from, how far they are from the positive, with examples."""

from __future__ import annotations

from functools import partial
from typing import Any

from tdro_ray.report import plots
from tdro_ray.report.collect import RunFacts
from tdro_ray.report.markup import breakable, esc, figure, missing, number, share, table

EXAMPLES = 2  # per task
TEXT = 160  # characters shown of a text


def negatives(facts: RunFacts) -> str:
    """Negatives a row by where they came from, margins and what they took."""
    tasks = (facts.stages.get("mine", {}).get("summary") or {}).get("tasks") or {}
    sources = {task: _a_row(found, facts.rows(task)) for task, found in tasks.items()}
    if not sources:
        return f"<h3>Hard negatives</h3>{missing('Mine: not run yet.')}"
    scored = any(found.get("margin_percentiles") for found in tasks.values())
    filtered = any(found.get("share_filtered") is not None for found in tasks.values())
    rows = []
    for task, found in tasks.items():
        cells = [breakable(task), *(number(count, ".2f") for count in sources[task])]
        cells += [share(found.get("share_filtered"))] if filtered else []
        rows.append(([*cells, *(_margins(found) if scored else [])], ""))
    methods = sorted({str(found.get("method")) for found in tasks.values()})
    head = ["Task", "Given", "Mined", "Random"]
    note = (
        f"Negatives a row; searched with {', '.join(methods)}. Random ones fill up where the search found too few passages: they are "
        "easy, and many of them ask for another search (mine.method=encoder) or a deeper one (mine.last_rank)."
    )
    if filtered:
        head += ["Taken by the margins"]
        note += (
            " Where the margins took most of what was found, the model does not tell these passages apart: try another."
        )
    if scored:
        head += ["Margin, 5 %", "Median", "95 %"]
        note += " Margin: score of the positive less that of a mined negative; below zero the negative is nearer."
    picture = figure(
        "Hard negatives a row, by where they came from.",
        partial(plots.negative_sources, rows=[(task, *counts) for task, counts in sources.items()]),
        "negatives",
    )
    shown = f'<h3>Hard negatives</h3><p class="note">{esc(note)}</p>{picture}{table([esc(h) for h in head], rows)}'
    examples = [_example(task, e) for task, found in tasks.items() for e in (found.get("examples") or [])[:EXAMPLES]]
    if not examples:
        return shown
    head = ["Task", "Query", "Positive", "Mined negative", "Scores"]
    return f"{shown}<details><summary>Examples</summary>{table(head, examples, text_columns=(1, 2, 3))}</details>"


def _a_row(found: dict[str, Any], rows: float | None) -> tuple[float, float, float]:
    return (
        float(found.get("mean_given") or 0),
        float(found.get("mean_mined") or 0),
        float(found.get("random_filled") or 0) / max(1.0, float(rows or 0)),
    )


def _margins(found: dict[str, Any]) -> list[str]:
    percentiles = found.get("margin_percentiles") or [None] * 3
    return [number(value, ".3f") for value in percentiles]


def _example(task: str, found: dict[str, Any]) -> tuple[list[str], str]:
    texts = [esc(" ".join(str(found[key]).split())[:TEXT]) for key in ("query", "positive", "negative")]
    scores = f"{number(found['positive_score'], '.3f')}<small>{number(found['negative_score'], '.3f')}</small>"
    return [breakable(task), *texts, scores], ""
