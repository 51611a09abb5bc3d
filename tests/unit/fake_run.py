"""A made-up run folder with every part that a real one has, for tests of the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.config import Recipe
from tdro_ray.dro.files import WeightFile, write_trajectory, write_weights
from tdro_ray.evaluate.benchmark import summarise
from tdro_ray.evaluate.seeds import summarise as summarise_seeds

TASKS = [
    "docstring_to_code",
    "signature_to_docstring",
    "readme_section",
    "language_reference",
    "exception_to_function",
    "parameter_description",
    "module_summary",
    "command_line_option",
    "stackexchange_duplicate_questions_title-body",
]
DESCRIPTION = "docstring of a function -> its source without the docstring"


def make_run(
    folder: Path,
    tasks: list[str] | None = None,
    gain: float = 0.03,
    steps: int = 200,
    untested: str = "",
    queries: int = 150,
    drift: float = 0.1,
) -> Path:
    """Write a run of three models (uniform, current, top70) and return its folder. `gain` is what `current` adds to a score."""
    tasks = tasks or TASKS
    rng = np.random.default_rng(len(tasks))
    sizes = {task: int(n) for task, n in zip(tasks, rng.integers(600, 9000, len(tasks)), strict=True)}
    alpha = make_trajectory(rng, len(tasks), steps, drift)
    learned = dict(zip(tasks, alpha[-1].tolist(), strict=True))
    recipe = Recipe.model_validate(
        {"name": "quickstart", "finetune": {"steps": 400, "batch_size": 64}, "optimize": {"steps": steps}}
    )
    write_json(folder / "config.json", recipe.model_dump(mode="json"))
    write_json(folder / "versions.json", {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0", "tdro_ray": "0.1.0"})
    write_weight_files(folder, tasks, learned, sizes, alpha, steps)
    write_stages(folder, tasks, sizes, untested, queries)
    write_cleaning(folder, tasks, sizes)
    write_results(folder, rng, [t for t in tasks if t != untested], gain, queries)
    write_json(folder / "serve.json", {"url": "http://127.0.0.1:8000", "queries": searches()})
    return folder


def make_compared_run(folder: Path, tasks: list[str] | None = None) -> Path:
    """Write a run of seven mixtures under three seeds, with what `tdro influence` adds, and return its folder."""
    folders = [folder, folder / "seeds" / "43", folder / "seeds" / "44"]
    for i, seed in enumerate(folders):
        make_run(seed, tasks, gain=0.02 + 0.01 * i, drift=0.1 + 0.03 * i, queries=40)
        for model in ("proportional", "n^0.5", "group_dro", "official", "official.top70"):
            for ending in (".json", ".per_query.json"):
                shutil.copy2(seed / "eval" / f"top70{ending}", seed / "eval" / f"{model}{ending}")
    evaluated = json.loads((folder / "stages" / "evaluate" / "manifest.json").read_text(encoding="utf-8"))["key"]
    write_json(
        folder / "seeds.json",
        {"seeds": [42, 43, 44], "evaluate": evaluated, **summarise_seeds(folders, {"": ("optimize", "")}, "uniform")},
    )
    names = tasks or TASKS
    rng = np.random.default_rng(3)
    scores = {task: float(rng.uniform(0.3, 0.8)) for task in names}
    without = {left: {t: s + float(rng.normal(0, 0.02)) for t, s in scores.items()} for left in names}
    record = {
        "measure": "ndcg@10",
        "tasks": names,
        "all": scores,
        "without": without,
        "noise": dict.fromkeys(names, 0.01),
        "steps": 40,
    }
    write_json(folder / "influence" / "influence.json", record)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_trajectory(rng: np.random.Generator, num_tasks: int, steps: int, drift: float) -> np.ndarray:
    """Exponentiated gradient on drifting signals, (steps, tasks)."""
    pulls, logits, rows = rng.normal(0, drift, num_tasks), np.zeros(num_tasks), []
    for step in range(steps):
        signal = pulls * np.exp(-3 * step / steps) + rng.normal(0, 0.1, num_tasks)
        logits = logits + 20 / steps * signal
        rows.append(np.exp(logits) / np.exp(logits).sum())
    return np.array(rows)


def write_weight_files(
    folder: Path, tasks: list[str], learned: dict[str, float], sizes: dict[str, int], alpha: np.ndarray, steps: int
) -> None:
    weights = folder / "weights"
    current = WeightFile(learned, sizes, {"measure": "ratio", "seed": 42})
    write_weights(weights / "current.json", current)
    write_weights(weights / "mean.json", WeightFile(dict(zip(tasks, alpha.mean(axis=0).tolist(), strict=True)), sizes))
    write_weights(
        weights / "ema.json", WeightFile(dict(zip(tasks, alpha[-10:].mean(axis=0).tolist(), strict=True)), sizes)
    )
    write_weights(weights / "top70.json", current.selected(70))
    write_trajectory(weights / "trajectory.parquet", range(1, steps + 1), tasks, alpha, alpha * 0)


def write_stages(folder: Path, tasks: list[str], sizes: dict[str, int], untested: str, queries: int) -> None:
    seconds = {"ingest": 41.2, "clean": 3.1, "mine": 22.7, "reference": 68.0, "score": 12.4, "optimize": 54.3, "finetune-current": 66.1, "finetune-top70": 64.9, "evaluate": 31.5, "index": 6.1, "serve": 9.8}  # fmt: skip
    ingested = {
        task: {
            "rows": sizes[task],
            "passages": 2 * sizes[task],
            "test_queries": 0 if task == untested else queries,
            "symmetric": task.startswith("stack"),
            "language": "en",
            "description": DESCRIPTION,
            "rejects": {"empty query": 3} if task == tasks[2] else {},
        }
        for task in tasks
    }
    example = {"query": tasks[0], "positive": "the answer", "negative": "nearly the answer", "positive_score": 0.81, "negative_score": 0.72}  # fmt: skip
    mined = {
        task: {"method": "encoder", "mean_given": 0.5, "mean_mined": 0.2 if task == tasks[2] else 6.0, "random_filled": 6 * sizes[task] if task == tasks[2] else sizes[task] // 2, "share_filtered": 0.93 if task == tasks[1] else 0.12, "margin_percentiles": [0.01, 0.1, 0.3], "examples": [example]}
        for task in tasks
    }  # fmt: skip
    summaries = {
        "ingest": {"tasks": ingested},
        "mine": {"tasks": mined},
        "finetune-top70": {"rows_per_s": 812.4, "warnings": [f"weight of {tasks[-1]} rounds to no step"]},
    }
    for i, (stage, spent) in enumerate(seconds.items()):
        summary = summaries.get(stage, {"rows": sum(sizes.values()), "rows_per_s": 812.4, "warnings": []})
        manifest = {
            "stage": stage,
            "key": f"{i}3f9ac51e07b2",
            "seconds": spent,
            "finished": f"2025-03-01T10:{10 + i}:05",
            "summary": summary,
            "outputs": [],
        }
        write_json(folder / "stages" / stage / "manifest.json", manifest)
    rng = np.random.default_rng(1)
    for stage, start in {"reference": 3.9, "optimize": 1.9, "finetune-current": 3.7, "finetune-top70": 3.6}.items():
        lines = []
        for step in range(10, 401, 10):
            loss = start * np.exp(-step / 150) + 0.8 + rng.normal(0, 0.15)
            record = {
                "step": step,
                "loss": loss,
                "lr": 1e-4,
                "tokens_per_s": 15_200,
                "data_wait_s": 0.004,
                "step_s": 0.17,
                "peak_memory_mb": 1290,
            }
            lines.append(
                json.dumps(
                    {
                        **record,
                        "proxy_loss": [0.0, *(loss + 0.2 for _ in tasks[1:])],
                        "reference_loss": [1.1] * len(tasks),
                    }
                    if stage == "optimize"
                    else record
                )
            )
        (folder / "stages" / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_cleaning(folder: Path, tasks: list[str], sizes: dict[str, int]) -> None:
    """What cleaning leaves: one task's text among the examples."""
    lengths = {"p50": 40, "p95": 90, "max": 200, "mean": 44.0, "histogram": [0, 0, 1, 5, 60, 30, 2]}
    example = {"reason": "contaminated", "dropped": True, "row": 3, "id": "3", "query": tasks[-1], "other": f"{tasks[0]}/test", "other_id": "q1", "other_query": tasks[-1], "similarity": 0.95}  # fmt: skip
    cleaned = {
        task: {
            "rows": sizes[task],
            "kept": sizes[task] - 1,
            "counts": {"contaminated": 1, "near_duplicates": 2, "across_tasks": 0},
            "examples": [example],
        }
        for task in tasks
    }
    settings = {"threshold": 0.9, "contaminated": "drop", "near_duplicates": "report", "across_tasks": "report"}
    write_json(
        folder / "stages" / "clean" / "clean.json", {"settings": settings, "test_queries": 900, "tasks": cleaned}
    )
    audit = {
        "query_characters": lengths, "passage_characters": lengths, "query_languages": {"en": 0.9, "de": 0.1}, "repeated_queries": 3,
        "rows_with_shared_positive": 0.1, "rows_without_negatives": 1.0, "query_is_passage": 0, "ids_with_two_queries": 0, "docids_with_two_texts": 0,
    }  # fmt: skip
    write_json(folder / "stages" / "clean" / "audit.json", {task: {"rows": sizes[task], **audit} for task in tasks})


