"""What each command does. The only room beside the CLI that knows the pipeline, the cluster and the server."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdro_ray import index_commands
from tdro_ray.config import Recipe
from tdro_ray.display import display, table
from tdro_ray.errors import ConfigError, ResourceError
from tdro_ray.pipeline import Progress, Run, Stage, key_of, write_json
from tdro_ray.recipe import load_recipe, recipe_names

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "peft",
    "pylance",
    "pyarrow",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "bm25s",
    "rensa",
    "fastapi",
    "deepspeed",
)


def run(arguments: argparse.Namespace) -> int:
    """Do the parsed command; return the exit code."""
    if arguments.command == "recipes":
        print("\n".join(recipe_names()))
        return 0
    if arguments.command in ("versions", "merge"):
        return int(getattr(index_commands, arguments.command)(arguments))
    if arguments.command == "submit":
        from cluster.submit import submit

        return submit(arguments.arguments, arguments.address, follow=not arguments.detach)
    recipe = load_recipe(arguments.recipe, tuple(arguments.overrides))
    if arguments.command == "compare":
        recipe = _compared(recipe, arguments)
    if getattr(arguments, "dry_run", False):
        return _dry_run(recipe, arguments)
    run = Run(recipe, display(), lambda: _connect(recipe))
    run.open()
    _quiet_libraries()
    write_json(run.folder / "versions.json", versions())
    return int(COMMANDS.get(arguments.command, _stage)(run, arguments) or 0)


def _connect(recipe: Recipe) -> None:
    from cluster.session import connect

    connect(recipe.scale, recipe.serve.proxy)


def _whole_run(run: Run, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    _run_until(run, arguments.until)
    if arguments.until is None and not arguments.no_serve:
        _sample_searches(run)
    _report(run)
    if arguments.until is None:
        _closing(run, arguments, time.monotonic() - began)


def _run_until(run: Run, last: str | None) -> None:
    """Bring the stages up to date, in order, to the one called `last` or all."""
    from tdro_ray import stages

    steps: dict[str, Callable[[Run], Any]] = {
        "ingest": stages.ingest,
        "tests": stages.tests_of,  # a run without any test is refused now, not after all training
        "clean": stages.clean,
        "mine": stages.mine,
        "model": stages.model,
        "reference": stages.reference,
        "score": stages.score,
        "optimize": stages.optimize,
        "finetune": stages.finetune_all,
        "evaluate": stages.evaluate,
        "seeds": stages.seeds,
        "index": stages.index,
    }
    for name, step in steps.items():
        step(run)
        if name == last:
            break


def _dry_run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from tdro_ray.dryrun import Look, dry_run

    sampled = {} if arguments.no_serve or not recipe.serve.queries else {"serve": _sample_searches}
    print(dry_run(Look(recipe, display()), sampled))
    return 0


def _compare(run: Run, arguments: argparse.Namespace) -> None:
    """The run up to its evaluation, with every mixture that is asked for, over every seed."""
    began = time.monotonic()
    _run_until(run, "seeds")
    _report(run)
    _tables(run)
    print(f"\nReport: {run.folder / 'report.html'}   ({time.monotonic() - began:.0f} s in all)")


def _compared(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    from tdro_ray.stages.rivals import COMPARED, mixtures

    asked = tuple(name.strip() for name in arguments.rivals.split(",") if name.strip())
    seeds = arguments.seeds or recipe.seeds
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} is not valid: give at least 1.")
    recipe = recipe.model_copy(update={"compare": asked or recipe.compare or COMPARED, "seeds": seeds})
    mixtures(recipe)  # a misspelt name ends here
    return recipe


def _stage(run: Run, arguments: argparse.Namespace) -> None:
    from tdro_ray import stages

    if arguments.command == "reference":
        stages.model(run)
    getattr(stages, "finetune_all" if arguments.command == "finetune" else arguments.command)(run)
    if arguments.command == "evaluate":
        from tdro_ray.report.page import summary_table

        print(table(summary_table(run.folder)))


def _report(run: Run, arguments: argparse.Namespace | None = None) -> None:
    from tdro_ray.report.page import write_report

    if not (run.folder / "stages").is_dir():
        raise ConfigError(f"Nothing has run in {run.folder} yet. Run `tdro run {run.recipe.name}` first.")
    path = write_report(run.folder)
    if arguments is not None:
        print(path)


def _tune(run: Run, arguments: argparse.Namespace) -> None:
    from tdro_ray.tune.search import tune

    tune(run)


def _influence(run: Run, arguments: argparse.Namespace) -> None:
    from tdro_ray.tune.influence import influence

    print("\n" + table(influence(run)))
    _report(run)
    print(f"\nReport: {run.folder / 'report.html'}")


def _export(run: Run, arguments: argparse.Namespace) -> None:
    from tdro_ray import stages
    from tdro_ray.index.versions import model_hash
    from tdro_ray.model.export import export

    folders = stages.model_folders(run)
    name = arguments.model or stages.best_model(run)
    if name not in folders:
        raise ConfigError(f"No trained model {name!r} in {run.folder}. Trained: {', '.join(folders) or 'none'}.")
    folder = folders[name][1]
    source = model_hash(folder) if arguments.format == "onnx" else ""  # lets it serve the index of the original
    print(export(folder, Path(arguments.to), run.folder, name, arguments.format, source))


def _serve(run: Run, arguments: argparse.Namespace) -> None:
    from tdro_ray import stages

    index = Path(arguments.index) if arguments.index else stages.index_folder(run)
    model = Path(arguments.model) if arguments.model else _indexed_model(run)
    model = _for_backend(run, model)
    _connect(run.recipe)
    from serve import deployment  # after the connection has settled the environment

    url = deployment.start(model, index, **_serve_options(run.recipe))
    print(f"Serving {model} at {url}  (search page: {url}/, API: {url}/docs). Stop with Ctrl-C.", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        deployment.stop()


def _serve_options(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.serve.model_dump(exclude={"queries", "k", "proxy"}), "index_device": recipe.index.device}


def _for_backend(run: Run, model: Path) -> Path:
    """Return the folder that the recipe's backend reads: the model's own, or its export beside the run's other files."""
    from tdro_ray.model.load import ONNX_FILE

    if run.recipe.serve.backend != "onnx" or (model / ONNX_FILE).exists():
        return model
    from tdro_ray.index.versions import model_hash
    from tdro_ray.model.export import export

    source, folder = model_hash(model), run.folder / "onnx" / model.name
    if not (folder / ONNX_FILE).exists() or model_hash(folder) != source:
        export(model, folder, run.folder, model.name, "onnx", source)
    return folder


