"""Every stage of a run: what it depends on, what it writes, and the call that does it.

Functions take the run and return the stage's manifest; heavy rooms are imported inside the work, so that a run that
is up to date ends at once.
"""

from tdro_ray.stages import rivals
from tdro_ray.stages.data import clean, collections, ingest, mine, negatives_key, task_names
from tdro_ray.stages.results import best_model, evaluate, index, index_folder, tests_of
from tdro_ray.stages.rivals import mixtures
from tdro_ray.stages.seeds import seeds
from tdro_ray.stages.training import (
    BASELINE,
    base_folder,
    batch_recipe,
    model,
    model_key,
    proxy_base,
    reference,
    train_job,
    train_references,
)
from tdro_ray.stages.weights import (
    finetune,
    finetune_all,
    model_folders,
    optimize,
    optimize_for,
    score,
    score_for,
    score_stage,
    scores_folder,
    stage1_batches,
)

__all__ = [
    "BASELINE",
    "base_folder",
    "batch_recipe",
    "best_model",
    "clean",
    "collections",
    "evaluate",
    "finetune",
    "finetune_all",
    "index",
    "index_folder",
    "ingest",
    "mine",
    "mixtures",
    "model",
    "model_folders",
    "model_key",
    "negatives_key",
    "optimize",
    "optimize_for",
    "proxy_base",
    "reference",
    "rivals",
    "score",
    "score_for",
    "score_stage",
    "scores_folder",
    "seeds",
    "stage1_batches",
    "task_names",
    "tests_of",
    "train_job",
    "train_references",
]
