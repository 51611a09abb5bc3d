"""What a run shows, in sentences and numbers: comparisons with the baseline, the verdict, what to be wary of.

Pure: from the facts of a run to values; knows nothing of HTML or plots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tdro_ray.dro.select import kept_share, repeats
from tdro_ray.evaluate.significance import Comparison, compare_mean, compare_tasks, holm
from tdro_ray.report.collect import BASELINE, RunFacts

RESAMPLES = 4000  # p-values no finer than 0.00025; a page over 25 tasks stays a matter of seconds
LEVEL = 0.05  # p below which a difference is called significant
MOVED = 0.01  # share of the weight that may change hands between the last two windows of stage 1
AGREE = 0.5  # Kendall's tau between seeds below which their weights are called different
CHANCE = 0.8  # share of the loss of guessing above which a task counts as not learned
TAKEN = 0.8  # share of what mining found above which the margins took too much
MANY_REPEATS = 10  # passes over a task in one fine-tuning above which it is named


@dataclass(frozen=True)
class Comparisons:
    """Every model against the baseline. p-values are Holm-corrected: over the tasks of a model, over the models."""

    tasks: dict[str, dict[str, tuple[Comparison, float]]] = field(default_factory=dict)  # model -> task
    overall: dict[str, tuple[Comparison, float]] = field(default_factory=dict)  # model -> mean over tasks
    problems: list[str] = field(default_factory=list)


def compare_models(facts: RunFacts) -> Comparisons:
    """Return the paired comparisons of every evaluated model with the baseline; empty without per-query scores."""
    base = facts.per_query.get(BASELINE, {})
    tasks, overall, problems = {}, {}, []
    for model, scores in facts.per_query.items():
        shared = [task for task in scores if task in base and scores[task]]
        unequal = [task for task in shared if set(scores[task]) != set(base[task])]
        if unequal:
            problems.append(
                f"{model} and {BASELINE} were tested on different queries of {_names(unequal)}: not compared there"
            )
        shared = [task for task in shared if task not in unequal]
        if model != BASELINE and shared:
            ours, theirs = {t: scores[t] for t in shared}, {t: base[t] for t in shared}
            tasks[model] = compare_tasks(ours, theirs, resamples=RESAMPLES)
            overall[model] = compare_mean(ours, theirs, resamples=RESAMPLES)
    adjusted = holm({model: comparison.p for model, comparison in overall.items()})
    return Comparisons(tasks, {m: (c, adjusted[m]) for m, c in overall.items()}, problems)


def best_model(facts: RunFacts) -> str | None:
    """Name of the model with the highest mean of the headline measure, None before the evaluation."""
    scores = {model: result["mean"].get(facts.measure) for model, result in facts.evals.items()}
    scores = {model: score for model, score in scores.items() if score is not None}
    return max(scores, key=lambda model: scores[model]) if scores else None


def shown_model(facts: RunFacts) -> str | None:
    """The model whose differences to the baseline are plotted: the best one, or the best of the others."""
    others = {m: r["mean"].get(facts.measure, -1.0) for m, r in facts.evals.items() if m != BASELINE}
    return max(others, key=lambda model: others[model]) if others and BASELINE in facts.evals else None


def significant(p: float) -> bool:
    return p < LEVEL


def verdict(facts: RunFacts, found: Comparisons) -> tuple[str, str]:
    """Return (tone, sentences): tone is "good", "bad" or "open"; the sentences say which model won and how surely."""
    best, rival = best_model(facts), shown_model(facts)
    if best is None:
        return "open", "Not evaluated yet: there is no result to judge the mixture by."
    measure, means = title(facts.measure), {m: r["mean"].get(facts.measure) for m, r in facts.evals.items()}
    if rival is None:
        return (
            "open",
            f"Only {best} was evaluated: mean {measure} {means[best]:.3f}. There is nothing to compare it with.",
        )
    if facts.seeds.get("against"):
        return _verdict_over_seeds(facts)
    if rival not in found.overall:
        text = f"{best} has the highest mean {measure}, {means[best]:.3f}; {rival} {means[rival]:.3f}, {BASELINE} {means[BASELINE]:.3f}."
        return "open", text + " There are no per-query scores, so the difference was not tested."
    comparison, p = found.overall[rival]
    numbers = (
        f"mean {measure} {means[rival]:.3f} against {means[BASELINE]:.3f} of {BASELINE}: {comparison.mean_diff:+.3f} "
        f"(95% interval {comparison.low:+.3f} to {comparison.high:+.3f}, {p_text(p)}{_corrected(len(found.overall))})"
    )
    if not significant(p):
        return (
            "open",
            f"No model is shown to beat {BASELINE}. The nearest is {rival}: {numbers}. A difference of this size can be chance.",
        )
    if comparison.mean_diff > 0:
        return "good", f"{rival} beats {BASELINE}: {numbers}."
    return "bad", f"{BASELINE} beats every other mixture. The nearest is {rival}: {numbers}."


def _verdict_over_seeds(facts: RunFacts) -> tuple[str, str]:
    against, models = facts.seeds["against"], facts.seeds["models"]
    name = max(against, key=lambda model: against[model]["mean"]["average"])
    mean, measure = against[name]["mean"], title(facts.seeds["measure"])
    numbers = (
        f"mean {measure} {models[name]['mean']['average']:.3f} against {models[BASELINE]['mean']['average']:.3f} of {BASELINE} over "
        f"{len(facts.seeds['seeds'])} seeds: {mean['average']:+.4f} (95% interval over seeds {mean['low']:+.4f} to {mean['high']:+.4f})"
    )
    if mean["low"] > 0:
        several = (
            f" It is the best of {len(against)} mixtures, which the interval does not account for."
            if len(against) > 1
            else ""
        )
        return "good", f"{name} beats {BASELINE}: {numbers}.{several}"
    if mean["high"] < 0:
        return "bad", f"{BASELINE} beats every other mixture. The nearest is {name}: {numbers}."
    return "open", f"No mixture is shown to beat {BASELINE} over the seeds. The best is {name}: {numbers}."


def warnings(facts: RunFacts, found: Comparisons) -> list[str]:
    """Return everything that a reader must know before trusting the result, one sentence or two each."""
    return [
        *_weight_warnings(facts),
        *_noise_warnings(facts),
        *_result_warnings(facts, found),
        *_data_warnings(facts),
        *_mining_warnings(facts),
        *_stage_warnings(facts),
        *(f"{problem}." for problem in [*facts.problems, *found.problems]),
    ]


def effective_tasks(weights: Iterable[float]) -> float:
    """Return exp(entropy), the number of equally weighted tasks with the same entropy."""
    share = np.array([w for w in weights if w > 0], dtype=np.float64)
    share /= share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def weight_shift(facts: RunFacts) -> float | None:
    """Return the share of weight that changed hands between the means of the last two tenths of stage 1 (0 to 1).

    None without a trajectory of at least 20 updates.
    """
    if facts.trajectory is None or len(facts.trajectory.steps) < 20:
        return None
    alpha_SG = facts.trajectory.alpha_SG
    window = len(alpha_SG) // 10
    recent_G, before_G = alpha_SG[-window:].mean(axis=0), alpha_SG[-2 * window : -window].mean(axis=0)
    return float(np.abs(recent_G - before_G).sum() / 2)


def passes(facts: RunFacts, weights: dict[str, float]) -> dict[str, float]:
    """Return how often fine-tuning draws each row of a task under these weights; {} where rows or budget are unknown."""
    rows = {task: facts.rows(task) for task in weights}
    finetune = facts.config.get("finetune", {})
    if not weights or not all(rows.values()) or not {"steps", "batch_size"} <= set(finetune):
        return {}
    return repeats(weights, {t: int(r) for t, r in rows.items() if r}, finetune["steps"] * finetune["batch_size"])


def rows_kept(facts: RunFacts, weights: dict[str, float]) -> float | None:
    """Return the share of all training rows that tasks of weight above 0 hold; None where rows are unknown."""
    rows = {task: facts.rows(task) for task in {*weights, *facts.ingested}}
    if not rows or not all(rows.values()):
        return None
    return kept_share(weights, {task: int(count) for task, count in rows.items() if count})


def worst_task(facts: RunFacts, model: str) -> str:
    """Name of the task on which the model scores lowest."""
    scores = {task: facts.score(model, task) for task in facts.evals[model]["tasks"]}
    known = {task: score for task, score in scores.items() if score is not None}
    return min(known, key=lambda task: known[task], default="")


def _stage_warnings(facts: RunFacts) -> list[str]:
    """What the stages themselves warned of, as `summary["warnings"]` of their manifests."""
    found = []
    for stage, manifest in facts.stages.items():
        summary = manifest.get("summary")
        texts = summary.get("warnings") if isinstance(summary, dict) else None
        found += [f"Stage {stage}: {text}." for text in texts or []]
    return found


def total_rejects(info: Mapping[str, Any]) -> int:
    """Input lines of a task that the ingest refused; its facts hold a count, or one count per reason."""
    rejects = info.get("rejects") or 0
    return sum(rejects.values()) if isinstance(rejects, dict) else int(rejects)


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _weight_warnings(facts: RunFacts) -> list[str]:
    name, weights = facts.learned
    if not weights:
        return []
    found = []
    number, (top, share) = effective_tasks(weights.values()), max(weights.items(), key=lambda item: item[1])
    if len(weights) > 2 and (number < len(weights) / 3 or share > 0.5):
        found.append(
            f"The weights have collapsed onto few tasks: {name} spreads over {number:.1f} effective tasks of {len(weights)}, "
            f"{top} alone takes {share:.0%}. A smaller eta or a floor keeps more tasks alive."
        )
    shift = weight_shift(facts)
    if shift is not None and shift >= MOVED:
        found.append(
            f"Stage 1 has not converged: {shift:.1%} of the weight changed hands between the last two tenths of its steps. "
            "The weights depend on where it was stopped; train it longer or lower eta."
        )
    repeated = {task: times for task, times in passes(facts, weights).items() if times > MANY_REPEATS}
    if repeated:
        listed = _names([f"{task} ({times:.0f} times)" for task, times in repeated.items()])
        found.append(
            f"Fine-tuning under {name} repeats every row of {listed}: the model may learn those rows by heart."
        )
    scores = {t: facts.score(BASELINE, t) for t in weights} if BASELINE in facts.evals else {}
    solved = {t: s for t, s in scores.items() if s is not None}
    rank = _rank_correlation([weights[t] for t in solved], list(solved.values())) if len(solved) >= 6 else 0.0
    if rank > 0.5:
        found.append(
            f"Weight went to the tasks that {BASELINE} already solves: rank correlation {rank:+.2f} between learned weight and "
            f"{title(facts.measure)} of {BASELINE}. A robust mixture would favour the hard ones."
        )
    return found


def _result_warnings(facts: RunFacts, found: Comparisons) -> list[str]:
    texts = []
    for model, tasks in found.tasks.items():
        worse = [task for task, (comparison, p) in tasks.items() if comparison.mean_diff < 0 and significant(p)]
        if worse:
            texts.append(f"{model} is significantly worse than {BASELINE} on {_names(worse)}.")
    if any(len(set(r["tasks"]) ^ set(facts.evals[next(iter(facts.evals))]["tasks"])) for r in facts.evals.values()):
        texts.append("The models were not evaluated on the same tasks: their means cannot be compared.")
    if facts.seeds:
        texts += _seed_warnings(facts)
    elif found.overall:
        texts.append(
            "One training run per model: the intervals cover the choice of test queries, not training noise. "
            "Another seed can move a score by more."
        )
    return texts


def _seed_warnings(facts: RunFacts) -> list[str]:
    texts = []
    own = facts.seeds.get("weights", {}).get("")
    if own and own["kendall"] is not None and own["kendall"] < AGREE:
        texts.append(
            f"The seeds do not agree on the weights: Kendall's tau between their orders of the tasks is {own['kendall']:.2f}. "
            "One seed's weights say little; use weights/seed-mean.json, or a longer stage 1."
        )
    spread = [max(m["mean"]["values"]) - min(m["mean"]["values"]) for m in facts.seeds["models"].values()]
    texts.append(
        f"From seed to seed one model's mean {title(facts.measure)} moves by up to {max(spread):.3f}. Tables and plots outside "
        "“Over seeds” are of the first seed alone."
    )
    return texts


def _noise_warnings(facts: RunFacts) -> list[str]:
    """Tasks that gained weight although the reference is not much better on them than chance."""
    _, weights = facts.learned
    options = facts.config.get("optimize", {})
    logged = [s["reference_loss"] for s in facts.metrics.get("optimize", []) if s.get("reference_loss")]
    if not logged or not weights or facts.trajectory is None or len(logged[0]) != len(facts.trajectory.tasks):
        return []
    chance = float(np.log1p(options.get("num_negatives", 7)))
    loss_G = np.mean(logged, axis=0)
    noisy = [
        task
        for task, loss in zip(facts.trajectory.tasks, loss_G, strict=True)
        if loss > CHANCE * chance and weights.get(task, 0.0) > 1 / len(weights)
    ]
    if not noisy:
        return []
    return [
        f"Weight went to {_names(noisy)}, on which the reference is hardly better than chance (loss above {CHANCE:.0%} of "
        f"{chance:.2f}): noisy labels, or too hard to learn in this many steps. Look at their rows."
    ]


def _data_warnings(facts: RunFacts) -> list[str]:
    tasks = {task: facts.ingested.get(task, {}) for task in facts.tasks}
    tested = {task for result in facts.evals.values() for task in result["tasks"]}
    texts = []
    if facts.evals and (untested := [task for task in tasks if task not in tested]):
        texts.append(f"No held-out test for {_names(untested)}: trained on, but not in the mean.")
    small = [f"{t} ({i['test_queries']})" for t, i in tasks.items() if 0 < (i.get("test_queries") or 0) < 30]
    if small:
        texts.append(f"Fewer than 30 test queries: {_names(small)}. Their scores are coarse.")
    rejected = {task: total_rejects(info) for task, info in tasks.items()}
    if any(rejected.values()):
        listed = _names([f"{task} ({count:,})" for task, count in rejected.items() if count])
        texts.append(
            f"Input lines were refused while ingesting {listed}; each is listed with its reason in rejects.jsonl."
        )
    return texts


def _mining_warnings(facts: RunFacts) -> list[str]:
    tasks = (facts.stages.get("mine", {}).get("summary") or {}).get("tasks") or {}
    texts = []
    taken = {t: share for t, i in tasks.items() if (share := i.get("share_filtered") or 0) > TAKEN}
    if taken:
        listed = _names([f"{task} ({share:.0%})" for task, share in taken.items()])
        texts.append(
            f"The margins took most of what mining found for {listed}: the model that searched scores other passages as "
            "high as the positives. Its negatives are random instead; mine with a model of these texts' language, or wider margins."
        )
    hard = {t: (i.get("mean_given") or 0) + (i.get("mean_mined") or 0) for t, i in tasks.items()}
    drawn = {t: (tasks[t].get("random_filled") or 0) / max(1.0, float(facts.rows(t) or 0)) for t in tasks}
    if few := [task for task in tasks if drawn[task] > hard[task] and task not in taken]:
        texts.append(
            f"More negatives are random than mined or given for {_names(few)}: mine deeper, or with an encoder."
        )
    return texts


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return float(spearmanr(a, b).statistic)


def _corrected(models: int) -> str:
    return f", Holm-corrected over {models} models" if models > 1 else ""


def title(measure: str) -> str:
    return measure.replace("ndcg", "nDCG").replace("recall", "Recall")


def _names(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
