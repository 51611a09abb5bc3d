"""What `tdro run` would do, and about what it would cost: stages, steps, rows, tokens, time, memory, disk.

Writes nothing, starts no Ray, loads no model. Every figure says where it comes from; what is not known is left blank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from tdro_ray import stages
from tdro_ray.config import (
    ModelSettings,
    TrainSettings,
    least_workers,
    most_workers,
    runs_root,
    store_folder,
)
from tdro_ray.display import table
from tdro_ray.errors import CheckpointError, TdroError
from tdro_ray.pipeline import Run, read_json
from tdro_ray.stages.look import Look, look
from tdro_ray.stages.rivals import finetune_settings, stage1_rivals, stage1_settings
from tdro_ray.stages.training import references

if TYPE_CHECKING:
    from tdro_ray.model.shapes import ModelShapes

CPU_FLOPS = 30e9  # a second and worker, assumed where this recipe has not run: small matrices, half a core to one
GPU_FLOPS = {"bfloat16": 150e12, "float32": 40e12}  # a second and GPU, assumed likewise: of the H100's class
BYTES = {"bfloat16": 2, "float32": 4}
MEASURED, ASSUMED = "measured", "assumed"  # where seconds come from


@dataclass(frozen=True)
class Training:
    """One training stage and what it draws."""

    settings: TrainSettings
    tokens: float  # over all steps
    how: str  # "" measured or sampled, "≤ " an upper bound
    seconds: float | None
    by: str  # where the seconds come from


def dry_run(run: Look, last: Mapping[str, Callable[[Any], Any]] | None = None) -> str:
    """Return the text of `tdro run --dry-run`. `last` holds the stages behind the index, by name, in order."""
    look(run, last or {})
    shapes, reason = _shapes(run.recipe.model)
    rows, how = task_rows(run)
    trainings = {name: _training(run, name, s, shapes) for name, s in training_settings(run).items()}
    facts = [
        _model_fact(run, shapes, reason),
        _memory_fact(run, shapes, trainings),
        _disk_fact(run, shapes, len(trainings)),
        *_time_facts(run, trainings),
        *(f"Note     {note}" for note in run.notes),
    ]
    parts = [f"{run.recipe.name} in {run.folder}", table(_stage_rows(run, trainings)), _tasks(run, rows, how)]
    return "\n\n".join([*parts, "\n".join(facts)])


def training_settings(run: Run) -> dict[str, TrainSettings]:
    """Settings of every stage that trains, and of those that score, which draw what stage 1 draws."""
    recipe = run.recipe
    found: dict[str, TrainSettings] = {"reference": recipe.reference}
    learned = {rival: stage1_settings(recipe, rival) for rival in stage1_rivals(recipe)}
    for settings in learned.values():
        found |= dict.fromkeys(references(settings), recipe.reference)
        found[stages.score_stage(settings)] = settings
    found |= {f"optimize-{rival}" if rival else "optimize": settings for rival, settings in learned.items()}
    return found | {f"finetune-{m.name}": finetune_settings(recipe, m) for m in stages.mixtures(recipe)}


# Rows and tokens


def task_rows(run: Look) -> tuple[dict[str, int | None], str]:
    """Return ({task: rows, None where they are unknown}, how they are known): cleaned, else ingested, else counted."""
    for stage, how in (("clean", ""), ("ingest", "before cleaning")):
        if run.current[stage]:
            tasks = run.manifest(stage)["summary"]["tasks"]
            return {name: facts["rows"] for name, facts in sorted(tasks.items())}, how
    from tdro_ray.data.count import count_rows
    from tdro_ray.data.sources import discover

    sources = run.recipe.data.sources
    try:
        counted = {task.name: count_rows(task) for task in discover([s for s in sources if s != "environment"])}
    except TdroError:  # noted when ingest was looked at
        counted = {}
    found: dict[str, int | None] = {name: n for name, (n, _) in sorted(counted.items())}
    if "environment" in sources:
        found["environment"] = None
    return found, "before ingest" if all(exact for _, exact in counted.values()) else "about"


def _tokens(run: Look, stage: str, settings: TrainSettings) -> tuple[float, str]:
    """Tokens of all steps: as an earlier run of the stage measured them, else from a sample of the store, else at most."""
    measured = [r["tokens_per_s"] * r["step_s"] for r in _metrics(run, stage)]
    if measured:
        return median(measured) * settings.steps, ""
    model, per_row = run.recipe.model, 1 + settings.num_negatives
    rows = settings.steps * settings.batch_size
    if not run.current["ingest"]:
        return rows * (model.query_length + per_row * model.passage_length), "≤ "
    if run.sample is None:
        from tdro_ray.data.count import sample_tokens

        run.sample = sample_tokens(stages.collections(run), model, stages.base_folder(run))
    query, passage = run.sample
    return rows * (query + per_row * passage), ""


def _metrics(run: Run, stage: str) -> list[dict[str, Any]]:
    """Records of an earlier run of a training stage; [] where there is none or it drew other batches or had another model."""
    stage = "optimize" if stage.startswith("score") else stage
    now, before = run.recipe.model_dump(mode="json"), read_json(run.folder / "config.json")
    part = stage.partition("-")[0]
    same = [before.get("model") == now["model"]]
    same += [before.get(part, {}).get(key) == now[part][key] for key in ("batch_size", "num_negatives")]
    if not all(same):
        return []
    try:
        lines = (run.path(stage) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines][1:]  # the first holds the start-up
    except (OSError, ValueError):
        return []


# Time, memory, disk


def _training(run: Look, name: str, settings: TrainSettings, shapes: ModelShapes | None) -> Training:
    tokens, how = _tokens(run, name, settings)
    others = [name, *(other for other in training_settings(run) if other != name)]
    rates = next((found for other in others if (found := [r["tokens_per_s"] for r in _metrics(run, other)])), [])
    if rates:
        share = 1 / 3 if name.startswith("score") else 1.0  # a forward is about a third of a step
        return Training(settings, tokens, how, share * tokens / median(rates), MEASURED)
    if shapes is None:
        return Training(settings, tokens, how, None, "")
    model, scale = run.recipe.model, run.recipe.scale
    workers = max(1, least_workers(scale))
    per_s = workers * (GPU_FLOPS[model.dtype] if scale.use_gpu else CPU_FLOPS)
    per_token = estimate_flops(shapes, settings, model, tokens / settings.steps / workers)
    if name.startswith("score"):
        per_token = 2.0 * shapes.body
    return Training(settings, tokens, how, tokens * per_token / per_s, ASSUMED)


def estimate_flops(shapes: ModelShapes, settings: TrainSettings, model: ModelSettings, tokens: float) -> float:
    """Return floating-point operations per token of a step with `tokens` tokens on a worker.

    2 per parameter forward, 4 backward (2 under LoRA: frozen weights get no gradient), 2 more for gradient checkpointing
    and 2 more where the tokens exceed the budget, so that GradCache runs its first pass. Attention scores are left out.
    """
    passes = 2 + (2 if model.lora else 4) + 2 * model.gradient_checkpointing + 2 * (tokens > settings.token_budget)
    return float(passes * shapes.body)


def _shapes(model: ModelSettings) -> tuple[ModelShapes | None, str]:
    from tdro_ray.model.shapes import model_shapes

    try:
        return model_shapes(model), ""
    except CheckpointError as err:
        return None, str(err)


# What is shown


def _stage_rows(run: Look, trainings: Mapping[str, Training]) -> list[list[str]]:
    rows = [["stage", "", "steps", "rows", "tokens", "time"]]
    for name, current in run.current.items():
        state = "up to date" if current else "to do"
        drawn, earlier = trainings.get(name), run.manifest(name).get("seconds")
        if drawn:
            s = drawn.settings
            cells = [f"{s.steps:,}", f"{s.steps * s.batch_size:,}", drawn.how + _count(drawn.tokens)]
            seconds = drawn.seconds
        else:
            cells, seconds = ["", "", ""], earlier
        rows.append([name, state, *cells, "" if current or seconds is None else _time(seconds)])
    return rows


def _tasks(run: Look, rows: Mapping[str, int | None], how: str) -> str:
    """Rows of every task, and how many of them stages 0 and 1 draw."""
    if not rows:
        return "Tasks: unknown, not yet ingested"
    from tdro_ray.data.plan import Plan

    recipe, known = run.recipe, [n for n in rows.values() if n]
    lines = [["task", f"rows ({how})" if how else "rows", "reference", "optimize"]]
    drawn: list[list[str]] = [["", ""] for _ in rows]
    if len(known) == len(rows):
        first, second = recipe.reference, recipe.optimize
        even = Plan(known, None, first.steps, first.batch_size, recipe.seed).counts() * first.batch_size
        mixed = Plan(known, None, second.steps, second.batch_size, recipe.seed, "stratified").counts()
        drawn = [[f"{a:,}", f"{b:,}"] for a, b in zip(even.tolist(), mixed.tolist(), strict=True)]
    for (name, count), cells in zip(rows.items(), drawn, strict=True):
        lines.append([name, "not yet ingested" if count is None else f"{count:,}", *cells])
    return table(lines)


def _model_fact(run: Look, shapes: ModelShapes | None, reason: str) -> str:
    model = run.recipe.model
    if shapes is None:
        return (
            f"Model    {model.name}: parameters unknown, {reason}. Name a folder that holds it: --set model.name=FOLDER"
        )
    trained = f"{_count(shapes.trainable(model.lora))} trained (LoRA r {model.lora.r})" if model.lora else "all trained"
    return f"Model    {model.name}: {_count(shapes.parameters)} parameters, {_count(shapes.body)} of them behind the embeddings; {trained}"


def _memory_fact(run: Look, shapes: ModelShapes | None, trainings: Mapping[str, Training]) -> str:
    scale, model = run.recipe.scale, run.recipe.model
    kind = "GPU" if scale.use_gpu else "CPU"
    least, most = least_workers(scale), most_workers(scale)
    number = f"{most}" if least == most else f"{least} to {most}"
    where = f"{number} {kind} worker{'s' if most > 1 else ''}" if most else f"1 process, {kind}"
    if shapes is None:
        return f"Memory   unknown ({where}): it follows from the parameters"
    from tdro_ray.train.memory import estimate, shape_of

    shape = shape_of(shapes, model.lora)
    settings = {name: t.settings for name, t in trainings.items() if not name.startswith("score")}
    parts = {name: estimate(shape, model, s, scale) for name, s in settings.items()}
    need = {name: sum(found.values()) for name, found in parts.items()}
    largest = max(need, key=need.__getitem__)
    listed = ", ".join(f"{part} {_bytes(size)}" for part, size in parts[largest].items())
    here = ""
    if not scale.use_gpu:
        import psutil

        memory = psutil.virtual_memory()
        here = f"; this machine has {_bytes(memory.available)} of {_bytes(memory.total)} free"
    return f"Memory   about {_bytes(need[largest])} per worker in {largest} ({where}, {scale.backend}: {listed}){here}"


def _disk_fact(run: Look, shapes: ModelShapes | None, num_trainings: int) -> str:
    store, root = store_folder(run.recipe), runs_root()
    has = sum(p.stat().st_size for p in store.rglob("*") if p.is_file()) if run.current["ingest"] else None
    stored = f"store {_bytes(has)}" if has is not None else "store unknown, not yet ingested"
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    if shapes is None:
        return f"Disk     models unknown, {stored}; {_bytes(free)} free in {root}"
    size, trained = BYTES[run.recipe.model.dtype], shapes.trainable(run.recipe.model.lora)
    # The base; then of every training the model twice (the stage's, its checkpoint's) and weights with both moments.
    models = size * (shapes.parameters + (num_trainings - 1) * (2 * shapes.parameters + 3 * trained))
    summary = run.manifest("ingest").get("summary", {}).get("tasks", {}).values()
    vectors = 4 * shapes.hidden * sum(t["passages"] for t in summary)
    index = f", index at least {_bytes(vectors)}" if vectors else ""
    return f"Disk     models and checkpoints {_bytes(models)}, {stored}{index}; {_bytes(free)} free in {root}"


def _time_facts(run: Look, trainings: Mapping[str, Training]) -> list[str]:
    to_do = [name for name, current in run.current.items() if not current]
    if not to_do:
        return ["Time     seconds: all stages are up to date"]
    seconds = {n: trainings[n].seconds if n in trainings else run.manifest(n).get("seconds") for n in to_do}
    known = {n: s for n, s in seconds.items() if s is not None}
    left = [n for n in to_do if n not in known]
    lines = [f"Time     about {_time(sum(known.values()))}" if known else "Time     unknown"]
    if left:
        lines[0] += f", not counted: {', '.join(left)}"
    ways = {t.by for n, t in trainings.items() if n in to_do and t.by}
    scale = run.recipe.scale
    rate = GPU_FLOPS[run.recipe.model.dtype] if scale.use_gpu else CPU_FLOPS
    if MEASURED in ways:
        lines.append("         training at the tokens/s of this recipe's earlier run, without the start of the workers")
    if ASSUMED in ways:
        lines.append(
            f"         training by operations, at an assumed {rate / 1e9:,.0f} GFLOP/s per worker: it has not run here"
        )
    if any(t.how for t in trainings.values()):
        lines.append("         ≤: texts are not ingested yet, every one is taken as long as the model reads")
    return lines


def _count(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):,.1f} {unit}"
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
