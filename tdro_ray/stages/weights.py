"""Stages of the task weights: reference scores, stage 1, and fine-tuning with what it learned."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdro_ray.config import OptimizeSettings, least_workers
from tdro_ray.errors import ConfigError
from tdro_ray.pipeline import Progress, Run, Stage, key_of
from tdro_ray.stages.data import collections, negatives_key, task_names
from tdro_ray.stages.rivals import (
    Mixture,
    finetune_settings,
    learned_names,
    mixtures,
    prefix,
    stage1_rivals,
    stage1_settings,
)
from tdro_ray.stages.training import (
    BASE_REFERENCE,
    BASELINE,
    Variant,
    base_folder,
    batch_recipe,
    contrastive,
    model_key,
    proxy_base,
    references,
    train_job,
    train_on_ray,
    train_references,
)

TOKEN_SAMPLE = 500  # rows of a task whose tokens are counted


def scores_folder(run: Run, settings: OptimizeSettings) -> tuple[str, Path]:
    """(key, Lance folder) of the reference scores for stage 1 under `settings`; steps and temperature do not matter."""
    drawn: list[Any] = [settings.batch_size, settings.num_negatives, run.recipe.seed]
    drawn += [settings.rows, settings.folds] if settings.rows != "seen" else []
    keys = [run.manifest(stage).get("key") for stage in references(settings)]
    key = key_of("score", keys, negatives_key(run), drawn)
    return key, run.path(score_stage(settings)) / f"{key}.lance"


def score_stage(settings: OptimizeSettings) -> str:
    """Stage of the scores that a stage 1 reads."""
    return "score" if settings.rows == "seen" else f"score-{settings.rows}-{settings.folds}"


def _scored_batches(run: Run, settings: OptimizeSettings) -> Any:
    """What stage 1 measures its signal on: all rows, or those that the reference and the proxy never train on."""
    held = next(iter(references(settings).values())) if settings.rows == "heldout" else None
    fold = None if held is None else replace(held, rest=False)
    return batch_recipe(run, settings, None, "stratified", fold)


def stage1_batches(run: Run, settings: OptimizeSettings) -> Any:
    """Batches of stage 1 with their reference similarities."""
    _, scores = scores_folder(run, settings)
    scored = _scored_batches(run, settings)
    if settings.rows != "heldout":
        return replace(scored, scores=scores)
    learned = batch_recipe(run, settings, None, "stratified", next(iter(references(settings).values())))
    return replace(learned, scores=scores, probe=scored.plan)


def score(run: Run) -> None:
    """Reference similarities of what every stage 1 of the run draws, and the references that these need."""
    wanted: dict[str, OptimizeSettings] = {}
    for rival in stage1_rivals(run.recipe):
        settings = stage1_settings(run.recipe, rival)
        stage = score_stage(settings)
        known = wanted.get(stage)
        wanted[stage] = max(settings, known, key=lambda s: s.steps) if known else settings
    for settings in wanted.values():
        score_for(run, settings)


def score_for(run: Run, settings: OptimizeSettings) -> dict[str, Any]:
    """Reference similarities of what stage 1 under `settings` draws."""
    scale = run.recipe.scale
    models = [run.path(stage) / "model" for stage in train_references(run, settings)]
    draw_key, out = scores_folder(run, settings)

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.data.score import score as compute

        batches = _scored_batches(run, settings)
        new = compute(
            batches,
            models,
            out,
            least_workers(scale),
            scale.cpus_per_worker,
            scale.use_gpu,
            settings.token_budget,
            lambda done: progress.update(f"step {done} of {settings.steps}", done / settings.steps),
        )
        rows = settings.steps * settings.batch_size
        kind = {"seen": "", "heldout": " held out", "crossfit": f", {len(models)} references"}[settings.rows]
        return f"{rows:,} rows{kind} x {1 + settings.num_negatives} passages ({new} of {settings.steps} steps new)", {
            "steps": settings.steps,
            "rows": rows,
        }

    return run.do(Stage(score_stage(settings), key_of(draw_key, settings.steps), (out,), work))


def optimize(run: Run) -> None:
    """Stage 1, the proxy and the task weights: the recipe's own, and one for each rival that needs one."""
    for rival in stage1_rivals(run.recipe):
        optimize_for(run, rival)


