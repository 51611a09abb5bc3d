"""The part of the page on the training data: what the audit found in each task, what cleaning dropped, with examples."""

from __future__ import annotations

from functools import partial
from typing import Any

from tdro_ray.report import plots
from tdro_ray.report.collect import RunFacts
from tdro_ray.report.markup import breakable, esc, figure, missing, number, share, table

REASONS = {"contaminated": "Near a test query", "near_duplicates": "Near an own row", "across_tasks": "In another task"}
EXAMPLES = 3  # per task and reason
TEXT = 160  # characters shown of a query


def data(facts: RunFacts) -> str:
    """The audit of every task, and the rows that repeat a test query or another row."""
    if not facts.audit and not facts.cleaning:
        return missing("Clean: not run yet, so there is no audit of the tasks.")
    return _audit(facts) + _cleaning(facts)


def _audit(facts: RunFacts) -> str:
    rows, profiles = [], []
    for task, found in sorted(facts.audit.items()):
        if not isinstance(found, dict) or not found.get("rows"):
            continue
        query, passage = found["query_characters"], found["passage_characters"]
        cells = [breakable(task), number(found["rows"]), _lengths(query), _lengths(passage)]
        cells += [_languages(found["query_languages"]), number(found["repeated_queries"])]
        cells += [share(found["rows_with_shared_positive"]), share(found["rows_without_negatives"])]
        cells += [number(found[key]) for key in ("query_is_passage", "ids_with_two_queries", "docids_with_two_texts")]
        rows.append((cells, ""))
        profiles.append((task, query["histogram"], passage["histogram"]))
    if not rows:
        return missing("Audit: nothing was audited.")
    head = ["Task", "Rows", "Query, characters", "Passage, characters", "Language of queries", "Repeated queries"]
    head += ["Shared positive", "No negatives", "Query is passage", "Ids with two queries", "Docids with two texts"]
    note = (
        "Characters: median, below it the 95th percentile. Language: guessed on a sample. Repeated queries: rows beyond the first with "
        "the same query. Shared positive: share of rows whose positive is another row's too, so that in-batch negatives can be false."
    )
    draw = partial(plots.length_profiles, rows=profiles)
    picture = figure("Lengths of queries and passages, task by task (each scaled to its own peak).", draw, "lengths")
    return f'<h3>Audit</h3><p class="note">{esc(note)}</p>{table([esc(h) for h in head], rows)}{picture}'


def _lengths(found: dict[str, Any]) -> str:
    return f"{number(found['p50'])}<small>{number(found['p95'])}</small>"


def _languages(found: dict[str, float]) -> str:
    return esc(", ".join(f"{name} {part:.0%}" for name, part in list(found.items())[:2])) or "–"


def _cleaning(facts: RunFacts) -> str:
    tasks, settings = facts.cleaning.get("tasks") or {}, facts.cleaning.get("settings") or {}
    if not tasks:
        return missing("Cleaning: not run yet.")
    looked = [reason for reason in REASONS if settings.get(reason) != "keep"]
    rows = []
    for task, found in tasks.items():
        counts = [number(found["counts"].get(reason, 0)) for reason in looked]
        rows.append(([breakable(task), number(found["rows"]), *counts, number(found["rows"] - found["kept"])], ""))
    head = ["Task", "Rows", *(f"{REASONS[r]} ({settings.get(r)})" for r in looked), "Dropped"]
    note = (
        f"Rows whose query has at least {settings.get('threshold', 0):g} of its character trigrams in common with one of "
        f"{facts.cleaning.get('test_queries', 0):,} test and dev queries, or with another row's. Every one is in stages/clean/found."
    )
    shown = f'<h3>Cleaning</h3><p class="note">{esc(note)}</p>{table([esc(h) for h in head], rows)}'
    examples = [cells for task, found in tasks.items() for cells in _examples(task, found["examples"])]
    if not examples:
        return shown
    head = ["Task", "Why", "Similarity", "Query", "Repeats", "Of"]
    return f"{shown}<details><summary>Examples</summary>{table(head, examples, text_columns=(3, 4))}</details>"


def _examples(task: str, examples: list[dict[str, Any]]) -> list[tuple[list[str], str]]:
    rows = []
    for reason, why in REASONS.items():
        for e in [e for e in examples if e["reason"] == reason][:EXAMPLES]:
            texts = [esc(" ".join(str(e[key]).split())[:TEXT]) for key in ("query", "other_query")]
            where = breakable(e["other"])
            rows.append(([breakable(task), esc(why), number(e["similarity"], ".2f"), *texts, where], ""))
    return rows
