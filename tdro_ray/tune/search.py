"""Ray Tune over stage 1: which DRO learning rate, temperature and measure give the best retrieval on the dev queries.

Every trial runs in one process of its own (`trial.py`) and starts no workers, so trials cannot wait for each other's
resources. They share collections, hard negatives and reference scores; what a trial has finished is kept under its
setting, so a study that was killed, or is asked for more trials, repeats none.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tdro_ray import stages
from tdro_ray.config import Recipe, TuneSettings
from tdro_ray.errors import ConfigError, DataError, ResourceError, TdroError
from tdro_ray.evaluate.significance import compare_mean, compare_tasks
from tdro_ray.pipeline import Progress, Run, Stage, key_of, read_json, write_json
from tdro_ray.tune.trial import Setting, Study, drop_models, run_trial, shortened, trial_folder

DIGITS = 3  # significant digits of a tried value: what is reported is what was run
PROCESS_MEMORY = 1.2e9  # bytes of a trial's process without its model: Python, torch, Ray, a few batches
MODEL_MEMORY = 20  # bytes a parameter: weights, gradients, two moments of Adam, and the evaluated copy
RESAMPLES = 4000  # of the bootstrap
INTERVAL = 1.0  # seconds between two looks at the trials


def tune(run: Run) -> None:
    """Search, and write `tune/{trials.json,best.json,report.html}` into the run folder; print the best setting.

    Brings the stages before it up to date first. Raises ResourceError when the trials do not fit, TdroError when
    every trial failed.
    """
    study = prepare(run)
    out = run.folder / "tune"
    recipe = run.recipe
    space = search_space(recipe)
    key = key_of(
        "study",
        study.key,
        recipe.tune.model_dump(mode="json", exclude={"concurrent", "cpus_per_trial"}),
        default_setting(recipe),
    )

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        from tdro_ray.tune.report import write_report

        concurrent, why = preflight(recipe, _parameters(run), _resources())
        print(why, flush=True)
        trials = search(study, space, recipe, concurrent, run.path("tune") / "ray", key, progress)
        write_json(out / "trials.json", trials)
        best = best_of(recipe, trials, study.folder)
        write_json(out / "best.json", best)
        write_report(recipe, trials, best, study.folder, out / "report.html")
        failed = sum(t["status"] == "failed" for t in trials)
        line = f"{len(trials)} trials{f', {failed} failed' if failed else ''}, {best['line']}"
        return line, {"trials": len(trials), "failed": failed, "best": best["set"], "warnings": best["warnings"]}

    run.do(Stage("tune", key, tuple(out / name for name in ("trials.json", "best.json", "report.html")), work))
    _closing(run, read_json(out / "best.json"), out)


def prepare(run: Run) -> Study:
    """Bring data, reference model and reference scores up to date for the trials' stage 1, and return the study.

    Raises DataError when no task has dev queries.
    """
    for stage in (stages.ingest, stages.mine, stages.model, stages.reference):
        stage(run)
    recipe, settings = run.recipe, run.recipe.tune
    found = stages.collections(run)
    if not any(c.manifest.dev_queries for c in found):
        raise DataError(
            "No task has dev queries, which a trial is judged by. Set data.dev_queries to at least 1 (50 is usual); tasks are read again."
        )
    # The scores of the longer of both runs, so that tuning never makes the scores of `tdro run` out of date.
    longer = recipe.optimize.model_copy(update={"steps": max(recipe.optimize.steps, settings.optimize_steps)})
    stages.score(Run(recipe.model_copy(update={"optimize": longer}), run.display, run.connect))
    scores_key, scores = stages.scores_folder(run, recipe.optimize)
    optimize = shortened(recipe.optimize, settings.optimize_steps)
    finetune = shortened(recipe.finetune, settings.finetune_steps)
    searched = {"eta", "temperature", "measure", *settings.choices}
    key = key_of(
        "trial",
        optimize.model_dump(mode="json", exclude=searched),
        finetune.model_dump(mode="json"),
        [scores_key, stages.model_key(run), recipe.seed, settings.evaluations, recipe.evaluate.ndcg_at],
        {c.name: [c.manifest.hash, c.manifest.tests_hash, c.manifest.negatives.get("hash")] for c in found},
    )
    return Study(
        key=key,
        folder=run.path("tune") / "trials",
        tasks=stages._job(run, "tune", key, optimize).tasks,
        batches=stages.batch_recipe(run, optimize, None, "stratified", scores),
        optimize=optimize,
        finetune=finetune,
        model=recipe.model,
        seed=recipe.seed,
        evaluations=settings.evaluations,
        ndcg_at=recipe.evaluate.ndcg_at,
        batch_tokens=recipe.evaluate.batch_tokens,
        device="cuda" if recipe.scale.use_gpu else "cpu",
    )


def default_setting(recipe: Recipe) -> Setting:
    """The recipe's own values of what is searched: the first trial, and what the best one is compared with."""
    names = ("eta", "temperature", "measure", *recipe.tune.choices)
    return {name: getattr(recipe.optimize, name) for name in names}