def write_results(folder: Path, rng: np.random.Generator, tasks: list[str], gain: float, queries: int) -> None:
    base = {task: rng.beta(1.2, 1.2, queries) * rng.uniform(0.35, 0.95) for task in tasks}
    for model, lift in {"uniform": 0.0, "current": gain, "top70": gain / 3}.items():
        # the noise fades towards 0 and 1, so that nothing is cut off there and the mean stays where it is
        scores = {
            t: np.clip(
                b
                + (rng.normal(lift, abs(lift) / 2) + rng.normal(0, 0.5, queries) * b * (1 - b)) * (model != "uniform"),
                0,
                1,
            )
            for t, b in base.items()
        }
        write_json(
            folder / "eval" / f"{model}.json",
            summarise(
                {
                    t: {"ndcg@10": float(s.mean()), "recall@100": float(min(1, s.mean() + 0.2))}
                    for t, s in scores.items()
                }
            ),
        )
        write_json(
            folder / "eval" / f"{model}.per_query.json",
            {t: {f"q{i}": float(x) for i, x in enumerate(s)} for t, s in scores.items()},
        )


def searches() -> list[dict[str, Any]]:
    text = 'def fromisoformat(cls, date_string): """Construct a date from a string in ISO 8601 format.""" ' * 6
    hits = [
        {"id": f"datetime.{i}", "score": 0.83 - 0.04 * i, "title": f"datetime.date.fromisoformat{i}", "text": text}
        for i in range(3)
    ]
    return [{"query": query, "hits": hits} for query in ("parse an ISO 8601 date", "read a gzip file line by line")]
