"""What a run folder holds, read into one record. Every part may be missing; a part that cannot be read is named.

    config.json                       the resolved recipe
    versions.json, serve.json         packages; sample searches
    stages/<stage>/manifest.json      {"stage", "key", "seconds", "finished", "line", "summary", "outputs"}
    stages/<stage>/metrics.jsonl      one JSON object per logged step, for the stages that train
    stages/clean/clean.json, audit.json   rows that repeat others; lengths, languages, repeats of each task
    weights/<name>.json               weight files
    weights/trajectory.parquet        weights over stage 1
    seeds.json                        results and weights over several seeds
    influence/influence.json          scores with one task left out at a time
    eval/<model>.json                 {"tasks", "mean", "worst"}; eval/<model>.per_query.json {task: {query: score}}

Knows the files; neither plots nor statistics.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tdro_ray.dro.files import Trajectory, WeightFile, read_trajectory, read_weights
from tdro_ray.errors import DataError
from tdro_ray.report.markup import share

T = TypeVar("T")
BASELINE = "uniform"  # the model that every other one is compared with
STAGES = (
    "ingest",
    "clean",
    "mine",
    "reference",
    "score",
    "optimize",
    "finetune",
    "evaluate",
    "index",
    "serve",
)
LEARNED = ("current", "mean", "ema")  # weight files of the learned mixture, the first one there is shown


@dataclass(frozen=True)
class RunFacts:
    """All that the page and the terminal table draw from."""

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    searches: list[dict[str, Any]]  # {"query", "hits": [{"id", "score", "title", "text"}]}
    stages: dict[str, dict[str, Any]]  # manifests of the stages that ran, in pipeline order
    metrics: dict[str, list[dict[str, Any]]]  # stage -> logged steps, by step
    weights: dict[str, WeightFile]  # by name
    trajectory: Trajectory | None
    evals: dict[str, dict[str, Any]]  # model -> eval file, the baseline first
    per_query: dict[str, dict[str, dict[str, float]]]  # model -> task -> query -> score
    seeds: dict[str, Any] = field(default_factory=dict)  # what several seeds say together, {} for one or older results
    influence: dict[str, Any] = field(default_factory=dict)  # what `tdro influence` found
    cleaning: dict[str, Any] = field(default_factory=dict)  # rows that repeat test queries or others, by task
    audit: dict[str, Any] = field(default_factory=dict)  # of each task's texts
    problems: list[str] = field(default_factory=list)  # files that are there and cannot be read

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def ingested(self) -> dict[str, dict[str, Any]]:
        """What the ingest says of each task: rows, passages, test_queries, language, description, …"""
        tasks = self.stages.get("ingest", {}).get("summary", {}).get("tasks", {})
        return tasks if isinstance(tasks, dict) else {}

    @property
    def learned(self) -> tuple[str, dict[str, float]]:
        """Name and weights of the learned mixture, or ("", {}) before stage 1."""
        for name in LEARNED:
            if name in self.weights:
                return name, self.weights[name].weights
        return "", {}

    @property
    def tasks(self) -> list[str]:
        """Every task that any part of the run names: largest learned weight first, then by name."""
        _, learned = self.learned
        known = {*self.ingested, *learned, *(task for result in self.evals.values() for task in result["tasks"])}
        return sorted(known, key=lambda task: (-learned.get(task, 0.0), task))

    @property
    def measure(self) -> str:
        """The headline measure: the nDCG of the evaluation, "ndcg@10" unless the recipe says otherwise."""
        named = [m for result in self.evals.values() for m in result["mean"] if m.startswith("ndcg@")]
        return named[0] if named else "ndcg@10"

    def rows(self, task: str) -> int | None:
        """Training rows of a task, from the cleaning, the ingest or a weight file."""
        cleaned = self.stages.get("clean", {}).get("summary", {}).get("tasks", {})
        sources = [
            cleaned.get(task, {}).get("rows"),
            self.ingested.get(task, {}).get("rows"),
            *(w.sizes.get(task) for w in self.weights.values()),
        ]
        return next((int(rows) for rows in sources if rows is not None), None)

    def score(self, model: str, task: str, measure: str | None = None) -> float | None:
        """A model's score on a task ("mean" and "worst" of the eval file are read by the caller)."""
        value = self.evals[model]["tasks"].get(task, {}).get(measure or self.measure)
        return None if value is None else float(value)


