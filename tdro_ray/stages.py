"""Every stage of a run: what it depends on, what it writes, and the call that does it.

Functions take the run and return a `Stage` (or do it); heavy rooms are imported inside the work, so that a run that is
up to date ends at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tdro_ray.config import OptimizeSettings, TrainSettings, store_folder
from tdro_ray.data.collection import Collection, CollectionStore
from tdro_ray.errors import ConfigError, DataError
from tdro_ray.pipeline import Progress, Run, Stage, check_names, fresh_folder, key_of, write_json
from tdro_ray.types import RetrievalTest, RetrieverSpec

BASELINE = "uniform"  # the reference model: uniform weights, the same budget as every fine-tuning run
TOKENIZER_TEXTS = 60_000  # texts that a tiny model's tokenizer is trained on, spread over the tasks


# Data


def ingest(run: Run) -> dict[str, Any]:
    """Sources -> collection store."""
    from tdro_ray.data.environment import environment_key
    from tdro_ray.data.sources import discover

    recipe, data = run.recipe, run.recipe.data
    store = store_folder(recipe)
    sources = discover([s for s in data.sources if s != "environment"])
    prints = {t.name: t.fingerprint() for t in sources}
    if "environment" in data.sources:
        prints["environment"] = environment_key(data.environment)
    key = key_of("ingest", str(store), prints, data.model_dump(mode="json"))

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.data.ingest import ingest as read

        manifests = read(recipe, store, progress.update)
        tasks = {
            name: {
                "rows": m.rows,
                "passages": m.passages,
                "test_queries": m.test_queries,
                "dev_queries": m.dev_queries,
                "symmetric": m.info.symmetric,
                "language": m.info.language,
                "description": m.info.description,
                "licence": m.info.licence,
                "rejects": sum(m.rejects.values()),
                "counts": m.counts,
                "hash": m.hash,
            }
            for name, m in sorted(manifests.items())
        }
        rows, passages = sum(t["rows"] for t in tasks.values()), sum(t["passages"] for t in tasks.values())
        rejects = sum(t["rejects"] for t in tasks.values())
        return f"{len(tasks)} tasks, {rows:,} rows, {passages:,} passages, {rejects:,} rejected lines", {"tasks": tasks}

    manifest = run.manifest("ingest")
    known = manifest.get("summary", {}).get("tasks", {})
    outputs = tuple(store / name / "manifest.json" for name in known)
    return run.do(Stage("ingest", key, outputs, work))


def task_names(run: Run) -> list[str]:
    """Tasks of this run, in plan order. Raises ConfigError before `ingest` has run."""
    tasks = run.manifest("ingest").get("summary", {}).get("tasks")
    if not tasks:
        raise ConfigError(
            f"Stage ingest has not run. Run `tdro ingest {run.recipe.name}` or `tdro run {run.recipe.name}` first."
        )
    return sorted(tasks)


def collections(run: Run) -> list[Collection]:
    """Collections of this run's tasks, in plan order."""
    store = CollectionStore(store_folder(run.recipe))
    return [store[name] for name in task_names(run)]


def _data_key(run: Run) -> str:
    return key_of({c.name: c.manifest.hash for c in collections(run)})


def mine(run: Run) -> dict[str, Any]:
    """Hard negatives."""
    recipe, names = run.recipe, task_names(run)
    key = key_of("mine", _data_key(run), recipe.mine.model_dump(mode="json"), recipe.seed)

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.data.mine import mine as search

        found = search(recipe, store_folder(recipe), names, progress.update)
        rows = {c.name: c.manifest.rows for c in collections(run)}
        total = sum(rows.values())
        mined = sum(found[n].get("mean_mined", 0) * rows[n] for n in names) / total
        given = sum(found[n].get("mean_given", 0) * rows[n] for n in names) / total
        return f"{mined + given:.1f} hard negatives a row ({given:.1f} given, {mined:.1f} by {recipe.mine.method})", {
            "tasks": found
        }

    if not all(c.manifest.negatives for c in collections(run)):  # ingested again since: the manifest tells no truth
        (run.path("mine") / "manifest.json").unlink(missing_ok=True)
    return run.do(Stage("mine", key, (), work))


def _negatives_key(run: Run) -> str:
    return key_of({c.name: [c.manifest.hash, c.manifest.negatives.get("hash")] for c in collections(run)})


# Models


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
    )


def base_folder(run: Run) -> Path:
    return run.path("model") / "base"


def model_key(run: Run) -> str:
    recipe = run.recipe
    tokenizer_data = _data_key(run) if recipe.model.name == "tiny" else ""
    return key_of(
        "model", recipe.model.model_dump(mode="json"), asdict(retriever_spec(run)), tokenizer_data, recipe.seed
    )


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


def _job(run: Run, stage: str, key: str, settings: TrainSettings) -> Any:
    from tdro_ray.train.loop import TrainJob
    from tdro_ray.train.step import TaskSettings

    found = collections(run)
    tasks = TaskSettings(
        names=tuple(c.name for c in found),
        sizes=tuple(c.manifest.rows for c in found),
        temperatures=tuple(c.manifest.info.temperature for c in found),
        in_batch=tuple(c.manifest.info.in_batch for c in found),
    )
    recipe = run.recipe
    return TrainJob(
        key, base_folder(run), run.path(stage), settings, recipe.model, tasks, recipe.seed, recipe.scale.backend
    )


