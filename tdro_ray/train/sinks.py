"""Metrics of a training run for dashboards: TensorBoard, W&B, MLflow. `metrics.jsonl` stays the source of truth.

Written by rank 0 only. A dashboard that fails is left out for the rest of the run, with a warning: it is worth no training.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tdro_ray.config import LoggingSettings
from tdro_ray.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogTo:
    """Where a training run's metrics go besides `metrics.jsonl`; nowhere by default."""

    settings: LoggingSettings = field(default_factory=lambda: LoggingSettings(tensorboard=False))
    run: str = ""  # name of the recipe
    stage: str = ""
    key: str = ""  # the same for a run and its resumption
    folder: Path = Path()  # the run folder
    config: dict[str, Any] = field(default_factory=dict)  # settings to show beside the curves


class Sink(Protocol):
    """One dashboard."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `<run>/tensorboard/<stage>`; a resumed run replaces what came after its checkpoint."""

    def __init__(self, to: LogTo, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = to.folder / "tensorboard" / to.stage
        if start == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of other settings
        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A W&B run of the project that `logging.wandb` names; a resumed run goes on in the same one."""

    def __init__(self, to: LogTo, start: int) -> None:
        import wandb

        self.run = wandb.init(
            project=to.settings.wandb,
            name=f"{to.run}-{to.stage}",
            id=f"{to.run}-{to.stage}-{to.key}",
            group=to.run,
            config=to.config,
            dir=str(to.folder),
            resume="allow",
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """An MLflow run of the experiment that `logging.mlflow` names, where `MLFLOW_TRACKING_URI` says; its id is kept
    beside the metrics, so that a resumed run goes on in the same one."""

    def __init__(self, to: LogTo, start: int) -> None:
        import mlflow

        self.mlflow, path = mlflow, to.folder / "stages" / to.stage / "mlflow-run.txt"
        known = path.read_text(encoding="utf-8").strip() if start and path.exists() else None
        mlflow.set_experiment(to.settings.mlflow)
        run = mlflow.start_run(run_id=known, run_name=f"{to.run}-{to.stage}")
        if known is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(run.info.run_id + "\n", encoding="utf-8")
            mlflow.log_params(to.config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


SINKS: dict[str, Callable[[LogTo, int], Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def check_installed(settings: LoggingSettings) -> None:
    """Raise ConfigError for a dashboard that the recipe asks for by name and that is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(settings, name) and find_spec(name) is None:
            raise ConfigError(
                f"logging.{name} is set and {name} is not installed: pip install {name}, or leave it empty."
            )


class Sinks:
    """The dashboards of one run. `start` is the step that it goes on from, `tasks` the names behind lists by task."""

    def __init__(self, to: LogTo, start: int, tasks: Sequence[str]) -> None:
        self.tasks = tasks
        self.open: dict[str, Sink] = {}
        for name, make in SINKS.items():
            if getattr(to.settings, name) and find_spec(name) is not None:
                self._guarded(name, lambda name=name, make=make: self.open.update({name: make(to, start)}))

    def write(self, record: dict[str, Any]) -> None:
        """Write one record of `metrics.jsonl`."""
        values = scalars(record, self.tasks)
        for name, sink in list(self.open.items()):
            self._guarded(name, lambda sink=sink: sink.write(int(record["step"]), values))

    def close(self) -> None:
        for name, sink in list(self.open.items()):
            self._guarded(name, sink.close)
        self.open.clear()

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as err:  # whatever a dashboard's client or server raises
            self.open.pop(name, None)
            log.warning("%s is left out from here on: %s. metrics.jsonl has everything.", name, err)


def scalars(record: dict[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """Return the finite numbers of a record: lists by task as `alpha/<task>`, skipped steps as their number."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if key == "skipped":
            found[key] = float(len(value))
        elif isinstance(value, (int, float)) and key != "step":
            found[key] = float(value)
        elif isinstance(value, list) and len(value) == len(tasks):
            found |= {f"{key}/{task}": float(part) for task, part in zip(tasks, value, strict=True)}
    return {key: value for key, value in found.items() if math.isfinite(value)}
