"""How many trials fit at once, and why. Pure arithmetic: knows nothing of Ray.

A trial is one process and starts no workers of its own (no placement group inside another), so any number of trials
that fits the resources runs to its end.
"""

from __future__ import annotations

from tdro_ray.config import Recipe
from tdro_ray.errors import ResourceError

PROCESS_MEMORY = 1.8e9  # bytes of a process without its model, as measured: Python, torch, Ray, 16,384 tokens at work
MODEL_MEMORY = 20  # bytes a parameter: weights, gradients, two moments of Adam, and the evaluated copy


def preflight(recipe: Recipe, parameters: int, resources: dict[str, float]) -> tuple[int, str]:
    """Return (trials at once, one line that says why). `resources` are the cluster's: CPU, GPU, memory in bytes.

    Raises ResourceError when not one trial fits, or fewer than `tune.concurrent`.
    """
    settings, memory = recipe.tune, PROCESS_MEMORY + MODEL_MEMORY * parameters
    fit = {
        f"{resources.get('CPU', 0):g} CPUs at {settings.cpus_per_trial:g} a trial": int(
            resources.get("CPU", 0) / settings.cpus_per_trial + 1e-9
        )
    }
    if recipe.scale.use_gpu:
        fit[f"{resources.get('GPU', 0):g} GPUs at 1 a trial"] = int(resources.get("GPU", 0))
    tightest = min(fit, key=lambda name: fit[name])
    most = fit[tightest]
    if most < max(1, settings.concurrent):
        wanted = f"tune.concurrent={settings.concurrent} trials" if settings.concurrent else "one trial"
        mend = f"Set tune.concurrent to at most {most}" if most else "Take a larger cluster"
        raise ResourceError(
            f"{wanted} cannot run at once: {tightest} make room for {most}. {mend}, or lower tune.cpus_per_trial."
        )
    by_memory = int(resources["memory"] / memory) if resources.get("memory") else most
    concurrent = settings.concurrent or max(1, min(most, by_memory, settings.trials))
    reason = tightest
    if not settings.concurrent and by_memory < most:
        reason = f"{resources['memory'] / 1e9:.0f} GB of memory at about {memory / 1e9:.1f} GB a trial"
    elif settings.concurrent:
        reason = f"tune.concurrent; {tightest} make room for {most}"
    elif settings.trials < most:
        reason = f"no more are wanted; {tightest} make room for {most}"
    tight = (
        f" Memory is tight: about {concurrent * memory / 1e9:.0f} GB of {resources['memory'] / 1e9:.0f} GB."
        if by_memory < concurrent
        else ""
    )
    return concurrent, f"  {settings.trials} trials, {concurrent} at once ({reason}).{tight}"
