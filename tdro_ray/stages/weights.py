"""Stages of the task weights: reference scores, stage 1, and fine-tuning with what it learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tdro_ray.config import OptimizeSettings
from tdro_ray.errors import ConfigError
from tdro_ray.pipeline import Progress, Run, Stage, check_names, key_of
from tdro_ray.stages.data import collections, negatives_key, task_names
from tdro_ray.stages.training import BASELINE, batch_recipe, contrastive, model_key, train_on_ray


def scores_folder(run: Run, settings: OptimizeSettings) -> tuple[str, Path]:
    """(key, Lance folder) of the reference scores for stage 1 under `settings`; steps and temperature do not matter."""
    drawn = [settings.batch_size, settings.num_negatives, run.recipe.seed]
    key = key_of("score", run.manifest("reference").get("key"), negatives_key(run), drawn)
    return key, run.path("score") / f"{key}.lance"


def score(run: Run) -> dict[str, Any]:
    """Reference similarities of what stage 1 draws."""
    settings, scale = run.recipe.optimize, run.recipe.scale
    draw_key, out = scores_folder(run, settings)
    reference_model = run.path("reference") / "model"

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.data.score import score as compute

        batches = batch_recipe(run, settings, None, "stratified")
        new = compute(
            batches,
            reference_model,
            out,
            scale.num_workers,
            scale.cpus_per_worker,
            scale.use_gpu,
            settings.token_budget,
            lambda done: progress.update(f"step {done} of {settings.steps}", done / settings.steps),
        )
        rows = settings.steps * settings.batch_size
        return f"{rows:,} rows x {1 + settings.num_negatives} passages ({new} of {settings.steps} steps new)", {
            "steps": settings.steps,
            "rows": rows,
        }

    return run.do(Stage("score", key_of(draw_key, settings.steps), (out,), work))


def optimize(run: Run) -> dict[str, Any]:
    """Stage 1: the proxy and the task weights."""
    settings = run.recipe.optimize
    _check_measure(settings)
    scores_key, scores = scores_folder(run, settings)
    key = key_of("optimize", settings.model_dump(mode="json"), scores_key, model_key(run), run.recipe.seed)
    names = [*_learned_names(settings)]
    outputs = (
        *tuple(run.folder / "weights" / f"{n}.json" for n in names),
        run.folder / "weights" / "trajectory.parquet",
    )

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        batches = batch_recipe(run, settings, None, "stratified", scores)
        done = train_on_ray(run, "optimize", key, settings, batches, progress)
        return _write_weights(run, settings, key, done)

    return run.do(Stage("optimize", key, outputs, work))


def _check_measure(settings: OptimizeSettings) -> None:
    """Refuse a wrong option here, not in a worker after the model is loaded."""
    if settings.measure_options:
        from tdro_ray.dro.measures import measure_options

        check_names(
            settings.measure_options,
            measure_options(settings.measure),
            f"optimize.measure_options of {settings.measure!r}",
        )


def _learned_names(settings: OptimizeSettings) -> list[str]:
    return ["current", "mean", "ema", *(f"top{percent}" for percent in settings.top_percent)]


def _write_weights(run: Run, settings: OptimizeSettings, key: str, done: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    import torch

    from tdro_ray.dro.files import WeightFile, write_weights
    from tdro_ray.dro.weights import effective_tasks

    folder, stage = run.folder / "weights", run.path("optimize")
    folder.mkdir(exist_ok=True)
    found = collections(run)
    sizes = {c.name: c.manifest.rows for c in found}
    alphas = json.loads((stage / "alpha.json").read_text(encoding="utf-8"))
    effective = effective_tasks(torch.tensor(alphas["current"]))
    meta = {
        "measure": settings.measure,
        "settings": settings.model_dump(mode="json"),
        "seed": run.recipe.seed,
        "steps": settings.steps,
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
    for percent in settings.top_percent:
        files[f"top{percent}"] = files["current"].selected(percent)
    for name, file in files.items():
        write_weights(folder / f"{name}.json", file)
    shutil.copy2(stage / "trajectory.parquet", folder / ".trajectory.tmp")
    (folder / ".trajectory.tmp").replace(folder / "trajectory.parquet")
    high, low = (
        max(sizes, key=files["current"].weights.__getitem__),
        min(sizes, key=files["current"].weights.__getitem__),
    )
    alpha = files["current"].weights
    line = f"{settings.steps} steps by {settings.measure}, alpha from {alpha[low]:.3f} ({low}) to {alpha[high]:.3f} ({high}), {effective:.1f} effective tasks"
    return line, {**done, "effective_tasks": effective}


def finetune(run: Run, name: str) -> dict[str, Any]:
    """Stage 2 with the weights called `name`: a learned file, or `proportional`."""
    weights = weights_of(run, name)
    ordered = [weights.get(task, 0.0) for task in task_names(run)]
    stage = f"finetune-{model_name(name)}"
    return contrastive(run, stage, run.recipe.finetune, ordered, {"weights": name}, f"{name} weights")


def weights_of(run: Run, name: str) -> dict[str, float]:
    """Sampling weights by name: a file under the run's `weights/`, `proportional` (written there), or a path to a file."""
    from tdro_ray.dro import select
    from tdro_ray.dro.files import WeightFile, read_weights, write_weights

    sizes = {c.name: c.manifest.rows for c in collections(run)}
    path = run.folder / "weights" / f"{name}.json"
    if name == "proportional":
        write_weights(path, WeightFile(select.proportional(sizes), sizes, {"kind": name}))
    elif name.endswith(".json"):
        path = Path(name)
    if not path.exists():
        known = [*_learned_names(run.recipe.optimize), "proportional"]
        raise ConfigError(
            f"No weights {name!r}. Learned and built-in: {', '.join(known)}; or a path to a weight file (.json). Run `tdro optimize {run.recipe.name}` for the learned ones."
        )
    return read_weights(path, known=sizes).weights


def model_folders(run: Run) -> dict[str, tuple[str, Path]]:
    """Trained models: name -> (key, model folder); the baseline first."""
    stages = {
        BASELINE: "reference",
        **{model_name(n): f"finetune-{model_name(n)}" for n in (*run.recipe.weights, *run.recipe.compare)},
    }
    out = {}
    for name, stage in stages.items():
        manifest = run.manifest(stage)
        if manifest:
            out[name] = (manifest["key"], run.path(stage) / "model")
    return out


def model_name(weights: str) -> str:
    """Name of the model that is trained with these weights: a file's without its ending."""
    return Path(weights).stem if weights.endswith(".json") else weights
