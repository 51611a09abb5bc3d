"""Stages of the data: sources -> collection store -> cleaned -> hard negatives; and what later stages ask of the store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tdro_ray.config import Recipe, least_workers, mining_seed, mining_settings, store_folder
from tdro_ray.data.collection import Collection, CollectionStore
from tdro_ray.data.layouts import judged_files, test_split
from tdro_ray.data.place import Place, place, stamp
from tdro_ray.errors import ConfigError, DataError
from tdro_ray.pipeline import Progress, Run, Stage, fresh_folder, key_of, write_json


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
    key = key_of("ingest", str(store), prints, data.model_dump(mode="json", exclude={"store", "clean"}))

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.data.ingest import ingest as read

        manifests = read(recipe, store, progress.update)
        tasks = {
            name: {
                "rows": m.ingested_rows,
                "passages": m.passages,
                "test_queries": m.test_queries,
                "dev_queries": m.dev_queries,
                "symmetric": m.info.symmetric,
                "language": m.info.language,
                "description": m.info.description,
                "licence": m.info.licence,
                "rejects": sum(m.rejects.values()),
                "counts": m.counts,
                "hash": m.ingested_hash,
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


def clean(run: Run) -> dict[str, Any]:
    """Rows that repeat test queries or other rows leave the training rows; the audit of what stays."""
    recipe, names, store = run.recipe, task_names(run), store_folder(run.recipe)
    settings, extra = recipe.data.clean, extra_tests(recipe)
    model = recipe.model.name if Path(recipe.model.name).is_dir() else ""
    rows = {c.name: c.manifest.ingested_hash for c in collections(run)}
    tests = {c.name: c.manifest.tests_hash for c in CollectionStore(store).collections()}
    key = key_of("clean", rows, tests, test_stamps(extra), settings.model_dump(mode="json"), model)
    out = run.path("clean")

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.data.audit import audit
        from tdro_ray.data.clean import clean as drop

        tasks = drop(settings, store, names, extra, key, out, progress.update)
        progress.update("audit")
        write_json(out / "audit.json", audit(store, names, model))
        kept = {name: {"rows": task["kept"], "dropped": task["rows"] - task["kept"]} for name, task in tasks.items()}
        counts = Counter[str]()
        for task in tasks.values():
            counts.update(task["counts"])
        found = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        dropped = sum(task["dropped"] for task in kept.values())
        return (
            f"{dropped:,} of {sum(t['rows'] for t in tasks.values()):,} rows dropped ({found or 'nothing looked for'})",
            {"tasks": kept},
        )

    if any(c.manifest.clean.get("key") != key for c in collections(run)):  # ingested again since
        (out / "manifest.json").unlink(missing_ok=True)
    return run.do(Stage("clean", key, (out / "clean.json", out / "audit.json"), work))


def extra_tests(recipe: Recipe) -> list[Place]:
    """Folders of `evaluate.extra_tests`, by path or URL. Raises DataError for one that is not there."""
    folders = [place(folder) for folder in recipe.evaluate.extra_tests]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"evaluate.extra_tests: no folder {folder}.")
    return folders


def test_stamps(folders: list[Place]) -> list[Any]:
    """What differs when a file of these tests was written again."""
    return [stamp(file) for folder in folders for file in judged_files(folder, test_split(folder) or "test")]


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


def data_key(run: Run) -> str:
    return key_of({c.name: c.manifest.hash for c in collections(run)})


def mine(run: Run) -> dict[str, Any]:
    """Hard negatives."""
    recipe, names = run.recipe, task_names(run)
    settings = mining_settings(recipe.mine)
    key = key_of("mine", data_key(run), settings, mining_seed(recipe))

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.data.mine import mine as search

        encode = _encode(run, progress) if recipe.mine.method == "encoder" else None
        found = search(recipe, store_folder(recipe), names, progress.update, encode)
        write_json(run.path("mine") / "mine.json", {"tasks": found})
        rows = {c.name: c.manifest.rows for c in collections(run)}
        total = sum(rows.values())
        mined = sum(found[n].get("mean_mined", 0) * rows[n] for n in names) / total
        given = sum(found[n].get("mean_given", 0) * rows[n] for n in names) / total
        how = f"{recipe.mine.method}, rescored" if recipe.mine.rescore else recipe.mine.method
        return f"{mined + given:.1f} hard negatives a row ({given:.1f} given, {mined:.1f} by {how})", {"tasks": found}

    if not all(c.manifest.negatives for c in collections(run)):  # ingested again since: the manifest tells no truth
        (run.path("mine") / "manifest.json").unlink(missing_ok=True)
    return run.do(Stage("mine", key, (), work))


def _encode(run: Run, progress: Progress) -> Any:
    """Return the call that gives mining its vectors."""
    from tdro_ray.evaluate.encode import encode_texts

    recipe, model = run.recipe, _mining_model(run)

    def encode(items: Any) -> Any:
        scale, budget = recipe.scale, recipe.evaluate.batch_tokens

        def show(done: int, total: int) -> None:
            progress.update(f"{items[0][2]}: {done:,} of {total:,} texts", done / total)

        return encode_texts(
            model, items, least_workers(scale), scale.cpus_per_worker, scale.use_gpu, budget, "mine:encode", show
        )

    return encode


def _mining_model(run: Run) -> Path:
    """Return the folder of `mine.model`, imported where it is no model folder of ours."""
    from tdro_ray.model.build import build_base
    from tdro_ray.stages.training import BASE_REFERENCE, retriever_spec

    recipe, name = run.recipe, run.recipe.mine.model
    if name == "reference":
        folder = run.path(BASE_REFERENCE) / "model"
        if not (folder / "tdro.json").exists():
            raise ConfigError(
                f"mine.model=reference, and {run.folder} has no trained reference yet. Run `tdro reference {recipe.name} --set mine.method=bm25` "
                "first, or name a model folder."
            )
        return folder
    if (Path(name) / "tdro.json").exists():
        return Path(name)
    folder = fresh_folder(run.path("mine") / "encoder")
    build_base(
        recipe.model.model_copy(update={"name": name, "lora": None}), retriever_spec(run), iter(()), folder, recipe.seed
    )
    return folder


def negatives_key(run: Run) -> str:
    return key_of({c.name: [c.manifest.hash, c.manifest.negatives.get("hash")] for c in collections(run)})