def batch_recipe(
    run: Run, settings: TrainSettings, weights: list[float] | None, mode: str, scores: Path | None = None
) -> Any:
    """The plan of a training stage and where its rows come from."""
    from tdro_ray.data.collate import BatchRecipe, versions_of
    from tdro_ray.data.plan import Plan

    found = collections(run)
    if settings.batch_size < run.recipe.scale.num_workers:
        raise ConfigError(
            f"A batch of {settings.batch_size} rows cannot be shared by {run.recipe.scale.num_workers} workers. Raise batch_size."
        )
    plan = Plan([c.manifest.rows for c in found], weights, settings.steps, settings.batch_size, run.recipe.seed, mode)  # type: ignore[arg-type]
    return BatchRecipe(
        store_folder(run.recipe),
        tuple(c.name for c in found),
        versions_of(found),
        base_folder(run),
        plan,
        settings.num_negatives,
        scores,
    )


def _train(run: Run, stage: str, key: str, settings: TrainSettings, batches: Any, progress: Progress) -> dict[str, Any]:
    """Train on Ray while a thread shows the progress that the workers write."""
    from tdro_ray.train import ray_train
    from tdro_ray.train.progress import watched

    name = f"{run.recipe.name}-{stage}-{key}"
    storage = run.path(stage) / "ray"
    if not (storage / name).exists():  # a fresh start: the numbers of another run would be shown as this one's
        (run.path(stage) / "metrics.jsonl").unlink(missing_ok=True)
    for old in storage.glob("*"):
        if old.name != name:  # a run of other settings is not resumed
            shutil.rmtree(old, ignore_errors=True)
    with watched(run.path(stage) / "metrics.jsonl", settings.steps, progress):
        return ray_train.run(_job(run, stage, key, settings), batches, run.recipe.scale, str(storage), name)


def _contrastive(
    run: Run, stage: str, settings: TrainSettings, weights: list[float] | None, facts: dict[str, Any], label: str
) -> dict[str, Any]:
    key = key_of(
        "train", settings.model_dump(mode="json"), model_key(run), _negatives_key(run), weights, run.recipe.seed
    )

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        batches = batch_recipe(run, settings, weights, "homogeneous")
        counts = batches.plan.counts().tolist()
        never = [
            n
            for n, c in zip(batches.names, counts, strict=True)
            if c == 0 and (weights is None or weights[batches.names.index(n)] > 0)
        ]
        done = _train(run, stage, key, settings, batches, progress)
        warnings = [f"weight of {n} rounds to no step" for n in never]
        line = f"{label}, {settings.steps} steps of {settings.batch_size} rows, loss {done['loss']:.3f}, {done['tokens_per_s']:,.0f} tokens/s"
        return line, {
            **facts,
            **done,
            "steps_per_task": dict(zip(batches.names, counts, strict=True)),
            "warnings": warnings,
        }

    return run.do(Stage(stage, key, (run.path(stage) / "model" / "tdro.json",), work))


def reference(run: Run) -> dict[str, Any]:
    """Stage 0: uniform weights. It is also the baseline of the comparison."""
    return _contrastive(run, "reference", run.recipe.reference, None, {"weights": BASELINE}, "uniform weights")


def scores_folder(run: Run, settings: OptimizeSettings) -> tuple[str, Path]:
    """(key, Lance folder) of the reference scores for stage 1 under `settings`; steps and temperature do not matter."""
    drawn = [settings.batch_size, settings.num_negatives, run.recipe.seed]
    key = key_of("score", run.manifest("reference").get("key"), _negatives_key(run), drawn)
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
        done = _train(run, "optimize", key, settings, batches, progress)
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
    return _contrastive(run, f"finetune-{name}", run.recipe.finetune, ordered, {"weights": name}, f"{name} weights")


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
        **{_model_name(n): f"finetune-{_model_name(n)}" for n in (*run.recipe.weights, *run.recipe.compare)},
    }
    out = {}
    for name, stage in stages.items():
        manifest = run.manifest(stage)
        if manifest:
            out[name] = (manifest["key"], run.path(stage) / "model")
    return out


def _model_name(weights: str) -> str:
    return Path(weights).stem if weights.endswith(".json") else weights


# Evaluation, index


def tests_of(run: Run) -> dict[str, RetrievalTest]:
    """Held-out tests of the run's tasks and of `evaluate.extra_tests`."""
    from tdro_ray.data.collection import read_beir

    tests = {c.name: test for c in collections(run) if (test := c.test())}
    for folder in run.recipe.evaluate.extra_tests:
        if not Path(folder).is_dir():
            raise DataError(f"evaluate.extra_tests: no folder {folder}.")
        tests[Path(folder).name] = read_beir(Path(folder))
    if not tests:
        raise DataError(
            "No task has a test split. Put corpus.jsonl, queries.jsonl and qrels/test.tsv into a task folder, or set evaluate.extra_tests."
        )
    return tests


