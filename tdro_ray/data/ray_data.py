"""Ray Data's settings that all our jobs share."""

from __future__ import annotations

import logging
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


def cluster() -> tuple[dict[str, float], str]:
    """Return what the connected cluster has (CPU, GPU, memory in bytes), and the address for another process to join it."""
    return dict(ray.cluster_resources()), str(ray.get_runtime_context().gcs_address)
