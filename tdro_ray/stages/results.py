"""Stages of the results: evaluation of every trained model, and the search index of the best."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdro_ray.config import least_workers
from tdro_ray.data.collection import Collection
from tdro_ray.data.dedup import passage_key
from tdro_ray.errors import ConfigError, DataError
from tdro_ray.pipeline import Progress, Run, Stage, key_of, write_json
from tdro_ray.stages.data import collections, extra_tests, test_stamps
from tdro_ray.stages.weights import model_folders
from tdro_ray.types import RetrievalTest


def tests_of(run: Run) -> dict[str, RetrievalTest]:
    """Held-out tests of the run's tasks and of `evaluate.extra_tests`."""
    from tdro_ray.data.layouts import open_test

    tests = {c.name: test for c in collections(run) if (test := c.test())}
    for folder in extra_tests(run.recipe):
        if folder.name in tests:
            raise DataError(
                f"Two tests are called {folder.name!r}, one of them {folder} of evaluate.extra_tests. Rename that folder."
            )
        tests[folder.name] = open_test(folder)
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
    data: dict[str, Any] = {c.name: c.manifest.source_key for c in collections(run)}
    if recipe.evaluate.extra_tests:
        data |= {"": test_stamps(extra_tests(recipe))}
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
                    least_workers(recipe.scale),
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
        recipe.index.model_dump(mode="json", exclude={"device"}),  # it changes no result
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
            max(1, least_workers(scale)),
            scale.cpus_per_worker,
            scale.use_gpu,
            lambda phase, done, total: progress.update(f"{phase} {done:,} of {total:,}", done / max(1, total)),
            target_recall=recipe.index.target_recall,
            min_recall=recipe.index.min_recall,
            device=recipe.index.device,
        )
        found = f"{made['factory']}, recall@10 {made['recall@10']:.3f}"
        return f"{made['documents']:,} documents, {found}, model {chosen}", {**made, "model": chosen}

    return run.do(Stage("index", key, (index_folder(run) / "current",), work))


def _documents(tasks: list[Collection]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (id, title, text, metadata) of every distinct passage, training and test; ids are `<task>/<docid>`.

    A docid that a task uses for several texts gets `#2`, `#3`, … after the first.
    """
    seen: set[bytes] = set()  # keys: texts would be the whole corpus
    for task in tasks:
        used: dict[str, int] = {}
        for docid, title, text in _passages_of(task):
            key = passage_key(title, text)
            if not text.strip() or key in seen:
                continue
            seen.add(key)
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