def _indexed_model(run: Run) -> Path:
    from tdro_ray import stages

    name = run.manifest("index").get("summary", {}).get("model")
    if not name:
        raise ConfigError(
            f"Nothing is indexed yet. Run `tdro index {run.recipe.name}` first, or give --model and --index."
        )
    return stages.model_folders(run)[name][1]


def _sample_searches(run: Run) -> None:
    """Start Serve on loopback, send the recipe's queries through HTTP, keep the hits, stop it."""
    from tdro_ray import stages

    settings = run.recipe.serve
    key = key_of("serve", settings.model_dump(mode="json"), run.manifest("index").get("key"))
    out = run.folder / "serve.json"

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        import httpx

        from serve import deployment

        progress.update("starting the service")
        url = deployment.start(
            _for_backend(run, _indexed_model(run)), stages.index_folder(run), **_serve_options(run.recipe)
        )
        try:
            progress.update(f"asking {url}/search")
            began = time.monotonic()
            keys = os.environ.get("TDRO_API_KEYS", "").split(",")
            headers = {"Authorization": f"Bearer {keys[0].strip()}"} if keys[0].strip() else {}
            asked = {"queries": list(settings.queries), "k": settings.k}
            response = httpx.post(f"{url}/search", json=asked, headers=headers, timeout=60, trust_env=False)
            response.raise_for_status()
            seconds = time.monotonic() - began
        except httpx.HTTPError as err:
            raise ResourceError(
                f"The service at {url} did not answer the sample queries: {err}. Look at the Serve logs on the Ray dashboard."
            ) from err
        finally:
            deployment.stop()
        write_json(
            out,
            {
                "url": url,
                "queries": [
                    {"query": q, "hits": hits}
                    for q, hits in zip(settings.queries, response.json()["results"], strict=True)
                ],
            },
        )
        return f"{len(settings.queries)} queries answered in {seconds * 1000:.0f} ms through HTTP", {"url": url}

    if settings.queries:
        run.do(Stage("serve", key, (out,), work))


def _closing(run: Run, arguments: argparse.Namespace, seconds: float) -> None:
    serve = run.folder / "serve.json"
    if serve.exists():
        for asked in json.loads(serve.read_text(encoding="utf-8"))["queries"]:
            print(f"\n“{asked['query']}”")
            for hit in asked["hits"]:
                text = " ".join(f"{hit.get('title') or ''} {hit['text']}".split())
                print(f"  {hit['score']:.3f}  {hit['id']}  {text[:90]}")
    _tables(run)
    name = arguments.recipe
    print(f"\nReport: {run.folder / 'report.html'}   ({seconds:.0f} s in all)")
    print(f"""
Next:
  tdro serve {name}                                 search page and HTTP API on http://{run.recipe.serve.host}:{run.recipe.serve.port}
  tdro run {name} --set compare=[proportional]      one more baseline
  tdro tune {name}                                  search the DRO learning rate and temperature""")


def _tables(run: Run) -> None:
    from tdro_ray.report.page import summary_table
    from tdro_ray.stages.seeds import seeds_table

    print("\n" + table(summary_table(run.folder)))
    over = seeds_table(run)
    if over:
        print("\n" + table(over))


COMMANDS = {
    "run": _whole_run,
    "compare": _compare,
    "report": _report,
    "tune": _tune,
    "influence": _influence,
    "export": _export,
    "serve": _serve,
}


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("tdro-ray", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _quiet_libraries() -> None:
    """Keep libraries from drawing over our display, here and in the workers that inherit the environment."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        # Lines that Ray prints past log_to_driver, harmless and no news to the user.
        "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started|ServeController.graceful_shutdown failed",
        "DS_ACCELERATOR": "cpu" if not _has_gpu() else "cuda",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.stdout.isatty():
        os.environ.setdefault("NO_COLOR", "1")


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