def evaluate(run: Run) -> dict[str, Any]:
    """nDCG and recall of every trained model on every test."""
    recipe, settings = run.recipe, run.recipe.evaluate
    models = model_folders(run)
    if not models:
        raise ConfigError(
            f"No trained model to evaluate. Run `tdro reference {recipe.name}` or `tdro run {recipe.name}` first."
        )
    data = {c.name: c.manifest.source_key for c in collections(run)}
    keys = {name: key_of("evaluate", settings.model_dump(mode="json"), key, data) for name, (key, _) in models.items()}
    outputs = tuple(run.folder / "eval" / f"{name}.json" for name in models)
    before = run.manifest("evaluate").get("summary", {}).get("keys", {})

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.evaluate.benchmark import summarise, write_run
        from tdro_ray.evaluate.encode import evaluate_model

        tests, means = tests_of(run), {}
        for name, (_, folder) in models.items():
            path = run.folder / "eval" / f"{name}.json"
            if before.get(name) != keys[name] or not path.exists():

                def show(done: int, total: int, name: str = name) -> None:
                    progress.update(f"{name}: {done:,} of {total:,} texts", done / total)

                metrics, queries, runs = evaluate_model(
                    folder,
                    tests,
                    recipe.scale.num_workers,
                    recipe.scale.cpus_per_worker,
                    recipe.scale.use_gpu,
                    settings.batch_tokens,
                    settings.ndcg_at,
                    settings.recall_at,
                    f"evaluate:{name}",
                    show,
                )
                for task, hits in runs.items():
                    write_run(run.folder / "eval" / "runs" / name / f"{task}.trec", hits, name)
                write_json(run.folder / "eval" / f"{name}.per_query.json", queries)
                write_json(path, summarise(metrics))
            means[name] = json.loads(path.read_text(encoding="utf-8"))["mean"]
        measure = f"ndcg@{settings.ndcg_at}"
        line = f"mean nDCG@{settings.ndcg_at}: " + ", ".join(f"{n} {m[measure]:.3f}" for n, m in means.items())
        return line, {"keys": keys, "mean": means}

    return run.do(Stage("evaluate", key_of(keys), outputs, work))


def best_model(run: Run) -> str:
    """The model to index with: `index.model`, or the best mean nDCG."""
    models = model_folders(run)
    if run.recipe.index.model:
        if run.recipe.index.model not in models:
            raise ConfigError(
                f"index.model {run.recipe.index.model!r} is no trained model of this run: {', '.join(models) or 'none yet'}."
            )
        return run.recipe.index.model
    means = run.manifest("evaluate").get("summary", {}).get("mean")
    if not means:
        raise ConfigError(
            f"Nothing is evaluated yet, so no model is the best. Run `tdro evaluate {run.recipe.name}`, or set index.model."
        )
    return max(means, key=lambda name: next(iter(means[name].values())))


def index_folder(run: Run) -> Path:
    return run.path("index") / "index"


def index(run: Run) -> dict[str, Any]:
    """FAISS index and document store over the passages of the tasks and their tests."""
    recipe, scale = run.recipe, run.recipe.scale
    chosen = best_model(run)
    model_id, folder = model_folders(run)[chosen]
    wanted = [c for c in collections(run) if not recipe.index.tasks or c.name in recipe.index.tasks]
    key = key_of(
        "index",
        recipe.index.model_dump(mode="json"),
        model_id,
        {c.name: [c.manifest.hash, c.manifest.source_key] for c in wanted},
    )

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.index.build import build_index

        made = build_index(
            _documents(wanted),
            folder,
            index_folder(run),
            recipe.index.factory,
            recipe.evaluate.batch_tokens,
            scale.num_workers,
            scale.cpus_per_worker,
            scale.use_gpu,
            lambda phase, done, total: progress.update(f"{phase} {done:,} of {total:,}", done / max(1, total)),
        )
        return f"{made['documents']:,} documents, {recipe.index.factory}, model {chosen}", {**made, "model": chosen}

    return run.do(Stage("index", key, (index_folder(run) / "current",), work))


def _documents(tasks: list[Collection]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (id, title, text, metadata) of every distinct passage, training and test; ids are `<task>/<docid>`.

    A docid that a task uses for several texts gets `#2`, `#3`, … after the first.
    """
    seen: set[tuple[str, str]] = set()
    for task in tasks:
        used: dict[str, int] = {}
        for docid, title, text in _passages_of(task):
            if not text.strip() or (title, text) in seen:
                continue
            seen.add((title, text))
            used[docid] = used.get(docid, 0) + 1
            suffix = f"#{used[docid]}" if used[docid] > 1 else ""
            yield f"{task.name}/{docid}{suffix}", title, text, {"task": task.name}


def _passages_of(task: Collection) -> Iterator[tuple[str, str, str]]:
    for batch in task.passages.to_batches(columns=["docid", "title", "text"]):
        for record in batch.to_pylist():
            yield record["docid"], record["title"] or "", record["text"]
    test = task.test()
    for passage in test.corpus if test else ():
        yield passage.docid, passage.title, passage.text
