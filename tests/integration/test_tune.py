"""A study on a real Ray: trials share what is made once, nothing is repeated, a failed trial is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import make_collections, write_recipe

from tdro_ray.config import Recipe
from tdro_ray.display import Lines
from tdro_ray.pipeline import Run
from tdro_ray.tune import trial as trial_module
from tdro_ray.tune.search import confirm, tune
from tdro_ray.tune.study import default_setting, make_study, prepare
from tdro_ray.tune.trial import confirm_trial, load_checkpoint, run_trial, trial_folder

TUNE = {"optimize_steps": 4, "finetune_steps": 6, "trials": 2}


pytestmark = pytest.mark.usefixtures("small_ray")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Raw recipe of a run on tiny collections; its data and reference model are made by the first test."""
    folder = tmp_path_factory.mktemp("tune")
    path = write_recipe(folder, make_collections(folder / "source", rows=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDRO_RUNS", str(folder / "runs"))
        raw = yaml.safe_load(path.read_text())
        yield {**raw, "name": "small", "scale": {"num_workers": 1}}


def make_run(made: dict[str, Any], **settings: Any) -> Run:
    return Run(Recipe.model_validate({**made, "tune": {**TUNE, **settings}}), Lines())


def trials_of(run: Run) -> list[dict[str, Any]]:
    return json.loads((run.folder / "tune" / "trials.json").read_text())


def written(run: Run) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in run.path("tune").glob("trials/*/result.json")}


@pytest.mark.timeout(600)  # makes the data and the reference model too
def test_a_study_finds_a_setting_and_a_larger_one_repeats_nothing(
    made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(made)
    tune(run)
    printed = capsys.readouterr().out
    assert (
        "2 trials, 2 at once (2 CPUs at 1 a trial)" in printed and "Next:\n  tdro run small.yaml --set opt" in printed
    )
    first, scores = trials_of(run), run.manifest("score")
    assert [t["status"] for t in first] == ["done", "done"]
    assert first[0]["setting"] == default_setting(run.recipe) == {"eta": 0.3, "temperature": 0.1, "measure": "ratio"}
    for t in first:
        assert sum(t["alpha"].values()) == pytest.approx(1) and set(t["evaluations"][0]["tasks"]) == set(t["alpha"])
        assert t["objective"] == pytest.approx(np.mean(list(t["evaluations"][0]["tasks"].values())))
    assert first[0]["alpha"] != first[1]["alpha"]
    best = json.loads((run.folder / "tune" / "best.json").read_text())
    assert best["objective"] == max(t["objective"] for t in first)
    assert (run.folder / "tune" / "report.html").read_text().count("<svg") >= 8
    assert list(run.path("tune").glob("ray/*/*/events.out.tfevents*"))  # TensorBoard
    assert not list(run.path("tune").glob("trials/*/*/checkpoints"))

    before = written(run)
    tune(run)
    assert "· tune" in capsys.readouterr().out  # up to date
    run = make_run(made, trials=3)
    tune(run)
    assert run.manifest("score") == scores  # shared, for a trial of fewer steps too
    assert before.items() <= written(run).items() and len(written(run)) == 3
    assert [t["setting"] for t in trials_of(run)][:2] == [t["setting"] for t in first]


def test_a_study_cut_short_goes_on_from_tunes_own_state(made: dict[str, Any]) -> None:
    run = make_run(made, trials=3)
    tune(run)
    before, [state] = written(run), run.path("tune").glob("ray/*")
    trials = sorted(p.name for p in state.glob("tdro_trial*"))
    (run.path("tune") / "manifest.json").unlink()  # as a kill before the end leaves it
    lost = trials_of(run)[2]["id"]
    shutil.rmtree(run.path("tune") / "trials" / lost)
    for file in state.glob("experiment_state-*"):  # the last trial was still running
        file.write_text(file.read_text().replace('\\"status\\": \\"TERMINATED\\"', '\\"status\\": \\"RUNNING\\"'))
    tune(run)
    after = written(run)
    assert {k: v for k, v in before.items() if k != lost}.items() <= after.items() and lost in after
    assert sorted(p.name for p in state.glob("tdro_trial*")) == trials  # restored: no trial was made anew


def test_a_failed_trial_is_kept_with_its_error(made: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(made, trials=4, choices={"measure_options": [{"nonsense": 1.0}]}, search="optuna")
    tune(run)
    found = trials_of(run)
    failed = [t for t in found if t["status"] == "failed"]
    assert failed and found[0]["status"] == "done" and len(found) == 4
    assert all("has no option 'nonsense'" in t["error"] and t["setting"]["measure_options"] for t in failed)
    assert "has no option &#x27;nonsense&#x27;" in (run.folder / "tune" / "report.html").read_text()
    printed = capsys.readouterr()
    assert f"{len(failed)} failed" in printed.out and "Traceback" not in printed.out + printed.err


def test_weak_trials_are_stopped_between_evaluations(made: dict[str, Any]) -> None:
    run = make_run(made, trials=5, evaluations=3, scheduler="asha", concurrent=1)
    tune(run)
    found = trials_of(run)
    assert {t["status"] for t in found} <= {"done", "stopped"} and found[0]["status"] == "done"
    assert all([e["step"] for e in t["evaluations"]] == [2, 4, 6] for t in found if t["status"] == "done")
    assert all(len(t["evaluations"]) < 3 for t in found if t["status"] == "stopped")


def test_both_settings_are_fine_tuned_again_on_further_seeds(made: dict[str, Any]) -> None:
    run = make_run(made, confirm=2)
    study = make_study(run, prepare(run))
    settings = [default_setting(run.recipe), {**default_setting(run.recipe), "eta": 0.01}]
    first = [run_trial(study, setting)["evaluations"][-1]["mean"] for setting in settings]
    best = {"rival_setting": settings[1], "default": {"setting": settings[0]}}
    with Lines().stage("tune") as progress:
        found = confirm(study, run.recipe, best, progress)
        files = {p: p.stat().st_mtime_ns for p in study.folder.glob("*/confirm-*.json")}
        assert confirm(study, run.recipe, best, progress) == found
    assert found["seeds"] == [43, 44] and len(files) == 4
    assert {p: p.stat().st_mtime_ns for p in study.folder.glob("*/confirm-*")} == files  # no folder, nothing again
    assert confirm_trial(study, settings[0], study.seed) == first[0]  # the search's own seed gives the search's result


def test_an_interrupted_trial_goes_on_and_ends_the_same(made: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    run = make_run(made, evaluations=3)
    key = prepare(run)
    whole, cut = (replace(make_study(run, key), folder=tmp_path / name) for name in ("whole", "cut"))
    setting, reports = default_setting(run.recipe), []
    expected = run_trial(whole, setting, reports.append)
    assert [r["step"] for r in reports] == [2, 4, 6]

    def dies(metrics: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(cut, setting, dies)
    folder, again = trial_folder(cut, setting), []
    learned = (folder / "optimize" / "done.json").stat().st_mtime_ns
    found = run_trial(cut, setting, again.append)
    assert (folder / "optimize" / "done.json").stat().st_mtime_ns == learned
    assert [r["step"] for r in again] == [2, 4, 6]
    for key in ("alpha", "evaluations", "per_query", "loss"):
        assert found[key] == expected[key]


def test_parameters_in_a_checkpoint_give_the_vectors_of_its_model(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    run = make_run(made)
    study = replace(make_study(run, prepare(run)), folder=tmp_path)
    vectors: list[np.ndarray] = []

    def both(job: Any, checkpoint: Path, device: str) -> Any:
        finished = load_checkpoint(job, checkpoint, device)
        bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("model"))
        for encoder in (finished, load_checkpoint(job, bare, device)):
            vectors.append(encoder.encode(["bada fefi", "koko"], "query"))
        return finished

    monkeypatch.setattr(trial_module, "load_checkpoint", both)
    run_trial(study, default_setting(run.recipe))
    assert np.array_equal(vectors[0], vectors[1])
