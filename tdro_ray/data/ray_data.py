"""Ray Data's settings that all our jobs share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.debug import log_once


def quiet() -> Any:
    """Ray Data's context for the calling process: rows stay in order; neither progress bars nor start messages.

    Warnings stay; every message is in the session's `ray-data.log`.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    log_once("ray_data_progress_manager_disabled")  # the reminder that progress bars are off counts as given
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.WARNING)
    return context


def by_actors(
    dataset: ray.data.Dataset,
    actor: type,
    made_from: dict[str, Any],
    num_actors: int,
    cpus: float,
    use_gpu: bool,
    name: str,
) -> Iterator[Any]:
    """Yield one Arrow table per row of `dataset`, in order, made by a pool of `actor(**made_from)`, a GPU each with `use_gpu`."""
    mapped = dataset.map_batches(
        actor,
        fn_constructor_kwargs=made_from,
        batch_size=1,
        num_cpus=cpus,
        num_gpus=1 if use_gpu else 0,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
    )
    mapped.context.execution_options.preserve_order = True
    mapped.set_name(name)
    yield from mapped.iter_batches(batch_size=1, batch_format="pyarrow")


def cluster() -> tuple[dict[str, float], str]:
    """Return what the connected cluster has (CPU, GPU, memory in bytes), and the address for another process to join it."""
    return dict(ray.cluster_resources()), str(ray.get_runtime_context().gcs_address)
