"""Every stage of a run: what it depends on, what it writes, and the call that does it.

Functions take the run and return the stage's manifest; heavy rooms are imported inside the work, so that a run that
is up to date ends at once.
"""

from tdro_ray.stages.data import collections, ingest, mine, task_names
from tdro_ray.stages.results import best_model, evaluate, index, index_folder, tests_of
from tdro_ray.stages.training import (
    BASELINE,
    base_folder,
    batch_recipe,
    contrastive,
    model,
    model_key,
    reference,
    train_job,
)
from tdro_ray.stages.weights import finetune, model_folders, model_name, optimize, score, scores_folder, weights_of

__all__ = [
    "BASELINE",
    "base_folder",
    "batch_recipe",
    "best_model",
    "collections",
    "contrastive",
    "evaluate",
    "finetune",
    "index",
    "index_folder",
    "ingest",
    "mine",
    "model",
    "model_folders",
    "model_key",
    "model_name",
    "optimize",
    "reference",
    "score",
    "scores_folder",
    "task_names",
    "tests_of",
    "train_job",
    "weights_of",
]
