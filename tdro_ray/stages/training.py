"""Stages that train: the base model, the reference (stage 0), fine-tuning (stage 2); and what training is made from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tdro_ray.config import OptimizeSettings, TrainSettings, most_workers, store_folder
from tdro_ray.data.collection import Collection
from tdro_ray.errors import ConfigError
from tdro_ray.pipeline import Progress, Run, Stage, fresh_folder, key_of
from tdro_ray.stages.data import collections, data_key, negatives_key
from tdro_ray.stages.rivals import stage1_rivals, stage1_settings
from tdro_ray.types import RetrieverSpec

BASELINE = "uniform"  # the reference model: uniform weights, the same budget as every fine-tuning run
BASE_REFERENCE = "reference"  # its stage
TOKENIZER_TEXTS = 60_000  # texts that a tiny model's tokenizer is trained on, spread over the tasks


def retriever_spec(run: Run) -> RetrieverSpec:
    """How this run's models read texts: lengths, pooling, and each task's prompt."""
    model, infos = run.recipe.model, {c.name: c.manifest.info for c in collections(run)}
    prompts = {name: info.query_prompt for name, info in infos.items() if info.query_prompt and model.instructions}
    return RetrieverSpec(
        pooling=model.pooling,
        query_length=model.query_length,
        passage_length=model.passage_length,
        task_prompts=prompts,
        symmetric_tasks=tuple(name for name in prompts if infos[name].symmetric),
        task_lengths={
            name: info.lengths(model.query_length, model.passage_length)
            for name, info in infos.items()
            if info.query_length or info.passage_length
        },
    )


def base_folder(run: Run) -> Path:
    return run.path("model") / "base"


def model_key(run: Run) -> str:
    recipe = run.recipe
    tokenizer_data = data_key(run) if recipe.model.name == "tiny" else ""
    spec = asdict(retriever_spec(run))
    return key_of("model", recipe.model.model_dump(mode="json"), spec, tokenizer_data, recipe.seed)


def model(run: Run) -> dict[str, Any]:
    """The base model folder that all training starts from."""
    recipe = run.recipe

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.model.build import build_base

        progress.update("building" if recipe.model.name == "tiny" else f"importing {recipe.model.name}")
        texts = _tokenizer_texts(collections(run))
        count = build_base(recipe.model, retriever_spec(run), texts, fresh_folder(base_folder(run)), recipe.seed)
        return f"{recipe.model.name}, {count / 1e6:.1f} M parameters", {"parameters": count, "name": recipe.model.name}

    return run.do(Stage("model", model_key(run), (base_folder(run) / "tdro.json",), work))


def _tokenizer_texts(tasks: list[Collection]) -> Iterator[str]:
    """Yield an equal number of queries and passages of every task, spread over its rows."""
    share = max(1, TOKENIZER_TEXTS // (2 * len(tasks)))
    for task in tasks:
        rows, passages = task.manifest.rows, task.manifest.passages
        yield from task.take_rows(list(range(0, rows, max(1, rows // share))), ["query"])["query"].to_pylist()
        yield from task.take_texts(list(range(0, passages, max(1, passages // share))))


# Training


def train_job(
    run: Run,
    stage: str,
    key: str,
    settings: TrainSettings,
    base: Path | None = None,
    loss_scales: tuple[float, ...] = (),
    snapshots: tuple[int, ...] = (),
) -> Any:
    from tdro_ray.train.loop import TrainJob
    from tdro_ray.train.sinks import LogTo, check_installed
    from tdro_ray.train.step import TaskSettings

    found = collections(run)
    tasks = TaskSettings(
        names=tuple(c.name for c in found),
        sizes=tuple(c.manifest.rows for c in found),
        temperatures=tuple(c.manifest.info.temperature for c in found),
        in_batch=tuple(c.manifest.info.in_batch for c in found),
        loss_scales=loss_scales,
    )
    recipe = run.recipe
    check_installed(recipe.logging)
    shown = {**settings.model_dump(mode="json"), "model": recipe.model.name, "seed": recipe.seed}
    log_to = LogTo(recipe.logging, recipe.name, stage, key, run.folder, shown)
    return TrainJob(
        key,
        base or base_folder(run),
        run.path(stage),
        settings,
        recipe.model,
        tasks,
        recipe.seed,
        recipe.scale,
        snapshots,
        log_to,
    )


def batch_recipe(
    run: Run,
    settings: TrainSettings,
    weights: list[float] | None,
    mode: str,
    fold: Any = None,
) -> Any:
    """The plan of a training stage and where its rows come from; `fold` keeps it to a part of every task's rows."""
    from tdro_ray.data.collate import BatchRecipe, versions_of
    from tdro_ray.data.plan import Plan

    found = collections(run)
    if settings.batch_size < most_workers(run.recipe.scale):
        raise ConfigError(
            f"A batch of {settings.batch_size} rows cannot be shared by {most_workers(run.recipe.scale)} workers. Raise batch_size."
        )
    sizes = [c.manifest.rows for c in found]
    plan = Plan(sizes, weights, settings.steps, settings.batch_size, run.recipe.seed, mode, fold)
    return BatchRecipe(
        store_folder(run.recipe),
        tuple(c.name for c in found),
        versions_of(found),
        base_folder(run),
        plan,
        settings.num_negatives,
        teacher=settings.distill > 0,
    )


