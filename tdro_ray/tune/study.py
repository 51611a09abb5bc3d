"""From a recipe to a study: the stages that it needs, what its trials share, and the space that they search. No Ray here."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tdro_ray import stages
from tdro_ray.config import Recipe
from tdro_ray.errors import DataError
from tdro_ray.pipeline import Run, key_of
from tdro_ray.recipe import recipe_names
from tdro_ray.tune.trial import Setting, Study, shortened

DIGITS = 3  # significant digits of a tried value: what is reported is what was run


def prepare(run: Run) -> str:
    """Bring data, reference model and reference scores up to date for the trials; return the key that they share.

    The key holds everything but the searched settings that decides a trial's result. Raises DataError when no task
    has dev queries.
    """
    for stage in (stages.ingest, stages.clean, stages.mine, stages.model, stages.reference):
        stage(run)
    recipe, settings = run.recipe, run.recipe.tune
    found = stages.collections(run)
    if not any(c.manifest.dev_queries for c in found):
        raise DataError(
            "No task has dev queries, which a trial is judged by. Set data.dev_queries to at least 1 (50 is usual); "
            "a task needs ten training rows for each."
        )
    # The scores of the longer of both runs, so that tuning never makes the scores of `tdro run` out of date.
    longer = recipe.optimize.model_copy(update={"steps": max(recipe.optimize.steps, settings.optimize_steps)})
    stages.score_for(run, longer)
    optimize, finetune = short_settings(recipe)
    searched = {"eta", "temperature", *settings.choices} | ({"measure"} if not optimize.measure_options else set())
    return key_of(
        "trial",
        optimize.model_dump(mode="json", exclude=searched),
        finetune.model_dump(mode="json"),
        [stages.scores_folder(run, recipe.optimize)[0], stages.model_key(run), recipe.seed],
        [settings.evaluations, recipe.evaluate.ndcg_at],
        {c.name: [c.manifest.hash, c.manifest.tests_hash, c.manifest.negatives.get("hash")] for c in found},
    )


def make_study(run: Run, key: str) -> Study:
    """Return what all trials share. Opens the store."""
    optimize, _ = short_settings(run.recipe)
    batches, proxy = stages.stage1_batches(run, optimize), stages.proxy_base(run, optimize)
    return replace(bare_study(run, "tune", key), batches=batches, proxy=proxy)


def bare_study(run: Run, stage: str, key: str = "") -> Study:
    """Return what short fine-tunings share, without reference scores; its key covers all that decides their results."""
    recipe = run.recipe
    optimize, finetune = short_settings(recipe)
    batches = stages.batch_recipe(run, optimize, None, "stratified")
    tests = {c.name: c.manifest.tests_hash for c in stages.collections(run)}
    key = key or key_of(
        stage,
        finetune.model_dump(mode="json"),
        [stages.model_key(run), stages.negatives_key(run), recipe.seed, recipe.evaluate.ndcg_at],
        tests,
    )
    return Study(
        key=key,
        folder=run.path(stage) / "trials",
        tasks=stages.train_job(run, stage, key, optimize).tasks,
        batches=batches,
        proxy=batches.model,
        optimize=optimize,
        finetune=finetune,
        model=recipe.model,
        seed=recipe.seed,
        evaluations=recipe.tune.evaluations,
        ndcg_at=recipe.evaluate.ndcg_at,
        batch_tokens=recipe.evaluate.batch_tokens,
        device="cuda" if recipe.scale.use_gpu else "cpu",
    )


def short_settings(recipe: Recipe) -> tuple[Any, Any]:
    """Settings of stage 1 and of the fine-tuning in a trial."""
    return shortened(recipe.optimize, recipe.tune.optimize_steps), shortened(
        recipe.finetune, recipe.tune.finetune_steps
    )


def default_setting(recipe: Recipe) -> Setting:
    """The recipe's own values of what is searched: the first trial, and what the best one is compared with."""
    own = recipe.optimize
    choices = {name: getattr(own, name) for name in ("measure", *recipe.tune.choices)}
    return {"eta": rounded(own.eta), "temperature": rounded(own.temperature), **choices}


def rounded(value: float) -> float:
    """Return the value with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def search_space(recipe: Recipe) -> dict[str, tuple[str, Any]]:
    """Return `{field: ("log", (low, high)) | ("choice", values)}`, widened to hold the recipe's own setting."""
    settings, own = recipe.tune, default_setting(recipe)
    space: dict[str, tuple[str, Any]] = {
        name: ("log", (min(low, own[name]), max(high, own[name])))
        for name, (low, high) in {"eta": settings.eta, "temperature": settings.temperature}.items()
    }
    for name, values in {"measure": settings.measures, **settings.choices}.items():
        space[name] = ("choice", [*values] if own[name] in values else [*values, own[name]])
    return space


def within(setting: Setting, space: dict[str, tuple[str, Any]]) -> bool:
    """Return whether a setting is a point of the space."""
    if set(setting) != set(space):
        return False
    inside = {"log": lambda value, ends: ends[0] <= value <= ends[1], "choice": lambda value, values: value in values}
    return all(inside[kind](setting[name], values) for name, (kind, values) in space.items())


def to_tune(setting: Setting) -> dict[str, Any]:
    """Return the setting as Tune's searchers take it: mappings and lists as JSON, which they would read as nested spaces."""
    return {name: plain(value) for name, value in setting.items()}


def plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def from_tune(config: dict[str, Any], space: dict[str, tuple[str, Any]]) -> Setting:
    """Return the setting that Tune means, floats with `DIGITS` significant digits."""
    setting = {}
    for name, (kind, values) in space.items():
        if kind == "log":
            setting[name] = rounded(config[name])
        else:
            setting[name] = next(value for value in values if plain(value) == config[name])
    return setting


def as_typed(recipe: Recipe) -> str:
    """Return what a user gives a command for this recipe: the name of a shipped one, else its file."""
    return recipe.name if recipe.name in recipe_names() else f"{recipe.name}.yaml"
