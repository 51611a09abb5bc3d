"""Ray Train around the loop: a worker group, the plan's data, checkpoints in the run's storage, restart on failure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from tdro_ray.config import ScaleSettings, most_workers
from tdro_ray.data.collate import Batch, BatchRecipe
from tdro_ray.data.stream import PlanDataConfig, batches_of, checkpointed_step
from tdro_ray.errors import ConfigError, TdroError
from tdro_ray.train import checkpoint
from tdro_ray.train.loop import TrainJob, train
from tdro_ray.train.memory import check_memory, read_shape


class RayContext:
    """The loop's surroundings inside a Ray Train worker."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")

    def batches(self, start: int) -> Iterator[Batch]:
        return batches_of(ray.train.get_dataset_shard("train"))

    def latest_checkpoint(self) -> Path | None:
        found = ray.train.get_checkpoint()
        return None if found is None else Path(found.to_directory())

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(checkpoint) if checkpoint else None)
        if checkpoint:
            shutil.rmtree(checkpoint, ignore_errors=True)


def run(job: TrainJob, batches: BatchRecipe, scale: ScaleSettings, storage: str, name: str) -> dict[str, Any]:
    """Train on a Ray worker group and return the loop's summary; the finished model is put into `job.out / "model"`.

    `storage` is a folder or URL that all nodes see; the run called `name` goes on from its newest checkpoint there.
    Raises the worker's own TdroError where it is one, and ResourceError before any start where memory will not do.
    """
    shape, available = read_shape(job.base, job.model.lora), _memory_per_worker(scale)
    if shape is not None and available is not None:
        section = job.out.name.split("-")[0]  # the stage's folder is named after the recipe's section
        check_memory(shape, job.model, job.settings, scale, available, section)
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard shows Train runs only with it
    os.environ.setdefault(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
    )  # a checkpoint waits for this beat: 2 s by default
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": 1} if scale.use_gpu else {})},
            placement_strategy=scale.placement,
        ),
        torch_config=TorchConfig(backend="nccl" if scale.use_gpu else "gloo"),
        datasets={"train": _no_dataset},
        dataset_config=PlanDataConfig(batches, run_url(storage, name), scale.cpus_per_data_task, name),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=CheckpointConfig(num_to_keep=scale.keep_checkpoints),
            failure_config=FailureConfig(max_failures=scale.max_failures),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as err:
        raise _own_error(err) from err
    with result.checkpoint.as_directory() as folder:
        checkpoint.publish(Path(folder), job.out)
    return dict(result.return_value)


def run_url(storage: str, name: str) -> str:
    """Return where the run called `name` is under `storage`: a URL's options (`?endpoint_override=…`) stay at its end."""
    folder, mark, options = storage.partition("?") if "://" in storage else (storage, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def exists(storage: str, name: str) -> bool:
    """Return whether a checkpoint of the run called `name` is under the URL `storage`. Raises ConfigError where it cannot be read."""
    try:
        return checkpointed_step(run_url(storage, name)) > 0
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"scale.storage {storage} cannot be read: {err} Give a URL of a bucket or folder that exists and that these "
            "credentials may write, such as s3://bucket/runs (AWS_ENDPOINT_URL names another S3 service)."
        ) from err


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    return train(config["job"], RayContext())


def _memory_per_worker(scale: ScaleSettings) -> float | None:
    """Bytes that a worker can have: of a GPU where this machine has one, else its part of the nodes' memory.

    None where this process cannot see the GPUs: another machine's may be larger.
    """
    if scale.use_gpu:
        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    total = ray.cluster_resources()  # the object store is shared memory: mostly empty pages
    return (total.get("memory", 0.0) + total.get("object_store_memory", 0.0)) / max(1, most_workers(scale)) or None


def _no_dataset() -> None:
    """Stand-in: the plan's dataset is made in PlanDataConfig.configure, where the number of workers is known."""


def _own_error(err: Exception) -> Exception:
    """Return the worker's TdroError out of Train's wrapper, or the wrapper where a worker failed otherwise."""
    for failure in getattr(err, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, TdroError):
                return cause
            inner = getattr(cause, "cause", None)
            cause = inner if isinstance(inner, BaseException) else cause.__cause__
    return err
