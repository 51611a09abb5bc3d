"""The part of the page that needs several seeds: what another start would have changed. Returns HTML."""

from __future__ import annotations

from functools import partial
from typing import Any

from tdro_ray.report import plots
from tdro_ray.report.collect import BASELINE, RunFacts
from tdro_ray.report.findings import title
from tdro_ray.report.markup import difference, esc, figure, missing, number, share, table


def over_seeds(facts: RunFacts) -> str:
    """Results and learned weights over the seeds, or what to do to get them."""
    found = facts.seeds
    if not found:
        return missing("One seed only: what follows may be chance. Set seeds=3 (or `tdro compare RECIPE --seeds 3`).")
    parts = [_models(facts, found), _forest(facts, found), *_learned(facts, found)]
    return "\n".join(part for part in parts if part)


def _models(facts: RunFacts, found: dict[str, Any]) -> str:
    rows = []
    for model in _order(facts, found["models"]):
        scores, pair = found["models"][model], found["against"].get(model)
        change, p = "baseline" if model == BASELINE else "–", ""
        if pair:
            mean = pair["mean"]
            sure = mean["low"] > 0 or mean["high"] < 0
            ends = f"<small>{number(mean['low'], '+.3f')} to {number(mean['high'], '+.3f')}</small>"
            change, p = difference(mean["average"], sure, ".4f") + ends, number(pair["p_queries"], ".3f")
        values = scores["mean"]["values"]
        cells = [
            esc(model),
            number(scores["mean"]["average"], ".4f"),
            f"{number(min(values), '.3f')} to {number(max(values), '.3f')}",
            change,
            p,
            number(scores["worst"]["average"], ".3f"),
        ]
        rows.append((cells, ""))
    measure = title(found["measure"])
    head = [
        "Model",
        f"Mean {measure}",
        "Lowest to highest seed",
        f"Against {BASELINE}, 95% over seeds",
        "p over queries",
    ]
    head.append(f"Worst {measure}")
    note = (
        f"{len(found['seeds'])} seeds ({', '.join(map(str, found['seeds']))}): base model, batches, stage 1 and fine-tuning made "
        f"anew under each. The interval is Student's t of the differences to {BASELINE} of the same seed; * leaves out 0. "
        "p over queries tests each query's mean over the seeds, not corrected for the number of models."
    )
    return f'<p class="note">{esc(note)}</p>' + table([esc(h) for h in head], rows)


def _forest(facts: RunFacts, found: dict[str, Any]) -> str:
    pairs = {model: found["against"][model]["mean"] for model in _order(facts, found["against"])}
    if not pairs:
        return ""
    rows = [(m, p["average"], p["low"], p["high"], p["low"] > 0 or p["high"] < 0) for m, p in pairs.items()]
    label = f"mean {title(found['measure'])}, difference to {BASELINE}"
    caption = (
        f"Each mixture against {BASELINE} over the seeds, with 95% intervals; filled where the interval leaves out 0."
    )
    return figure(caption, partial(plots.differences, rows=rows, label=label), "forest")


def _learned(facts: RunFacts, found: dict[str, Any]) -> list[str]:
    weights = found["weights"]
    if not weights:
        return []
    rows = []
    for rival, facts_of in weights.items():
        top = max(facts_of["mean"], key=lambda task: facts_of["mean"][task])
        effective = [e for e in facts_of["effective"] if e is not None]
        cells = [
            esc(rival or "the recipe's own"),
            number(facts_of["kendall"], ".2f"),
            number(facts_of["loss_rank"], "+.2f"),
            number(sum(effective) / len(effective) if effective else None, ".1f"),
            f"{esc(top)} <small>{share(facts_of['mean'][top])}</small>",
        ]
        rows.append((cells, ""))
    head = [
        "Stage 1",
        "Kendall's tau between seeds",
        "Rank correlation with the reference's loss",
        "Effective tasks",
        "Most weight",
    ]
    note = (
        "Kendall's tau: 1 where every seed puts the tasks in the same order, 0 where the order is chance. Rank correlation: above "
        "0 where weight goes to what the reference finds hard, below 0 where it goes to what the reference has solved."
    )
    parts = [
        f'<h3>Learned weights over the seeds</h3><p class="note">{esc(note)}</p>' + table([esc(h) for h in head], rows)
    ]
    own = weights.get("")
    if own:
        order = sorted(own["tasks"], key=lambda task: -own["mean"][task])
        lines = [(task, own["tasks"][task]["values"]) for task in order]
        draw = partial(plots.seed_weights, rows=lines, start=1 / len(lines))
        parts.append(
            figure(
                "Learned weight of each task under every seed (dots) and their mean (bar); dotted: uniform.",
                draw,
                "seed-weights",
            )
        )
    return parts


def _order(facts: RunFacts, names: dict[str, Any]) -> list[str]:
    known = [model for model in facts.evals if model in names]
    return known + [name for name in names if name not in known]