def optimize_for(run: Run, rival: str = "") -> dict[str, Any]:
    """Stage 1 of a rival; "" is the recipe's own."""
    settings = stage1_settings(run.recipe, rival)
    stage = f"optimize-{rival}" if rival else "optimize"
    scores_key, _ = scores_folder(run, settings)
    key = key_of("optimize", settings.model_dump(mode="json"), scores_key, model_key(run), run.recipe.seed)
    files = [f"{prefix(stage)}{name}.json" for name in learned_names(settings)]
    outputs = tuple(run.folder / "weights" / name for name in (*files, f"{prefix(stage)}trajectory.parquet"))

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        job = train_job(run, stage, key, settings, proxy_base(run, settings))
        done = train_on_ray(run, job, stage1_batches(run, settings), progress)
        return _write_weights(run, stage, settings, key, done)

    return run.do(Stage(stage, key, outputs, work))


def _write_weights(
    run: Run, stage: str, settings: OptimizeSettings, key: str, done: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    import torch

    from tdro_ray.dro.files import WeightFile, write_weights
    from tdro_ray.dro.weights import effective_tasks

    folder, work = run.folder / "weights", run.path(stage)
    folder.mkdir(exist_ok=True)
    found = collections(run)
    sizes = {c.name: c.manifest.rows for c in found}
    alphas = json.loads((work / "alpha.json").read_text(encoding="utf-8"))
    effective = effective_tasks(torch.tensor(alphas["current"]))
    meta = {
        "measure": settings.measure,
        "settings": settings.model_dump(mode="json"),
        "seed": run.recipe.seed,
        "steps": done["steps"],
        "data": {c.name: c.manifest.hash for c in found},
        "key": key,
    }
    files = {
        name: WeightFile(
            dict(zip(sizes, alpha, strict=True)),
            sizes,
            {**meta, "kind": name, "effective_tasks": effective_tasks(torch.tensor(alpha))},
        )
        for name, alpha in alphas.items()
    }
    for name, weights in _selections(run, settings, files["current"].weights, sizes).items():
        kept = {task: sizes[task] for task in weights}
        files[name] = WeightFile(
            weights,
            kept,
            {**files["current"].meta, "kind": name, "kept_rows": sum(kept.values()) / sum(sizes.values())},
        )
    for name, file in files.items():
        write_weights(folder / f"{prefix(stage)}{name}.json", file)
    temporary = folder / f".{prefix(stage)}trajectory.tmp"
    shutil.copy2(work / "trajectory.parquet", temporary)
    temporary.replace(folder / f"{prefix(stage)}trajectory.parquet")
    high, low = (
        max(sizes, key=files["current"].weights.__getitem__),
        min(sizes, key=files["current"].weights.__getitem__),
    )
    alpha = files["current"].weights
    line = f"{done['steps']} steps by {settings.measure}, alpha from {alpha[low]:.3f} ({low}) to {alpha[high]:.3f} ({high}), {effective:.1f} effective tasks"
    return line, {**done, "effective_tasks": effective}


def _selections(
    run: Run, settings: OptimizeSettings, alpha: dict[str, float], sizes: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Uniform weights on the tasks of largest alpha, by the percentages of tasks, rows and tokens that the recipe keeps."""
    from tdro_ray.dro import select

    found = {f"top{percent}": select.select_top(alpha, percent) for percent in settings.top_percent}
    found |= {f"rows{percent}": select.select_amount(alpha, sizes, percent / 100) for percent in settings.top_rows}
    if settings.top_tokens:
        tokens = _tokens(run)
        found |= {f"tokens{p}": select.select_amount(alpha, tokens, p / 100) for p in settings.top_tokens}
    return found


def _tokens(run: Run) -> dict[str, float]:
    """Tokens of each task's queries and first positives, cut to the model's lengths: a sample's mean times the rows."""
    from tdro_ray.model.tokenize import TextTokenizer

    tokenizer, found = TextTokenizer(base_folder(run)), {}
    for task in collections(run):
        size = task.manifest.rows
        table = task.take_rows(
            list(range(0, size, max(1, size // TOKEN_SAMPLE)))[:TOKEN_SAMPLE], ["query", "positives"]
        )
        queries = tokenizer.encode(table["query"].to_pylist(), "query", task.name)
        passages = tokenizer.encode(
            task.take_texts([p[0] for p in table["positives"].to_pylist()]), "passage", task.name
        )
        found[task.name] = size * sum(map(len, (*queries, *passages))) / len(queries)
    return found


def finetune_all(run: Run) -> None:
    """Stage 2 with every mixture of the run."""
    for mixture in mixtures(run.recipe):
        finetune(run, mixture)


def finetune(run: Run, mixture: Mixture) -> dict[str, Any]:
    """Stage 2 with a mixture."""
    weights = weights_of(run, mixture)
    ordered = tuple(weights.get(task, 0.0) for task in task_names(run))
    if mixture.settings.use == "loss":  # G x weight: the same mean scale as without
        variant = Variant(loss_scales=tuple(weight * len(ordered) for weight in ordered))
    else:
        variant = Variant(weights=_capped(run, weights, ordered))
    facts = {"weights": mixture.name}
    settings = finetune_settings(run.recipe, mixture)
    return contrastive(run, f"finetune-{mixture.name}", settings, variant, facts, f"{mixture.name} weights")


def _capped(run: Run, weights: dict[str, float], ordered: tuple[float, ...]) -> tuple[float, ...]:
    """Return the weights under `max_repeats`, in the tasks' order."""
    from tdro_ray.dro.select import cap_repeats

    recipe = run.recipe
    if recipe.max_repeats is None:
        return ordered
    sizes = {c.name: c.manifest.rows for c in collections(run)}
    drawn = recipe.finetune.steps * recipe.finetune.batch_size
    capped = cap_repeats(weights, {task: sizes[task] for task in weights}, recipe.max_repeats, drawn)
    return tuple(capped.get(task, 0.0) for task in sizes)


def weights_of(run: Run, mixture: Mixture) -> dict[str, float]:
    """Weights of a mixture over the run's tasks; those that come from the tasks' rows are written under `weights/` too."""
    from tdro_ray.dro import select
    from tdro_ray.dro.files import WeightFile, read_weights, write_weights

    sizes = {c.name: c.manifest.rows for c in collections(run)}
    path = mixture.file
    if mixture.settings.power is not None:
        weights = select.temperature(sizes, mixture.settings.power)
        if run.writes:
            write_weights(
                run.folder / "weights" / f"{mixture.name}.json", WeightFile(weights, sizes, {"kind": mixture.name})
            )
        return weights
    path = path or mixture.weight_file(run.folder)
    if not path.exists():
        mend = f"Run `tdro optimize {run.recipe.name}` first." if mixture.stage1 else "Give the path of a weight file."
        raise ConfigError(f"No weight file {path}. {mend}")
    return read_weights(path, known=sizes).weights


def model_folders(run: Run) -> dict[str, tuple[str, Path]]:
    """Trained models: name -> (key, model folder); the baseline first."""
    stages = {BASELINE: BASE_REFERENCE, **{m.name: f"finetune-{m.name}" for m in mixtures(run.recipe)}}
    out = {}
    for name, stage in stages.items():
        manifest = run.manifest(stage)
        if manifest:
            out[name] = (manifest["key"], run.path(stage) / "model")
    return out
