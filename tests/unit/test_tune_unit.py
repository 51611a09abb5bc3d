"""The parts of a study that need no Ray: its space, what fits at once, the choice of the best, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdro_ray.config import OptimizeSettings, Recipe, TrainSettings, changed
from tdro_ray.dro.files import write_trajectory
from tdro_ray.errors import ResourceError
from tdro_ray.tune.outcome import best_of, confirmed
from tdro_ray.tune.preflight import preflight
from tdro_ray.tune.report import render, write_report
from tdro_ray.tune.study import default_setting, from_tune, search_space, to_tune, within
from tdro_ray.tune.trial import shortened

TASKS = ["a_task", "<b> & task", "c-task"]


def recipe(optimize: dict[str, Any] | None = None, **tune: Any) -> Recipe:
    return Recipe.model_validate({"name": "quickstart", "tune": tune, "optimize": optimize or {}})


def test_the_space_holds_the_recipes_own_setting() -> None:
    found = recipe({"eta": 0.5, "temperature": 0.002, "measure": "plain"}, eta=[0.01, 0.1], measures=["ratio"])
    space = search_space(found)
    assert space == {
        "eta": ("log", (0.01, 0.5)),
        "temperature": ("log", (0.002, 0.1)),
        "measure": ("choice", ["ratio", "plain"]),
    }
    assert within(default_setting(found), space)
    assert not within({**default_setting(found), "eta": 0.6}, space)
    assert not within({"eta": 0.1}, space)


def test_a_setting_is_the_same_after_tune_and_has_few_digits() -> None:
    found = recipe({"eta": 1 / 3}, choices={"measure_options": [{"smooth": 0.5}], "clip": [0.3, 1.0]})
    space, own = search_space(found), default_setting(found)
    assert own["eta"] == 0.333 and own["measure_options"] == {}
    assert from_tune(to_tune(own), space) == own
    drawn = {**to_tune(own), "eta": 0.01234567, "measure_options": json.dumps({"smooth": 0.5})}
    assert from_tune(drawn, space) == {**own, "eta": 0.0123, "measure_options": {"smooth": 0.5}}


def test_a_short_run_keeps_the_shape_of_the_long_one() -> None:
    long = TrainSettings(steps=1000, warmup_steps=100)
    assert (shortened(long, 40).steps, shortened(long, 40).warmup_steps) == (40, 4)
    assert shortened(long, 2000).warmup_steps == 100


def test_options_of_the_recipes_measure_are_not_passed_to_another() -> None:
    own = OptimizeSettings(measure="ratio", measure_options={"floor": 0.1})
    assert changed(own, {"eta": 0.3}).measure_options == {"floor": 0.1}
    assert changed(own, {"measure": "excess"}).measure_options == {}
    assert changed(own, {"measure": "excess", "measure_options": {"smooth": 1}}).measure_options == {"smooth": 1}


@pytest.mark.parametrize(
    ("tune", "resources", "expected", "why"),
    [
        ({}, {"CPU": 4}, 4, "4 CPUs at 1 a trial"),
        ({"trials": 3}, {"CPU": 16}, 3, "no more are wanted"),
        ({"cpus_per_trial": 0.5}, {"CPU": 2}, 4, "2 CPUs at 0.5 a trial"),
        ({"concurrent": 1}, {"CPU": 2}, 1, "tune.concurrent; 2 CPUs at 1 a trial make room for 2"),
        ({}, {"CPU": 16, "memory": 7e9}, 3, "7 GB of memory at about 2.0 GB a trial"),
        ({}, {"CPU": 2, "memory": 1e9}, 1, "Memory is tight"),
        ({"concurrent": 4}, {"CPU": 4, "memory": 2e9}, 4, "Memory is tight: about 8 GB of 2 GB"),
    ],
)
def test_preflight_says_how_many_trials_fit_and_why(
    tune: dict[str, Any], resources: dict[str, float], expected: int, why: str
) -> None:
    concurrent, text = preflight(recipe(**tune), 10_000_000, resources)
    assert concurrent == expected and why in text


def test_preflight_refuses_what_would_wait_for_ever() -> None:
    with pytest.raises(ResourceError, match=r"tune\.concurrent=3 trials .* at most 2"):
        preflight(recipe(concurrent=3), 0, {"CPU": 2})
    with pytest.raises(ResourceError, match=r"one trial .* lower tune\.cpus_per_trial"):
        preflight(recipe(cpus_per_trial=4), 0, {"CPU": 2})
    gpu = Recipe.model_validate({"scale": {"use_gpu": True}, "tune": {"concurrent": 2}})
    with pytest.raises(ResourceError, match="1 GPUs at 1 a trial make room for 1"):
        preflight(gpu, 0, {"CPU": 8, "GPU": 1})


# The outcome and its page, of made-up trials


def make_trial(folder: Path, number: int, setting: dict[str, Any], lift: float, evaluations: int = 1) -> dict[str, Any]:
    """A finished trial with its files; `lift` is added to every query's score."""
    rng, scores = np.random.default_rng(7), {}
    for task in TASKS:
        scores[task] = {f"q{i}": float(np.clip(x + lift, 0, 1)) for i, x in enumerate(rng.uniform(0.2, 0.7, 60))}
    tasks = {task: sum(s.values()) / len(s) for task, s in scores.items()}
    mean, worst = sum(tasks.values()) / 3, min(tasks.values())
    last = {"step": 40, "mean": mean, "worst": worst, "tasks": tasks}
    alpha = rng.dirichlet([5, 5, 5], 20)
    path = folder / f"t{number}"
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps({"per_query": scores}))
    write_trajectory(path / "optimize" / "trajectory.parquet", range(20), TASKS, alpha, alpha)
    return {
        "number": number,
        "id": path.name,
        "setting": setting,
        "status": "done",
        **{"objective": mean, "mean": mean, "worst": worst},
        "alpha": dict(zip(TASKS, alpha[-1].tolist(), strict=True)),
        "evaluations": [{**last, "step": 40 * (i + 1) // evaluations} for i in range(evaluations)],
        "seconds": {"optimize": 12.0, "finetune": 5.0, "evaluate": 61.5},
        "loss": {"optimize": 1.0, "finetune": 2.0},
    }


def make_study(folder: Path, found: Recipe, lifts: list[float]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    own = default_setting(found)
    trials = [make_trial(folder, 0, own, 0.0, found.tune.evaluations)]
    for number, lift in enumerate(lifts, 1):
        eta, temperature = rng.uniform(0.01, 0.2, 2).round(4).tolist()
        setting = {**own, "eta": eta, "temperature": temperature, "measure": ("ratio", "excess")[number % 2]}
        trials.append(make_trial(folder, number, setting, lift, found.tune.evaluations))
    broken = {**own, "eta": 0.9}
    error = {"status": "failed", "error": "TdroError: <not finite>", "alpha": {}, "evaluations": []}
    return [*trials, {"number": len(trials), "id": "none", "setting": broken, **error}]


def test_the_best_trial_is_compared_with_the_recipes_own(tmp_path: Path) -> None:
    found = recipe()
    trials = make_study(tmp_path, found, [0.05, -0.02, 0.01])
    best = best_of(found, trials, tmp_path)
    assert best["trial"] == 1 and best["default"]["number"] == 0 and best["warnings"] == []
    assert best["mean_against_default"]["mean_diff"] == pytest.approx(0.05)
    assert best["mean_against_default"]["low"] > 0 and set(best["tasks_against_default"]) == set(TASKS)
    assert best["set"][2] == "optimize.measure=excess" and best["command"].startswith("tdro run quickstart --set ")
    assert "recipe's own setting" in best["line"]


def test_a_lead_that_may_be_chance_is_said_to_be_one(tmp_path: Path) -> None:
    found = recipe()
    trials = make_study(tmp_path, found, [0.0, -0.1])
    trials[1]["objective"] += 1e-6  # the same scores: a lead by nothing
    assert best_of(found, trials, tmp_path)["warnings"] == [
        "the best trial is not clearly better than the recipe's own setting"
    ]


def test_the_next_best_is_compared_where_the_recipes_own_setting_wins(tmp_path: Path) -> None:
    found = recipe()
    trials = make_study(tmp_path, found, [-0.1, -0.05])
    best = best_of(found, trials, tmp_path)
    assert (best["trial"], best["rival"], best["warnings"]) == (0, 2, [])
    assert best["line"].endswith("(trial 0), the recipe's own setting")
    assert best["mean_against_default"]["mean_diff"] == pytest.approx(-0.05)
    page = render(found, trials, best, tmp_path)
    assert "It is the recipe&#x27;s own setting. The next best, trial 2, against it: −0.050" in page
    alone = best_of(found, trials[:1], tmp_path)
    assert "rival" not in alone and "Nothing to compare" in render(found, trials[:1], alone, tmp_path)


def test_further_seeds_have_the_last_word(tmp_path: Path) -> None:
    from scipy.stats import ttest_rel

    found = recipe()
    trials = make_study(tmp_path, found, [0.05])
    runs = {"seeds": [43, 44, 45], "rival": [0.5, 0.52, 0.49], "default": [0.5, 0.49, 0.5]}
    best = confirmed(best_of(found, trials, tmp_path), runs)
    low, high = ttest_rel(runs["rival"], runs["default"]).confidence_interval()
    assert (best["seeds"]["low"], best["seeds"]["high"]) == (pytest.approx(low), pytest.approx(high)) and low < 0
    assert best["warnings"] == ["the best trial is not clearly better than the recipe's own setting"]
    page = render(found, trials, best, tmp_path)
    assert "Over 3 further seeds: +0.007" in page and "on further seeds" in page


def test_the_settings_to_paste_undo_options_of_another_measure(tmp_path: Path) -> None:
    found = recipe({"measure": "ratio", "measure_options": {"floor": 0.1}})
    best = best_of(found, make_study(tmp_path, found, [0.05]), tmp_path)
    assert "--set 'optimize.measure_options={}'" in best["command"]


@pytest.mark.parametrize("evaluations", [1, 3])
def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path, evaluations: int) -> None:
    found = recipe(evaluations=evaluations)
    trials = make_study(tmp_path, found, [0.05, -0.02, 0.01])
    best = best_of(found, trials, tmp_path)
    page = write_report(found, trials, best, tmp_path, tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page == render(found, trials, best, tmp_path)
    plots = 6 + (evaluations > 1)  # landscape, parallel, differences, three trajectories; each wide and for a phone
    assert len(re.findall("<svg", page)) == 2 * plots
    assert "<script" not in page and not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert "&lt;b&gt;" in page and "<b> & task" not in page and "TdroError: &lt;not finite&gt;" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert best["command"] in page and "1 min 18 s" in page


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"choices": {"clp": [1]}}, "'clp' cannot be chosen. Did you mean 'clip'"),
        ({"choices": {"batch_size": [8]}}, "'batch_size' cannot be chosen"),
        ({"choices": {"clip": []}}, "at least one value"),
        ({"choices": {"clip": [-1.0]}}, "greater than 0"),
        ({"eta": [0.1, 0.01]}, "the smaller first"),
        ({"confirm": 1}, "at least 2 seeds"),
        ({"scheduler": "asha"}, "tune.evaluations of at least 2"),
    ],
)
def test_a_search_that_cannot_be_is_refused_when_the_recipe_is_read(tune: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(**tune)