def train_on_ray(run: Run, job: Any, batches: Any, progress: Progress) -> dict[str, Any]:
    """Train on Ray (in this process where `scale.num_workers` is 0) while a thread shows the progress that the workers write."""
    stage, key, settings = job.out.name, job.key, job.settings
    from tdro_ray.train import in_process, ray_train
    from tdro_ray.train.progress import watched

    name = f"{run.recipe.name}-{stage}-{key}"
    storage = run.path(stage) / "ray"
    url = run.recipe.scale.storage
    resumed = ray_train.exists(url, name) if url else (storage / name).exists()
    if not resumed:  # a fresh start: the numbers of another run would be shown as this one's
        (run.path(stage) / "metrics.jsonl").unlink(missing_ok=True)
    for old in storage.glob("*"):
        if old.name != name:  # a run of other settings is not resumed
            shutil.rmtree(old, ignore_errors=True)
    with watched(run.path(stage) / "metrics.jsonl", settings.steps, progress):
        if run.recipe.scale.num_workers == 0:
            return in_process.run(job, batches, run.recipe.scale.use_gpu, str(storage), name)
        return ray_train.run(job, batches, run.recipe.scale, run.recipe.scale.storage or str(storage), name)


@dataclass(frozen=True)
class Variant:
    """What sets a contrastive training apart from plain uniform sampling of all rows."""

    weights: tuple[float, ...] | None = None  # of sampling
    fold: Any = None  # data.plan.Fold
    loss_scales: tuple[float, ...] = ()
    snapshots: tuple[int, ...] = ()


def contrastive(
    run: Run, stage: str, settings: TrainSettings, variant: Variant, facts: dict[str, Any], label: str
) -> dict[str, Any]:
    key = key_of(
        "train",
        settings.model_dump(mode="json"),
        model_key(run),
        negatives_key(run),
        asdict(variant),
        run.recipe.seed,
    )
    weights = None if variant.weights is None else list(variant.weights)

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        batches = batch_recipe(run, settings, weights, "homogeneous", variant.fold)
        counts = batches.plan.counts().tolist()
        never = [
            n
            for n, c in zip(batches.names, counts, strict=True)
            if c == 0 and (weights is None or weights[batches.names.index(n)] > 0)
        ]
        job = train_job(run, stage, key, settings, loss_scales=variant.loss_scales, snapshots=variant.snapshots)
        done = train_on_ray(run, job, batches, progress)
        warnings = [f"weight of {n} rounds to no step" for n in never]
        if settings.distill and not any(c.manifest.counts.get("scored") for c in collections(run)):
            warnings.append("distill has no effect: no row's passages have a teacher's `score`")
        line = f"{label}, {settings.steps} steps of {settings.batch_size} rows, loss {done['loss']:.3f}, {done['tokens_per_s']:,.0f} tokens/s"
        return line, {
            **facts,
            **done,
            "steps_per_task": dict(zip(batches.names, counts, strict=True)),
            "warnings": warnings,
        }

    starts = tuple(run.path(stage) / f"start-{step}" for step in variant.snapshots)
    return run.do(Stage(stage, key, (run.path(stage) / "model" / "tdro.json", *starts), work))


def reference(run: Run) -> dict[str, Any]:
    """Stage 0: uniform weights. It is also the baseline of the comparison."""
    variant = Variant(snapshots=snapshots(run, BASE_REFERENCE))
    return contrastive(run, BASE_REFERENCE, run.recipe.reference, variant, {"weights": BASELINE}, "uniform weights")


def references(settings: OptimizeSettings) -> dict[str, Any]:
    """Stages that train the references of a stage 1, and the part of the rows (`Fold`; None: all) that each learns from.

    seen:      one reference, which is scored on rows that it may have trained on (as published)
    heldout:   one that never sees fold 0, which is what the signal is then measured on
    crossfit:  one for each fold, which never sees that fold and scores it
    """
    from tdro_ray.data.plan import Fold

    if settings.rows == "seen":
        return {BASE_REFERENCE: None}
    count = settings.folds
    numbers = range(count) if settings.rows == "crossfit" else range(1)
    return {f"reference-{count}.{number}": Fold(number, count, rest=True) for number in numbers}


def train_references(run: Run, settings: OptimizeSettings) -> list[str]:
    """Bring the references of a stage 1 up to date; return their stages."""
    found = references(settings)
    for stage, fold in found.items():
        if fold is not None:
            label = f"uniform weights, all but fold {fold.number + 1} of {fold.count}"
            variant = Variant(fold=fold, snapshots=snapshots(run, stage))
            contrastive(run, stage, run.recipe.reference, variant, {"weights": BASELINE}, label)
    return list(found)


def snapshots(run: Run, stage: str) -> tuple[int, ...]:
    """Steps after which a reference is kept, for the proxies of this run that start from there."""
    wanted = set()
    for rival in stage1_rivals(run.recipe):
        settings = stage1_settings(run.recipe, rival)
        if settings.start and next(iter(references(settings))) == stage:
            wanted.add(start_step(run, settings))
    return tuple(sorted(wanted))


def start_step(run: Run, settings: OptimizeSettings) -> int:
    return max(1, round(settings.start * run.recipe.reference.steps))


def proxy_base(run: Run, settings: OptimizeSettings) -> Path:
    """Model folder that the proxy starts from: the base model, or an early state of its (first) reference."""
    if not settings.start:
        return base_folder(run)
    return run.path(next(iter(references(settings)))) / f"start-{start_step(run, settings)}"
