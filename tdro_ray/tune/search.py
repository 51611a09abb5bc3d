"""Ray Tune over stage 1: which DRO learning rate, temperature and measure give the best retrieval on the dev queries.

Every trial runs in one process of its own (`trial.py`) and starts no workers, so trials cannot wait for each other's
resources. They share collections, hard negatives and reference scores; what a trial has finished is kept under its
setting, so a study that was killed, or is asked for more trials, repeats none.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdro_ray.config import Recipe, TuneSettings
from tdro_ray.errors import ConfigError, TdroError
from tdro_ray.pipeline import Progress, Run, Stage, key_of, read_json, write_json
from tdro_ray.tune.outcome import best_of, confirmed
from tdro_ray.tune.preflight import preflight
from tdro_ray.tune.study import default_setting, from_tune, make_study, plain, prepare, search_space, to_tune, within
from tdro_ray.tune.trial import Setting, Study, confirm_trial, drop_models, run_trial, trial_folder

INTERVAL = 1.0  # seconds between two looks at the trials
ENVIRONMENT = {  # of Tune while it searches
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # its own would end a study at Ctrl-C as if it were done
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a header whatever the verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a recipe mean the same in a trial
}
LOGGERS = ("ray.tune", "ray.train", "ray.air")


def tune(run: Run) -> None:
    """Search, and write `tune/{trials.json,best.json,report.html}` into the run folder; print the best setting.

    Brings the stages before it up to date first. Raises ResourceError when the trials do not fit, TdroError when
    no trial finished.
    """
    recipe, out = run.recipe, run.folder / "tune"
    shared = prepare(run)
    asked = recipe.tune.model_dump(mode="json", exclude={"concurrent", "cpus_per_trial"})
    key = key_of("study", shared, asked, default_setting(recipe))

    def work(progress: Progress) -> tuple[str, dict[str, Any]]:
        import ray

        from tdro_ray.tune.report import write_report

        parameters = int(run.manifest("model").get("summary", {}).get("parameters", 0))
        concurrent, why = preflight(recipe, parameters, dict(ray.cluster_resources()))
        print(why, flush=True)
        study = make_study(run, shared)
        trials = search(study, recipe, concurrent, run.path("tune") / "ray", key, progress)
        best = best_of(recipe, trials, study.folder)
        if recipe.tune.confirm and "default" in best:
            best = confirmed(best, confirm(study, recipe, best, progress))
        write_json(out / "trials.json", trials)
        write_json(out / "best.json", best)
        write_report(recipe, trials, best, study.folder, out / "report.html")
        failed = sum(t["status"] == "failed" for t in trials)
        line = f"{len(trials)} trials{f', {failed} failed' if failed else ''}, {best['line']}"
        return line, {"trials": len(trials), "failed": failed, "best": best["set"], "warnings": best["warnings"]}

    run.do(Stage("tune", key, tuple(out / name for name in ("trials.json", "best.json", "report.html")), work))
    _closing(run, read_json(out / "best.json"), out)


def search(
    study: Study,
    recipe: Recipe,
    concurrent: int,
    storage: Path,
    key: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Run what is missing of the study and return its trials in order, the default setting first.

    A failed trial stays in the list with its error. Raises TdroError when none finished.
    """
    import ray.tune as rt

    settings, space, name = recipe.tune, search_space(recipe), f"{recipe.name}-tune-{key}"
    for old in storage.glob("*"):
        if old.name != name:  # of another search; what its trials found is kept under their settings
            shutil.rmtree(old, ignore_errors=True)
    resources = {"CPU": settings.cpus_per_trial, "GPU": 1 if recipe.scale.use_gpu else 0}
    trainable = rt.with_resources(_trainable(study, space), resources)
    with _quiet(), _watched(study, settings, progress):
        tuner = _restored(storage / name, trainable) or rt.Tuner(
            trainable,
            param_space={
                field: rt.loguniform(*values) if kind == "log" else rt.choice([plain(value) for value in values])
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
    found = {}
    for result in (results[i] for i in range(len(results))):  # a small space draws a setting twice
        setting = from_tune(result.config, space)
        found[trial_folder(study, setting)] = (setting, result.error)
    trials = _numbered(study, recipe, list(found.values()))
    for trial in trials:
        drop_models(trial_folder(study, trial["setting"]))
    if not any(t["status"] == "done" for t in trials):
        error = next((t["error"] for t in trials if t["status"] == "failed"), "stopped early")
        raise TdroError(f"None of the {len(trials)} trials finished; the first that failed: {error}")
    return trials


def confirm(study: Study, recipe: Recipe, best: dict[str, Any], progress: Progress) -> dict[str, list[float]]:
    """Return the mean nDCG of the rival and of the recipe's own setting for each of `tune.confirm` further seeds."""
    import ray

    task = ray.remote(confirm_trial).options(
        num_cpus=recipe.tune.cpus_per_trial, num_gpus=1 if recipe.scale.use_gpu else 0, name="tdro_confirm"
    )
    seeds = [recipe.seed + 1 + i for i in range(recipe.tune.confirm)]
    settings = {"rival": best["rival_setting"], "default": best["default"]["setting"]}
    asked = {(name, seed): task.remote(study, setting, seed) for seed in seeds for name, setting in settings.items()}
    waiting = list(asked.values())
    while waiting:
        progress.update(f"confirming: {len(asked) - len(waiting)} of {len(asked)} runs", 1 - len(waiting) / len(asked))
        _, waiting = ray.wait(waiting, timeout=10)
    return {"seeds": seeds, **{name: [ray.get(asked[name, seed]) for seed in seeds] for name in settings}}


def _trainable(study: Study, space: dict[str, tuple[str, Any]]) -> Callable[[dict[str, Any]], None]:
    def tdro_trial(config: dict[str, Any]) -> None:
        import ray.tune as rt

        setting = from_tune(config, space)
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

        return BasicVariantGenerator(points_to_evaluate=[to_tune(default_setting(recipe))], random_state=recipe.seed)
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
        if setting not in points and trial_folder(study, setting) == result.parent and within(setting, space):
            points.append(setting)
    return OptunaSearch(seed=recipe.seed, points_to_evaluate=[to_tune(p) for p in points[: recipe.tune.trials]])


def _scheduler(settings: TuneSettings) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    if settings.scheduler == "asha":
        return ASHAScheduler(max_t=settings.evaluations, grace_period=1, reduction_factor=2)
    if settings.scheduler == "median":
        return MedianStoppingRule(time_attr="training_iteration", grace_period=1, min_samples_required=3)
    return FIFOScheduler()


def _numbered(study: Study, recipe: Recipe, found: list[tuple[Setting, Exception | None]]) -> list[dict[str, Any]]:
    """Records of the trials: number 0 is the recipe's own setting, the others follow in the order of their first start."""
    own = default_setting(recipe)

    def started(trial: tuple[Setting, Exception | None]) -> tuple[bool, float]:
        path = trial_folder(study, trial[0]) / "setting.json"
        return trial[0] != own, path.stat().st_mtime if path.exists() else math.inf

    return [
        {"number": number, **_record(study, setting, error, recipe.tune.objective)}
        for number, (setting, error) in enumerate(sorted(found, key=started), 0 if own in [s for s, _ in found] else 1)
    ]


def _record(study: Study, setting: Setting, error: Exception | None, objective: str) -> dict[str, Any]:
    """What `trials.json` says of one trial."""
    folder = trial_folder(study, setting)
    record = {"id": folder.name, "setting": setting}
    done = read_json(folder / "result.json")
    if done:
        last = done["evaluations"][-1]
        facts = {key: done[key] for key in ("alpha", "evaluations", "seconds", "loss")}
        scores = {"objective": last[objective], "mean": last["mean"], "worst": last["worst"]}
        return {**record, "status": "done", **scores, **facts}
    so_far = read_json(folder / "evaluations.json").get("evaluations", [])
    alpha = dict(zip(study.tasks.names, read_json(folder / "optimize" / "done.json").get("alpha", []), strict=False))
    record |= {"alpha": alpha, "evaluations": so_far}
    if error is None:
        return {**record, "status": "stopped"}
    text = read_json(folder / "error.json").get("error") or str(error).strip().splitlines()[-1]
    return {**record, "status": "failed", "error": text}


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


@contextmanager
def _quiet() -> Iterator[None]:
    """While the block runs, Tune prints nothing: no table, no trace of a failed trial (its error is in our list)."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    os.environ.update(ENVIRONMENT)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")  # it is told the final evaluation twice
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _closing(run: Run, best: dict[str, Any], out: Path) -> None:
    print(
        f"\n{best['line'][0].upper()}{best['line'][1:]}: {', '.join(o.removeprefix('optimize.') for o in best['set'])}"
    )
    against, seeds = best.get("mean_against_default"), best.get("seeds")
    if against:
        print(
            f"Mean over tasks, trial {best['rival']} against the recipe's own setting: {against['mean_diff']:+.4f} "
            f"(95% interval {against['low']:+.4f} to {against['high']:+.4f}, over dev queries)"
        )
    if seeds:
        print(
            f"The same over {len(seeds['seeds'])} further seeds: {seeds['mean_diff']:+.4f} "
            f"(95% interval {seeds['low']:+.4f} to {seeds['high']:+.4f})"
        )
    print(f"Report: {out / 'report.html'}\n\nNext:\n  {best['command']}")
    if os.environ.get("RAY_ADDRESS"):
        return
    print(f"  tensorboard --logdir {run.path('tune') / 'ray'}")
