"""The loop in the calling process: no worker group, so a small run does not wait for processes that import torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tdro_ray.data.collate import BatchRecipe
from tdro_ray.data.stream import local_batches
from tdro_ray.train import checkpoint
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, train
from tdro_ray.train.memory import check_memory, read_shape


def run(job: TrainJob, batches: BatchRecipe, use_gpu: bool, storage: str, name: str) -> dict[str, Any]:
    """Train here and return the loop's summary; the finished model is put into `job.out / "model"`.

    Goes on from the newest checkpoint in the folder `name` of `storage`. Raises ResourceError where memory will not do.
    """
    shape = read_shape(job.base, job.model.lora)
    if shape is not None and not use_gpu:
        alone, section = job.scale.model_copy(update={"num_workers": 1}), job.out.name.split("-")[0]
        check_memory(shape, job.model, job.settings, alone, psutil.virtual_memory().available, section)
    device, keep = "cuda" if use_gpu else "cpu", job.scale.keep_checkpoints
    context = LocalContext(partial(local_batches, batches), Path(storage) / name, device, keep=keep)
    summary = train(job, context)
    newest = context.latest_checkpoint()
    assert newest is not None, "a run ends with a checkpoint"
    checkpoint.publish(newest, job.out)
    return summary