def search_space(recipe: Recipe) -> dict[str, tuple[str, Any]]:
    """Return `{field: ("log", (low, high)) | ("choice", values)}`, widened to hold the recipe's own setting."""
    settings, own = recipe.tune, default_setting(recipe)
    space: dict[str, tuple[str, Any]] = {
        name: ("log", (min(low, own[name]), max(high, own[name])))
        for name, (low, high) in {"eta": settings.eta, "temperature": settings.temperature}.items()
    }
    for name, values in {"measure": settings.measures, **settings.choices}.items():
        space[name] = ("choice", list(dict.fromkeys((*values, own[name]))))
    return space


def rounded(config: Setting) -> Setting:
    """Return the setting with floats of `DIGITS` significant digits."""
    return {name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for name, value in config.items()}


# Resources


def _resources() -> dict[str, float]:
    import ray

    return dict(ray.cluster_resources())


def _parameters(run: Run) -> int:
    return int(run.manifest("model").get("summary", {}).get("parameters", 0))


def preflight(recipe: Recipe, parameters: int, resources: dict[str, float]) -> tuple[int, str]:
    """Return (trials at once, one line that says why). `resources` are the cluster's: CPU, GPU, memory in bytes.

    Raises ResourceError when not one trial fits, or fewer than `tune.concurrent`.
    """
    settings, memory = recipe.tune, PROCESS_MEMORY + MODEL_MEMORY * parameters
    fit = {
        f"{resources.get('CPU', 0):g} CPUs at {settings.cpus_per_trial:g} a trial": int(
            resources.get("CPU", 0) / settings.cpus_per_trial + 1e-9
        )
    }
    if recipe.scale.use_gpu:
        fit[f"{resources.get('GPU', 0):g} GPUs at 1 a trial"] = int(resources.get("GPU", 0))
    tightest = min(fit, key=lambda name: fit[name])
    most = fit[tightest]
    if most < max(1, settings.concurrent):
        wanted = f"tune.concurrent={settings.concurrent} trials" if settings.concurrent else "one trial"
        mend = f"Set tune.concurrent to at most {most}" if most else "Take a larger cluster"
        raise ResourceError(
            f"{wanted} cannot run at once: {tightest} make room for {most}. {mend}, or lower tune.cpus_per_trial."
        )
    by_memory = int(resources["memory"] / memory) if resources.get("memory") else most
    concurrent = settings.concurrent or max(1, min(most, by_memory, settings.trials))
    reason = tightest
    if not settings.concurrent and by_memory < most:
        reason = f"{resources['memory'] / 1e9:.0f} GB of memory at about {memory / 1e9:.1f} GB a trial"
    elif settings.concurrent:
        reason = f"tune.concurrent; {tightest} make room for {most}"
    elif settings.trials < most:
        reason = f"no more are wanted; {tightest} make room for {most}"
    tight = (
        f" Memory is tight: about {concurrent * memory / 1e9:.0f} GB of {resources['memory'] / 1e9:.0f} GB."
        if by_memory < concurrent
        else ""
    )
    return concurrent, f"  {settings.trials} trials, {concurrent} at once ({reason}).{tight}"


# The search


