"""Mixtures by name, and what several seeds say together."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tdro_ray.config import Recipe, ScaleSettings
from tdro_ray.errors import ConfigError
from tdro_ray.evaluate.seeds import agreement, interval
from tdro_ray.stages import weights
from tdro_ray.stages.rivals import (
    COMPARED,
    RIVALS,
    finetune_settings,
    mixture_of,
    mixtures,
    stage1_rivals,
    stage1_settings,
)
from tdro_ray.stages.seeds import at_once, seed_recipe

OWN = {"optimize": {"measure": "excess", "measure_options": {"normalise": True}, "floor": 0.01, "eta": 0.3}}


def recipe(**changes):
    return Recipe.model_validate({"name": "r", **changes})


def test_a_published_rival_has_none_of_the_recipes_options_and_all_of_its_training():
    ours = recipe(**OWN)
    ratio = stage1_settings(ours, "ratio")
    assert (ratio.measure, ratio.measure_options, ratio.floor, ratio.rows) == ("ratio", {}, 0.0, "seen")
    assert (ratio.eta, ratio.steps, ratio.temperature) == (0.3, ours.optimize.steps, ours.optimize.temperature)
    official = stage1_settings(ours, "official")
    assert (official.measure, official.absent) == ("official", "zero")
    assert stage1_settings(ours, "excess").floor == 1e-3
    assert stage1_settings(ours) == ours.optimize


def test_rivals_of_ones_own_change_the_recipes_settings_only_where_they_say():
    ours = recipe(**OWN, rivals={"late": {"optimize": {"hold": 0.5}}, "other": {"optimize": {"measure": "ratio"}}})
    assert stage1_settings(ours, "late") == ours.optimize.model_copy(update={"hold": 0.5})
    assert stage1_settings(ours, "other").measure_options == {}  # they were the other measure's


def test_a_stage_1_runs_once_whatever_number_of_its_files_is_used():
    ours = recipe(weights=["current"], compare=["official", "official.top70", "official.mean", "n^0.3", "uniform"])
    assert stage1_rivals(ours) == ["", "official"]
    assert [m.name for m in mixtures(ours)] == ["current", "official", "official.top70", "official.mean", "n^0.3"]
    assert mixture_of(ours, "n^0.3").settings.power == 0.3
    assert mixture_of(ours, "official.mean").weight_file(Path("f")).name == "official.mean.json"
    assert finetune_settings(ours, mixture_of(ours, "group_dro")).group_dro == RIVALS["group_dro"].finetune["group_dro"]
    assert all(mixture_of(ours, name) for name in COMPARED)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("offical", "Did you mean 'official'"),
        ("official.top7", "no weight file 'top7'"),
        ("proportional.top70", "proportional has no stage 1"),
        ("n^x", r"No mixture 'n\^x'"),
    ],
)
def test_a_name_that_is_no_mixture_is_refused_with_what_there_is(name, says):
    with pytest.raises(ConfigError, match=says):
        mixture_of(recipe(), name)


def test_a_rivals_settings_are_checked_when_the_recipe_is_read():
    for wrong, says in (
        ({"optimize": {"eta": -1}}, "eta"),
        ({"optimize": {"eta": 1}, "power": 0.5}, "not from both"),
        ({"finetune": {"stepz": 3}}, "stepz"),
        (
            {"optimize": {"measure_options": {"smoth": 1}}},
            r"rivals\.mine\.optimize.*'ratio' has no option 'smoth'.*'smooth'",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            recipe(rivals={"mine": wrong})
    with pytest.raises(ValueError, match="pattern"):
        recipe(rivals={"a/b": {}})
    with pytest.raises(ValueError, match=r"optimize\.measure_options: measure 'excess' has no option 'over'"):
        recipe(optimize={"measure": "excess", "measure_options": {"over": "rows"}})
    with pytest.raises(ConfigError, match="no weight file 'curent'"):
        mixture_of(recipe(rivals={"mine": {"weights": "curent"}}), "mine")


def test_further_seeds_keep_data_and_negatives():
    ours = recipe(seed=7, seeds=3)
    other = seed_recipe(ours, 9)
    assert (other.seed, other.seeds, other.name, other.mine.seed) == (9, 1, "9", 7)
    assert other.data.store is not None and other.data.store.name == "store"
    assert other.optimize == ours.optimize


def test_as_many_seeds_run_at_once_as_fit():
    assert at_once(ScaleSettings(num_workers=2), {"CPU": 2.0}) == 1
    assert at_once(ScaleSettings(num_workers=0), {"CPU": 2.0}) == 2
    assert at_once(ScaleSettings(num_workers=(1, 4), cpus_per_worker=1), {"CPU": 9.0}) == 2
    assert at_once(ScaleSettings(num_workers=4, use_gpu=True, cpus_per_worker=1), {"CPU": 64.0, "GPU": 8.0}) == 2
    assert at_once(ScaleSettings(num_workers=8, use_gpu=True), {"CPU": 2.0, "GPU": 8.0}) == 1


def test_intervals_are_students_and_agreement_is_kendalls():
    found = interval([1.0, 2.0, 3.0])
    assert found["average"] == 2.0 and found["high"] == pytest.approx(2 + 4.302653 / 3**0.5, rel=1e-6)
    assert interval([1.0])["low"] is None
    same, turned = {"a": 0.1, "b": 0.3, "c": 0.6}, {"a": 0.6, "b": 0.3, "c": 0.1}
    assert agreement([same, same]) == 1.0 and agreement([same, turned]) == -1.0
    assert agreement([same, same, turned]) == pytest.approx(-1 / 3)
    assert agreement([same]) is None


def test_weight_beyond_the_repeats_allowed_goes_to_the_other_tasks(monkeypatch):
    """Fine-tuning draws 4 x 5 = 20 rows: two passes over the 4 rows of `a` are a share of 0.4."""
    sizes = {"a": 4, "b": 30, "c": 30}
    tasks = [SimpleNamespace(name=name, manifest=SimpleNamespace(rows=rows)) for name, rows in sizes.items()]
    monkeypatch.setattr(weights, "collections", lambda run: tasks)
    short = {"steps": 4, "batch_size": 5}
    run = SimpleNamespace(recipe=recipe(finetune=short, max_repeats=2))
    assert weights._capped(run, {"a": 0.8, "b": 0.2}, (0.8, 0.2, 0.0)) == pytest.approx((0.4, 0.6, 0.0))
    free = SimpleNamespace(recipe=recipe(finetune=short))
    assert weights._capped(free, {"a": 0.8, "b": 0.2}, (0.8, 0.2, 0.0)) == (0.8, 0.2, 0.0)
