"""Connect to a Ray cluster or start one on this machine, and check that a stage's workers fit before it asks for them."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient  # no public call asks a head whether it is there
from ray.exceptions import AuthenticationError, RayError

from cluster.ingress import prepare
from tdro_ray.config import ScaleSettings, least_workers
from tdro_ray.errors import ResourceError

LOCAL_OBJECT_STORE = 1 << 30  # bytes; batches are small, and a laptop has other uses for its memory
LEAST_OBJECT_STORE = 80 << 20  # bytes; Ray refuses less
ANSWER_SECONDS = 3.0  # a head that takes longer to accept a connection is not there


def connect(scale: ScaleSettings, proxy: str = "auto") -> None:
    """Join the cluster that `RAY_ADDRESS` names (a Ray job sets it), or start Ray on this machine. Idempotent.

    `proxy` is what takes HTTP in for Ray Serve (see `ingress`); a cluster must have been started with the same.

    Raises ResourceError when no cluster answers or the workers do not fit, saying what is there and what to set.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard shows Train runs only with it
        address = os.environ.get("RAY_ADDRESS") or "local"
        prepare(proxy, starts_ray=address == "local")
        if address == "local":
            _start(scale)
        else:
            _join(address)
    total = ray.cluster_resources()
    check_fit(scale, total.get("CPU", 0.0), total.get("GPU", 0.0), "the cluster")


def check_fit(scale: ScaleSettings, cpus: float, gpus: float, where: str) -> None:
    """Raise ResourceError unless the workers and at least one data task fit `cpus` and `gpus` at once.

    Workers that take every CPU would wait for ever for batches that no data task can make.
    """
    workers = least_workers(scale)
    need = workers * scale.cpus_per_worker + scale.cpus_per_data_task
    if need > cpus:
        most = max(0, int((cpus - scale.cpus_per_data_task) / scale.cpus_per_worker + 1e-9))
        fewer = f"Set scale.num_workers to at most {most}" if most else "Take a larger machine or cluster"
        raise ResourceError(
            f"{workers} workers of {scale.cpus_per_worker:g} CPU and one data task of {scale.cpus_per_data_task:g} "
            f"need {need:g} CPUs; {where} has {cpus:g}. {fewer}, or lower scale.cpus_per_worker."
        )
    if scale.use_gpu and workers > gpus:
        raise ResourceError(
            f"{workers} GPU workers need {workers} GPUs; {where} has {gpus:g}. "
            "Set scale.num_workers lower, or scale.use_gpu=false."
        )


def _start(scale: ScaleSettings) -> None:
    """Start Ray on this machine, beside any other that runs here; it ends with this process."""
    check_fit(scale, float(os.cpu_count() or 1), _local_gpus() if scale.use_gpu else 0.0, "this machine")
    memory = min(LOCAL_OBJECT_STORE, int(psutil.virtual_memory().available * 0.3))
    try:
        _init(
            "local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=max(LEAST_OBJECT_STORE, memory),
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as err:
        raise ResourceError(
            f"Ray did not start on this machine: {err} Its logs are under /tmp/ray/session_latest/logs (or $RAY_TMPDIR)."
        ) from err


def _join(address: str) -> None:
    _check_answers(address)
    try:
        _init(address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as err:
        raise ResourceError(f"{_unanswered(address)} ({err})") from err


def _init(address: str, **options: Any) -> None:
    ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)


def _check_answers(address: str) -> None:
    """Raise ResourceError unless a Ray head answers at `host:port` and takes this process's token.

    `ray.init` itself tries for more than ten minutes where nobody listens, and for 20 seconds where the token is refused.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # "auto": Ray finds the head, or says at once that there is none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        if not address.startswith("ray://"):
            GcsClient(address=address)
    except AuthenticationError as err:
        raise ResourceError(
            f"The Ray cluster at RAY_ADDRESS={address} asks for a token, and did not get the right one. Set RAY_AUTH_MODE=token, and "
            "put what `ray get-auth-token` prints on its head node into ~/.ray/auth_token here, or into RAY_AUTH_TOKEN."
        ) from err
    except (OSError, ValueError, RayError) as err:
        raise ResourceError(f"{_unanswered(address)} ({err})") from err


def _unanswered(address: str) -> str:
    return (
        f"No Ray cluster answers at RAY_ADDRESS={address}. Start one (`ray start --head`), set RAY_ADDRESS to the host:port that "
        "it prints, or unset RAY_ADDRESS to run on this machine alone."
    )


def _local_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())
