"""The same run under several seeds, and what they say together.

The run itself is the first seed. Every further one is a process of its own, a job of the same Ray cluster, whose run
folder is `seeds/<seed>` inside this one; as many run at once as fit. They share the collections and the mined
negatives; base model, references, stage 1, fine-tuning and evaluation are made anew under each seed.

    seeds/<seed>.yaml, seeds/<seed>.log, seeds/<seed>/    recipe, output and run folder of a seed
    seeds.json                                            results and weights over all seeds
    weights/seed-mean.json                                the learned weights' mean over the seeds
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tdro_ray.config import Recipe, ScaleSettings, mining_seed, most_workers, store_folder
from tdro_ray.errors import TdroError
from tdro_ray.evaluate.seeds import summarise, table_of
from tdro_ray.pipeline import Progress, Run, Stage, fresh_folder, key_of, read_json, write_json
from tdro_ray.stages.rivals import prefix, stage1_rivals
from tdro_ray.stages.training import BASELINE
from tdro_ray.stages.weights import model_folders

SHARED = ("ingest", "clean", "mine")  # stages whose outcome does not depend on the run's seed
INTERVAL = 1.0  # seconds between two looks at the seeds' processes


def seeds(run: Run) -> dict[str, Any] | None:
    """Bring the runs of all seeds up to date and sum them up; None where the recipe asks for one seed only."""
    recipe = run.recipe
    if recipe.seeds == 1:
        return None
    asked = recipe.model_dump(mode="json", exclude={"index", "serve", "tune", "scale", "name"})
    key = key_of("seeds", asked, run.manifest("evaluate").get("key"))

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        others = [recipe.seed + i for i in range(1, recipe.seeds)]
        _run_all(run, others, progress)
        found = summarise([run.folder, *(run.folder / "seeds" / str(seed) for seed in others)], _stages1(run), BASELINE)
        evaluated = run.manifest("evaluate")["key"]  # tells a reader whether the results beside are still these
        write_json(run.folder / "seeds.json", {"seeds": [recipe.seed, *others], "evaluate": evaluated, **found})
        _write_mean_weights(run, found["weights"].get("", {}).get("mean", {}))
        best = max(found["models"], key=lambda name: found["models"][name]["mean"]["average"])
        facts = found["models"][best]["mean"]
        line = f"{recipe.seeds} seeds, best {best}: mean {found['measure']} {facts['average']:.3f}"
        return line, {"seeds": [recipe.seed, *others], "best": best}

    return run.do(Stage("seeds", key, (run.folder / "seeds.json",), work))


def seeds_table(run: Run) -> list[list[str]]:
    """Results over the seeds as rows of text, [] where there is one seed only."""
    found = read_json(run.folder / "seeds.json") if run.recipe.seeds > 1 else {}
    return table_of(found, [*model_folders(run)]) if found else []


def _stages1(run: Run) -> dict[str, tuple[str, str]]:
    """Every stage 1 of the run: rival -> (stage, start of its weight files)."""
    names = {rival: f"optimize-{rival}" if rival else "optimize" for rival in stage1_rivals(run.recipe)}
    return {rival: (stage, prefix(stage)) for rival, stage in names.items()}


def seed_recipe(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe of one further seed: the same data, everything that is trained made anew."""
    changes = {
        "name": str(seed),
        "seed": seed,
        "seeds": 1,
        "data": recipe.data.model_copy(update={"store": store_folder(recipe)}),
        "mine": recipe.mine.model_copy(update={"seed": mining_seed(recipe)}),
    }
    return recipe.model_copy(update=changes)


def at_once(scale: ScaleSettings, resources: dict[str, float]) -> int:
    """Return how many runs fit the cluster side by side, at least 1: all workers and a data task of each."""
    workers = most_workers(scale)
    need = workers * scale.cpus_per_worker + scale.cpus_per_data_task if workers else 1.0
    fit = int(resources.get("CPU", 0.0) / need + 1e-9)
    if scale.use_gpu:
        fit = min(fit, int(resources.get("GPU", 0.0) / max(1, workers)))
    return max(1, fit)


def _run_all(run: Run, others: list[int], progress: Progress) -> None:
    """Run every seed to its end. Raises TdroError with the first failed seed's message when all have ended."""
    from tdro_ray.data.ray_data import cluster

    resources, address = cluster()
    concurrent = at_once(run.recipe.scale, resources)
    waiting, running, failed = list(others), dict[int, subprocess.Popen[bytes]](), list[int]()
    try:
        while waiting or running:
            while waiting and len(running) < concurrent:
                seed = waiting.pop(0)
                running[seed] = _start(run, seed, address, concurrent)
            time.sleep(INTERVAL)
            failed += [seed for seed, process in running.items() if process.poll() not in (None, 0)]
            running = {seed: process for seed, process in running.items() if process.poll() is None}
            done = len(others) - len(waiting) - len(running)
            states = "; ".join(f"seed {seed}: {_last_line(run, seed)}" for seed in running)
            progress.update(f"{done} of {len(others)} done; {states}", done / len(others))
    finally:
        for process in running.values():
            process.terminate()
    if failed:
        raise TdroError(
            f"The run of seed {failed[0]} failed: {_last_line(run, failed[0])} (all of it: {run.folder / 'seeds' / f'{failed[0]}.log'}). "
            "Run the same command again: what is finished is kept."
        )


def _start(run: Run, seed: int, address: str, concurrent: int) -> subprocess.Popen[bytes]:
    folder = run.folder / "seeds"
    for stage in SHARED:  # done for the run, not again for each seed: the seeds would write one store at once
        _share(run, stage, folder / str(seed))
    recipe = folder / f"{seed}.yaml"
    recipe.write_text(yaml.safe_dump(seed_recipe(run.recipe, seed).model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "tdro_ray", "run", str(recipe), "--until", "evaluate"]
    # Side by side in one machine's processes, each with all its threads would slow the others.
    threads = (
        {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // concurrent))}
        if not run.recipe.scale.num_workers
        else {}
    )
    with (folder / f"{seed}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**threads, **os.environ, "TDRO_RUNS": str(folder), "RAY_ADDRESS": address},
        )


def _share(run: Run, stage: str, seed_folder: Path) -> None:
    """Give a seed the stage's manifest and those of its outputs that lie in the run folder."""
    target = fresh_folder(seed_folder / "stages" / stage)
    shutil.copy2(run.path(stage) / "manifest.json", target / "manifest.json")
    for name in run.manifest(stage)["outputs"]:
        if not Path(name).is_absolute():
            (seed_folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(run.folder / name, seed_folder / name)


def _last_line(run: Run, seed: int) -> str:
    path = run.folder / "seeds" / f"{seed}.log"
    lines = [ln for ln in path.read_text(encoding="utf-8", errors="replace").splitlines() if ln.strip()]
    return lines[-1].strip() if lines else "starting"


def _write_mean_weights(run: Run, mean: dict[str, float]) -> None:
    from tdro_ray.dro.files import WeightFile, read_weights, write_weights
    from tdro_ray.dro.select import normalised

    if not mean:
        return
    own = read_weights(run.folder / "weights" / "current.json")
    meta = {**own.meta, "kind": "seed-mean", "seeds": run.recipe.seeds}
    write_weights(run.folder / "weights" / "seed-mean.json", WeightFile(normalised(mean), own.sizes, meta))
