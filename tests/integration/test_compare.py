"""Several mixtures over several seeds in one command: what is trained on what, and that the sums are of what was measured."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny import make_collections, tdro, write_recipe

from tdro_ray import stages
from tdro_ray.data.collate import Collator
from tdro_ray.data.plan import fold_numbers
from tdro_ray.data.score import similarities
from tdro_ray.dro.files import read_trajectory, read_weights
from tdro_ray.model.encoder import Encoder
from tdro_ray.pipeline import Run
from tdro_ray.recipe import load_recipe

RIVALS = "proportional,n^0.5,group_dro,apart,crossed,scaled,official.top70"
OWN = {
    "apart": {
        "optimize": {"rows": "heldout", "folds": 4, "start": 0.5, "top_rows": [70], "top_tokens": [40]},
        "weights": "tail",
    },
    "crossed": {"optimize": {"rows": "crossfit", "folds": 2, "measure": "excess", "tolerance": 0.9, "window": 2}},
    "scaled": {"optimize": {"measure": "official"}, "use": "loss"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(runs folder, recipe file, completed process) of a comparison over two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    recipe = write_recipe(folder, make_collections(folder / "source"))
    changes = yaml.safe_load(recipe.read_text()) | {"rivals": OWN, "scale": {"num_workers": 0}}
    recipe.write_text(yaml.safe_dump(changes))
    done = tdro("compare", recipe, "--rivals", RIVALS, "--seeds", 2, runs=folder / "runs")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return folder / "runs", recipe, done


@pytest.fixture(scope="module")
def run(made):
    """The first seed's run, opened."""
    runs, recipe, _ = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDRO_RUNS", str(runs))
        yield Run(load_recipe(str(recipe), (f"compare=[{RIVALS}]",)), None)


def test_every_mixture_is_measured_under_every_seed(made):
    runs, _, done = made
    models = {"uniform", "current", "top70", *RIVALS.split(",")}
    found = json.loads((runs / "small" / "seeds.json").read_text())
    assert set(found["models"]) == models and found["seeds"] == [42, 43]
    for model in models:
        values = [
            json.loads((folder / "eval" / f"{model}.json").read_text())["mean"]["ndcg@10"]
            for folder in (runs / "small", runs / "small" / "seeds" / "43")
        ]
        assert found["models"][model]["mean"]["values"] == values
        assert values[0] != values[1]  # another seed is another model
        assert f"{np.mean(values):.4f}" in done.stdout
    alphas = [read_weights(f / "weights" / "current.json").weights for f in (runs / "small", runs / "small/seeds/43")]
    mean = read_weights(runs / "small" / "weights" / "seed-mean.json").weights
    assert mean == pytest.approx({t: (alphas[0][t] + alphas[1][t]) / 2 for t in mean})


def test_seeds_share_data_and_negatives_and_nothing_else(made):
    runs, _, _ = made
    first, second = runs / "small" / "stages", runs / "small" / "seeds" / "43" / "stages"
    for stage in ("ingest", "clean", "mine"):
        assert (first / stage / "manifest.json").read_text() == (second / stage / "manifest.json").read_text()
    for stage in ("model", "reference", "optimize", "finetune-n^0.5"):
        keys = [json.loads((s / stage / "manifest.json").read_text())["key"] for s in (first, second)]
        assert keys[0] != keys[1]


def test_a_second_run_repeats_nothing(made):
    runs, recipe, _ = made
    again = tdro("compare", recipe, "--rivals", RIVALS, "--seeds", 2, runs=runs)
    assert again.returncode == 0 and "✓" not in again.stdout and again.stdout.count("up to date") > 20


def test_held_out_rows_are_in_no_training_batch(run):
    settings = stages.rivals.stage1_settings(run.recipe, "apart")
    collator = Collator(stages.stage1_batches(run, settings))
    sizes, seed = collator.recipe.plan.sizes, run.recipe.seed
    for step in range(settings.steps):
        batch = collator.batch(step, 0, 1)
        for rows, fold_is_0 in ((batch, False), (batch.probe, True)):
            folds = [fold_numbers(sizes[t], seed, int(t), 4)[r] for t, r in zip(rows.task_B, rows.row_B)]
            assert {f == 0 for f in folds} == {fold_is_0}
        assert batch.reference_BP is None and batch.probe.reference_BP is not None