def collect(run_folder: Path) -> RunFacts:
    """Return all facts of a run folder. Raises DataError when the folder does not exist."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise DataError(
            f"No run folder {folder}. Run `tdro run RECIPE` first, or set TDRO_RUNS to the folder that holds the runs."
        )
    problems: list[str] = []

    def read(path: Path, kind: type = dict) -> Any:
        return _read_json(folder, path, kind, problems)

    config = read(folder / "config.json")
    searches = read(folder / "serve.json", object)
    if isinstance(searches, dict):
        searches = next((value for value in searches.values() if isinstance(value, list)), [])
    logs = {p.parent.name: p for p in (folder / "stages").glob("*/metrics.jsonl")}
    stages = {p.parent.name: read(p) for p in sorted((folder / "stages").glob("*/manifest.json"))}
    seeds = read(folder / "seeds.json")
    weights = {p.stem: _try(read_weights, p, problems) for p in sorted((folder / "weights").glob("*.json"))}
    evals = {p.stem: read(p) for p in sorted((folder / "eval").glob("*.json")) if not p.stem.endswith(".per_query")}
    per_query = {m: read(folder / "eval" / f"{m}.per_query.json") for m in evals}
    evals = _complete(evals, problems)
    trajectory = folder / "weights" / "trajectory.parquet"
    return RunFacts(
        folder=folder,
        config=config,
        versions=read(folder / "versions.json"),
        searches=[s for s in searches or [] if isinstance(s, dict) and "query" in s],
        stages={name: stages[name] for name in sorted(stages, key=_stage_order) if stages[name]},
        metrics={stage: _read_steps(folder, logs[stage], problems) for stage in sorted(logs, key=_stage_order)},
        weights={name: file for name, file in weights.items() if file},
        trajectory=_try(read_trajectory, trajectory, problems) if trajectory.exists() else None,
        evals={model: evals[model] for model in _model_order(evals, config)},
        per_query={model: scores for model, scores in per_query.items() if model in evals and scores},
        influence=read(folder / "influence" / "influence.json"),
        cleaning=read(folder / "stages" / "clean" / "clean.json"),
        audit=read(folder / "stages" / "clean" / "audit.json"),
        seeds=seeds if seeds.get("evaluate") == stages.get("evaluate", {}).get("key") else {},
        problems=problems,
    )


def summary_table(run_folder: Path) -> list[list[str]]:
    """Return the results as rows of text for a terminal: a header, one row per task, then mean and worst.

    Columns: task, rows, weight (learned, in percent), one per model (the headline measure). "-" stands for what
    is not there.
    """
    facts = collect(run_folder)
    _, learned = facts.learned
    table = [["task", "rows", "weight", *facts.evals]]
    for task in facts.tasks:
        rows = facts.rows(task)
        cells = [task, "-" if rows is None else f"{rows:,}", share(learned[task]) if task in learned else "-"]
        table.append(cells + [_score_text(facts.score(model, task)) for model in facts.evals])
    for kind in ("mean", "worst") if facts.evals else ():
        table.append([kind, "", "", *(_score_text(result[kind].get(facts.measure)) for result in facts.evals.values())])
    return table


def _score_text(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _stage_order(stage: str) -> tuple[int, str]:
    kind = stage.partition("-")[0]
    return (STAGES.index(kind) if kind in STAGES else len(STAGES), stage)


def _model_order(evals: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The baseline, then the mixtures in the recipe's order, then the rest by name."""
    wanted = [BASELINE, *(config.get("weights") or ()), *(config.get("compare") or ())]
    return sorted(evals, key=lambda model: (wanted.index(model) if model in wanted else len(wanted), model))


def _complete(evals: dict[str, dict[str, Any]], problems: list[str]) -> dict[str, dict[str, Any]]:
    """The eval files that hold tasks, mean and worst; the others become problems."""
    good = {}
    for model, content in evals.items():
        lacking = [key for key in ("tasks", "mean", "worst") if not isinstance(content.get(key), dict)]
        if not lacking:
            good[model] = content
        elif content:
            problems.append(f"eval/{model}.json has no {' and no '.join(lacking)}")
    return good


def _try(read: Callable[[Path], T], path: Path, problems: list[str]) -> T | None:
    """What `read` returns, or None where it finds the file unusable (then it is a problem)."""
    try:
        return read(path)
    except DataError as err:
        problems.append(str(err))
        return None


def _read_json(folder: Path, path: Path, kind: type, problems: list[str]) -> Any:
    """The content of a JSON file; `{}` where it is missing, or broken (then it is a problem)."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        problems.append(f"{path.relative_to(folder)} cannot be read: {err}")
        return {}
    if not isinstance(content, kind):
        problems.append(f"{path.relative_to(folder)} holds {type(content).__name__}, expected {kind.__name__}")
        return {}
    return content


def _read_steps(folder: Path, path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Logged steps in order. A step that a resumed run logged again counts once, as logged last."""
    steps: dict[int, dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            steps[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            if number < text.count("\n") + 1:  # a last line without its end was being written, not broken
                problems.append(f"{path.relative_to(folder)}, line {number} is not a logged step")
    return [steps[step] for step in sorted(steps)]
