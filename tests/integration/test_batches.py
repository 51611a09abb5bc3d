"""The batch path on a real Ray: order, resume, number of workers; and scores = the reference run in the step."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import ray
from tiny import make_collections, write_recipe

from tdro_ray import stages
from tdro_ray.data.collate import Collator
from tdro_ray.data.score import score, similarities
from tdro_ray.data.stream import plan_dataset
from tdro_ray.errors import DataError
from tdro_ray.model.encoder import Encoder
from tdro_ray.pipeline import Run
from tdro_ray.recipe import load_recipe


class Silent:
    """A display that shows nothing."""

    def stage(self, name):
        from contextlib import nullcontext

        class Nothing:
            def update(self, text, share=None):
                pass

        return nullcontext(Nothing())

    def done(self, *_):
        pass

    skipped = done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDRO_RUNS", str(folder / "runs"))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
        made = Run(load_recipe(str(write_recipe(folder, make_collections(folder / "source")))), Silent())
        made.open()
        stages.ingest(made)
        stages.mine(made)
        stages.model(made)
        yield made
        ray.shutdown()


@ray.remote(num_cpus=0.1)
def consume(split):
    return [
        (t["step"][0].as_py(), t["rank"][0].as_py(), t["batch"][0].as_py())
        for t in split.iter_batches(batch_size=1, batch_format="pyarrow")
    ]


def same(a, b):
    assert (a.step, a.rank) == (b.step, b.rank)
    for name in ("task_B", "row_B", "passage_key_BP", "positive_key_BK", "ids", "length_S"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(("num_workers", "start"), [(2, 0), (3, 0), (2, 5)])
def test_every_worker_gets_its_share_of_every_step_in_order(run, num_workers, start):
    recipe = stages.batch_recipe(run, run.recipe.reference, None, "homogeneous")
    splits = plan_dataset(recipe, start, num_workers, 0.25).streaming_split(num_workers, equal=True)
    collator = Collator(recipe)
    for rank, received in enumerate(ray.get([consume.remote(split) for split in splits])):
        assert [(s, r) for s, r, _ in received] == [(s, rank) for s in range(start, recipe.plan.num_steps)]
        for step, _, payload in received:
            same(pickle.loads(payload), collator.batch(step, rank, num_workers))


def test_shares_of_two_and_three_workers_are_the_same_global_batch(run):
    collator = Collator(stages.batch_recipe(run, run.recipe.optimize, None, "stratified"))
    for step in range(3):
        whole = collator.batch(step, 0, 1)
        for num_workers in (2, 3):
            parts = [collator.batch(step, rank, num_workers) for rank in range(num_workers)]
            for name in ("task_B", "row_B", "passage_key_BP"):
                np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts]))


def test_scores_are_the_reference_run_in_the_step_and_a_longer_plan_extends_them(run, tmp_path):
    settings = run.recipe.optimize
    short = settings.model_copy(update={"steps": 3})
    reference, out = stages.base_folder(run), tmp_path / "scores.lance"
    made = [
        score(stages.batch_recipe(run, s, None, "stratified"), [reference], out, 1, 0.5, False, 4096)
        for s in (short, settings, settings)
    ]
    assert made == [3, settings.steps - 3, 0]
    collator = Collator(replace(stages.batch_recipe(run, settings, None, "stratified"), scores=out))
    encoder = Encoder.load(reference)
    for step in range(settings.steps):
        batch = collator.batch(step, 0, 1)
        vectors = encoder.embed_ids(np.split(batch.ids, np.cumsum(batch.length_S)[:-1]))
        np.testing.assert_allclose(batch.reference_BP, similarities(batch, vectors), atol=1e-5)
        half = collator.batch(step, 1, 2)
        np.testing.assert_array_equal(half.reference_BP, batch.reference_BP[len(batch.task_B) // 2 :])


def test_scores_of_another_draw_are_refused(run, tmp_path):
    settings = run.recipe.optimize
    score(
        stages.batch_recipe(run, settings, None, "stratified"),
        [stages.base_folder(run)],
        tmp_path / "s.lance",
        1,
        0.5,
        False,
        4096,
    )
    other = stages.batch_recipe(run, settings.model_copy(update={"num_negatives": 1}), None, "stratified")
    other = replace(other, scores=tmp_path / "s.lance")
    with pytest.raises(DataError, match="Run `tdro score` again"):
        Collator(other).batch(0, 0, 1)