def test_cross_fitted_scores_are_of_the_reference_that_has_not_seen_the_row(run):
    settings = stages.rivals.stage1_settings(run.recipe, "crossed")
    collator = Collator(stages.stage1_batches(run, settings))
    encoders = [Encoder.load(run.path(f"reference-2.{number}") / "model") for number in range(2)]
    sizes = collator.recipe.plan.sizes
    batch = collator.batch(0, 0, 1)
    sequences = np.split(batch.ids, np.cumsum(batch.length_S)[:-1])
    both = [similarities(batch, e.embed_ids(sequences)) for e in encoders]
    folds = [int(fold_numbers(sizes[t], run.recipe.seed, int(t), 2)[r]) for t, r in zip(batch.task_B, batch.row_B)]
    assert set(folds) == {0, 1} and abs(both[0] - both[1]).max() > 1e-3
    for i, fold in enumerate(folds):
        np.testing.assert_allclose(batch.reference_BP[i], both[fold][i], atol=1e-5)


def test_a_proxy_starts_from_its_references_early_state_and_stage_1_may_end_early(run):
    base, start = (
        load_file(folder / "model.safetensors")
        for folder in (
            stages.base_folder(run),
            stages.proxy_base(run, stages.rivals.stage1_settings(run.recipe, "apart")),
        )
    )
    assert any((base[name] != start[name]).any() for name in base)
    assert run.manifest("reference-4.0")["summary"]["steps"] == 8 and (run.path("reference-4.0") / "start-4").is_dir()
    assert read_trajectory(run.folder / "weights" / "crossed.trajectory.parquet").steps == [0, 1, 2, 3]


def test_rivals_use_their_weights_as_they_say(run):
    steps = run.manifest("finetune-scaled")["summary"]["steps_per_task"]
    assert max(steps.values()) - min(steps.values()) <= 1  # sampled evenly: the weights scale the loss
    assert read_weights(run.folder / "weights" / "n^0.5.json").weights["easy"] == pytest.approx(1 / 3)
    metrics = (run.path("finetune-group_dro") / "metrics.jsonl").read_text().splitlines()
    assert len(set(json.loads(metrics[-1])["alpha"])) == 3
    kept = run.manifest("finetune-official.top70")["summary"]["steps_per_task"]
    assert sorted(kept.values()) == [0, 4, 4]


def test_selections_keep_at_most_the_share_of_rows_or_tokens_that_is_asked(run):
    alpha = read_weights(run.folder / "weights" / "apart.current.json").weights
    ranked = sorted(alpha, key=lambda task: -alpha[task])
    kept = read_weights(run.folder / "weights" / "apart.rows70.json")
    assert set(kept.weights) == set(ranked[:2]) and kept.meta["kept_rows"] == pytest.approx(2 / 3)
    assert set(read_weights(run.folder / "weights" / "apart.tokens40.json").weights) == set(ranked[:1])


def test_the_report_has_the_seeds_and_a_misspelt_rival_ends_at_once(made):
    runs, recipe, _ = made
    page = (runs / "small" / "report.html").read_text()
    assert "Learned weights over the seeds" in page and 'id="forest-' in page and 'id="map-' in page
    assert tdro("report", recipe, runs=runs).returncode == 0  # the recipe itself asks for one seed: the results stay
    assert "Learned weights over the seeds" in (runs / "small" / "report.html").read_text()
    wrong = tdro("compare", recipe, "--rivals", "propotional", runs=runs)
    assert wrong.returncode == 2 and "Did you mean 'proportional'" in wrong.stderr and wrong.stderr.count("\n") == 1


@pytest.mark.long  # half a minute of worker groups
def test_a_worker_group_of_one_trains_the_same_model_as_the_command_itself(made):
    runs, recipe, _ = made
    other = runs.parent / "workers"
    source = runs / "small" / "store"
    done = tdro(
        "run",
        recipe,
        "--until",
        "reference",
        "--set",
        "scale.num_workers=1",
        "--set",
        f"data.store={source}",
        runs=other,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (load_file(r / "small/stages/reference/model/model.safetensors") for r in (runs, other))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
