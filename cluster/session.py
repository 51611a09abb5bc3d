"""Connect to a Ray cluster or start one on this machine, and check that a stage's workers fit before it asks for them."""

from __future__ import annotations

import logging
import os
from typing import Any

import psutil
import ray

from tdro_ray.config import ScaleSettings
from tdro_ray.errors import ResourceError

LOCAL_OBJECT_STORE = 1 << 30  # bytes; batches are small, and a laptop has other uses for its memory


def connect(scale: ScaleSettings) -> None:
    """Join the cluster that `RAY_ADDRESS` names (a Ray job sets it), or start Ray on this machine. Idempotent.

    Raises ResourceError when the workers do not fit, saying what is there and what to set.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard shows Train runs only with it
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if not os.environ.get("RAY_ADDRESS"):
            memory = min(LOCAL_OBJECT_STORE, int(psutil.virtual_memory().available * 0.3))
            options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "object_store_memory": memory}
            check_fit(scale, float(os.cpu_count() or 1), 0.0 if not scale.use_gpu else _local_gpus(), "this machine")
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as err:
            raise ResourceError(
                f"Ray did not answer at RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r}: {err} "
                "Start a cluster (`ray start --head`), or unset RAY_ADDRESS to run on this machine alone."
            ) from err
    total = ray.cluster_resources()
    check_fit(scale, total.get("CPU", 0.0), total.get("GPU", 0.0), "the cluster")


def check_fit(scale: ScaleSettings, cpus: float, gpus: float, where: str) -> None:
    """Raise ResourceError unless the workers and at least one data task fit `cpus` and `gpus` at once.

    Workers that take every CPU would wait for ever for batches that no data task can make.
    """
    need = scale.num_workers * scale.cpus_per_worker + scale.cpus_per_data_task
    if need > cpus:
        most = int((cpus - scale.cpus_per_data_task) / scale.cpus_per_worker)
        raise ResourceError(
            f"{scale.num_workers} workers of {scale.cpus_per_worker:g} CPU and one data task of {scale.cpus_per_data_task:g} "
            f"need {need:g} CPUs; {where} has {cpus:g}. Set scale.num_workers to at most {max(most, 0)}"
            f"{', or lower scale.cpus_per_worker' if scale.cpus_per_worker > 0.25 else ''}."
        )
    if scale.use_gpu and scale.num_workers > gpus:
        raise ResourceError(
            f"{scale.num_workers} GPU workers need {scale.num_workers} GPUs; {where} has {gpus:g}. "
            "Set scale.num_workers lower, or scale.use_gpu=false."
        )


def _local_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def dashboard_url() -> str:
    """URL of the Ray dashboard, or "" without one."""
    url = ray.get_runtime_context().gcs_address and ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else ""