def search(
    study: Study,
    space: dict[str, tuple[str, Any]],
    recipe: Recipe,
    concurrent: int,
    storage: Path,
    key: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Run what is missing of the study and return its trials in order, the default setting first.

    A failed trial stays in the list with its error. Raises TdroError when all failed.
    """
    import ray.tune as rt

    from tdro_ray.tune.quiet import quiet_tune

    settings, name = recipe.tune, f"{recipe.name}-tune-{key}"
    for old in storage.glob("*"):
        if old.name != name:  # of another search; what its trials found is kept under their settings
            shutil.rmtree(old, ignore_errors=True)
    resources = {"CPU": settings.cpus_per_trial, "GPU": 1 if recipe.scale.use_gpu else 0}
    trainable = rt.with_resources(_trainable(study), resources)
    with quiet_tune(), _watched(study, settings, progress):
        tuner = _restored(storage / name, trainable) or rt.Tuner(
            trainable,
            param_space={
                field: rt.loguniform(*values) if kind == "log" else rt.choice(values)
                for field, (kind, values) in space.items()
            },
            tune_config=rt.TuneConfig(
                metric=settings.objective,
                mode="max",
                num_samples=settings.trials,
                max_concurrent_trials=concurrent,
                search_alg=_searcher(study, recipe),
                scheduler=_scheduler(settings),
                reuse_actors=True,  # later trials find torch imported and the dev texts tokenised
            ),
            run_config=rt.RunConfig(name=name, storage_path=str(storage), verbose=0),
        )
        results = tuner.fit()
    trials = [_record(study, number, results[number], settings) for number in range(len(results))]
    for trial in trials:
        drop_models(trial_folder(study, trial["setting"]))
    if all(t["status"] == "failed" for t in trials):
        raise TdroError(f"All {len(trials)} trials failed; the first with: {trials[0]['error']}")
    return trials


def _trainable(study: Study) -> Callable[[Setting], None]:
    def tdro_trial(config: Setting) -> None:
        import ray.tune as rt

        setting = rounded(config)
        error = trial_folder(study, setting) / "error.json"
        error.unlink(missing_ok=True)
        try:
            run_trial(study, setting, rt.report)
        except Exception as err:
            write_json(error, {"error": f"{type(err).__name__}: {err}"})
            raise

    return tdro_trial


def _restored(path: Path, trainable: Any) -> Any:
    """The tuner of a search that was cut short, with its finished trials; None where there is none to go on with."""
    import ray.tune as rt

    if not rt.Tuner.can_restore(str(path)) or not any(path.glob("experiment_state-*.json")):
        shutil.rmtree(path, ignore_errors=True)
        return None
    return rt.Tuner.restore(str(path), trainable, resume_unfinished=True)


def _searcher(study: Study, recipe: Recipe) -> Any:
    """Tune's search algorithm. The same seed draws the same settings again; Optuna is told what is finished instead."""
    if recipe.tune.search == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(points_to_evaluate=[default_setting(recipe)], random_state=recipe.seed)
    try:
        import optuna
    except ImportError as err:
        raise ConfigError(
            "tune.search optuna needs the package optuna: pip install 'tdro-ray[train]', or set tune.search=random."
        ) from err
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = [default_setting(recipe)]
    space = search_space(recipe)
    for result in sorted(study.folder.glob("*/result.json"), key=lambda p: p.stat().st_mtime):
        setting = read_json(result).get("setting", {})
        if setting not in points and trial_folder(study, setting) == result.parent and _within(setting, space):
            points.append(setting)
    return OptunaSearch(seed=recipe.seed, points_to_evaluate=points[: recipe.tune.trials])


def _within(setting: Setting, space: dict[str, tuple[str, Any]]) -> bool:
    inside = {"log": lambda value, ends: ends[0] <= value <= ends[1], "choice": lambda value, values: value in values}
    return set(setting) == set(space) and all(
        inside[kind](setting[name], values) for name, (kind, values) in space.items()
    )


def _scheduler(settings: TuneSettings) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    if settings.scheduler == "asha":
        return ASHAScheduler(max_t=settings.evaluations, grace_period=1, reduction_factor=2)
    if settings.scheduler == "median":
        return MedianStoppingRule(time_attr="training_iteration", grace_period=1, min_samples_required=3)
    return FIFOScheduler()


def _record(study: Study, number: int, result: Any, settings: TuneSettings) -> dict[str, Any]:
    """What `trials.json` says of one trial."""
    setting = rounded(result.config)
    folder = trial_folder(study, setting)
    done = read_json(folder / "result.json")
    record: dict[str, Any] = {"number": number, "id": folder.name, "setting": setting}
    if done:
        last = done["evaluations"][-1]
        facts = {key: done[key] for key in ("alpha", "evaluations", "seconds", "loss")}
        return {
            **record,
            "status": "done",
            "objective": last[settings.objective],
            "mean": last["mean"],
            "worst": last["worst"],
            **facts,
        }
    so_far = read_json(folder / "evaluations.json").get("evaluations", [])
    learned = read_json(folder / "optimize" / "done.json")
    alpha = dict(zip(study.tasks.names, learned.get("alpha", []), strict=False))
    if result.error is not None:
        text = read_json(folder / "error.json").get("error") or str(result.error).strip().splitlines()[-1]
        return {**record, "status": "failed", "error": text, "alpha": alpha, "evaluations": so_far}
    return {**record, "status": "stopped", "alpha": alpha, "evaluations": so_far}


@contextmanager
def _watched(study: Study, settings: TuneSettings, progress: Progress) -> Iterator[None]:
    """While the block runs, show how many trials are done and the best of them."""
    stop = threading.Event()
    progress.update("starting")

    def watch() -> None:
        while not stop.wait(INTERVAL):
            text, share = _state(study, settings)
            progress.update(text, share)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _state(study: Study, settings: TuneSettings) -> tuple[str, float]:
    folders = [p.parent for p in study.folder.glob("*/setting.json")]
    folders = [f for f in folders if trial_folder(study, read_json(f / "setting.json")) == f]
    results = [r for f in folders if (r := read_json(f / "result.json"))]
    failed = sum((f / "error.json").exists() for f in folders)
    done = min(settings.trials, len(results) + failed)
    best = max((r["evaluations"][-1][settings.objective] for r in results), default=None)
    text = f"{done} of {settings.trials} trials" + (
        f", best {settings.objective} {best:.3f}" if best is not None else ""
    )
    return text, done / settings.trials


# What came of it


def best_of(recipe: Recipe, trials: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return what `best.json` holds: the best finished trial, its settings as `--set` strings, and how it compares.

    `folder` holds the trials' folders. The comparison with the recipe's own setting, trial 0, is paired over the dev
    queries; it is left out where one of both has no result or they are the same.
    """
    finished = [t for t in trials if t["status"] == "done"]
    best = max(finished, key=lambda t: t["objective"])
    own = next((t for t in finished if t["number"] == 0), None)
    options = [f"optimize.{name}={_yaml(value)}" for name, value in best["setting"].items()]
    facts = {key: best[key] for key in ("setting", "objective", "mean", "worst")}
    command = " ".join(["tdro run", recipe.name, *(f"--set {o}" for o in options)])
    line = (
        f"best {recipe.tune.objective} nDCG@{recipe.evaluate.ndcg_at} {best['objective']:.3f} (trial {best['number']})"
    )
    found = {"trial": best["number"], **facts, "set": options, "command": command}
    if own is best:
        return {**found, "line": f"{line}, the recipe's own setting", "warnings": []}
    if own is None:
        return {**found, "line": line, "warnings": ["the recipe's own setting has no result to compare with"]}
    ours, theirs = (read_json(folder / t["id"] / "result.json")["per_query"] for t in (best, own))
    mean = compare_mean(ours, theirs, resamples=RESAMPLES)
    tasks = compare_tasks(ours, theirs, resamples=RESAMPLES)
    return {
        **found,
        "default": {key: own[key] for key in ("number", "setting", "objective", "mean", "worst")},
        "mean_against_default": asdict(mean),
        "tasks_against_default": {task: {**asdict(c), "p_holm": p} for task, (c, p) in tasks.items()},
        "line": f"{line}, the recipe's own setting {own['objective']:.3f}",
        "warnings": [] if mean.low > 0 else ["the best trial is not clearly better than the recipe's own setting"],
    }


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _closing(run: Run, best: dict[str, Any], out: Path) -> None:
    print(
        f"\n{best['line'][0].upper()}{best['line'][1:]}: {', '.join(o.removeprefix('optimize.') for o in best['set'])}"
    )
    against = best.get("mean_against_default")
    if against:
        print(
            f"Mean over tasks against the recipe's setting: {against['mean_diff']:+.4f} (95% interval {against['low']:+.4f} to {against['high']:+.4f}, over dev queries)"
        )
    print(f"Report: {out / 'report.html'}\n\nNext:\n  {best['command']}")
    if os.environ.get("RAY_ADDRESS"):
        return
    print(f"  tensorboard --logdir {run.path('tune') / 'ray'}")
