"""The loop in the calling process: no worker group, so a small run does not wait for processes that import torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tdro_ray.data.collate import BatchRecipe
from tdro_ray.data.stream import local_batches
from tdro_ray.train import checkpoint
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, train


def run(job: TrainJob, batches: BatchRecipe, use_gpu: bool, storage: str, name: str) -> dict[str, Any]:
    """Train here and return the loop's summary; the finished model is put into `job.out / "model"`.

    Goes on from the newest checkpoint in the folder `name` of `storage`.
    """
    device, keep = "cuda" if use_gpu else "cpu", job.scale.keep_checkpoints
    context = LocalContext(partial(local_batches, batches), Path(storage) / name, device, keep=keep)
    summary = train(job, context)
    newest = context.latest_checkpoint()
    assert newest is not None, "a run ends with a checkpoint"
    checkpoint.publish(newest, job.out)
    return summary
