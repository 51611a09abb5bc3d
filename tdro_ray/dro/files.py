"""Weight files and alpha trajectories on disk. The weight file has the keys of the files that tDRO's authors released.

    domain_ids      task -> number, 0.. in the order of the file
    domain_weights  task -> sampling weight, sum 1
    size            task -> training rows
    epoch           task -> weight * total rows / task rows: passes over the task during one pass over the tasks listed
    meta            ours: measure, settings, seed, steps, data hashes, … (absent in released files)

Released top-k files list the selected tasks only, by falling weight, numbered anew, and count the total over them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tdro_ray.dro import select
from tdro_ray.errors import DataError, nearest

SUM_TOLERANCE = 1e-4  # released weights are float32: theirs sum to 1 within 1.3e-6


@dataclass(frozen=True)
class WeightFile:
    """Sampling weights of tasks and what is known about them. `weights` and `sizes` have the same tasks, in order."""

    weights: dict[str, float]
    sizes: dict[str, int]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(self.weights)

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each task during one pass over all listed rows: weight * total rows / task rows."""
        return select.repeats(self.weights, self.sizes)

    def selected(self, percent: float) -> WeightFile:
        """Return the file of the top `percent` % of the tasks, uniform among them (`select.select_top`)."""
        weights = select.select_top(self.weights, percent)
        return WeightFile(weights, {task: self.sizes[task] for task in weights}, dict(self.meta))


def read_weights(path: Path | str, known: Iterable[str] | None = None) -> WeightFile:
    """Return the weight file at `path`, tasks in the order of their `domain_ids`.

    `known` are the tasks of the store: another task in the file is an error. `epoch` is derived from the other
    fields and may be left out. Raises DataError that names the file and what is wrong in it.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise DataError(f"Weight file {path} cannot be read: {err.strerror}.") from err
    except ValueError as err:
        raise DataError(f"Weight file {path} is not valid JSON: {err}") from err
    if not isinstance(raw, dict):
        raise DataError(f"Weight file {path} must hold a JSON object, it holds {type(raw).__name__}.")
    for key in ("domain_ids", "domain_weights", "size"):
        if not isinstance(raw.get(key), dict):
            raise DataError(
                f"Weight file {path} lacks {key!r}, an object with one entry per task. It has: {', '.join(raw) or 'nothing'}."
            )
    ids, weights, sizes = raw["domain_ids"], raw["domain_weights"], raw["size"]
    for key, part in (("domain_ids", ids), ("size", sizes)):
        if odd := sorted(set(weights) ^ set(part)):
            raise DataError(
                f"Weight file {path}: {key!r} and 'domain_weights' differ in tasks: {', '.join(odd[:8])}. Both must list the same."
            )
    if sorted(map(repr, ids.values())) != sorted(map(repr, range(len(ids)))):
        raise DataError(
            f"Weight file {path}: 'domain_ids' must number the {len(ids)} tasks 0 to {len(ids) - 1}, each once."
        )
    order = sorted(ids, key=ids.__getitem__)
    file = WeightFile(
        {task: weights[task] for task in order}, {task: sizes[task] for task in order}, raw.get("meta") or {}
    )
    check_weights(file, f"Weight file {path}", known)
    return file


def check_weights(file: WeightFile, what: str, known: Iterable[str] | None = None) -> None:
    """Raise DataError, its message starting with `what`, unless the weights are a mixture of known tasks."""
    if not file.weights:
        raise DataError(f"{what} lists no task.")
    if odd := sorted(set(file.weights) ^ set(file.sizes)):
        raise DataError(f"{what}: weights and sizes differ in tasks: {', '.join(odd[:8])}. Both must list the same.")
    known = None if known is None else list(known)
    for task, weight in file.weights.items():
        if not _is_number(weight) or not math.isfinite(weight) or weight < 0:
            raise DataError(f"{what}: the weight of {task!r} is {weight!r}. It must be a number of at least 0.")
        if not isinstance(file.sizes[task], int) or file.sizes[task] < 1:
            raise DataError(
                f"{what}: the size of {task!r} is {file.sizes[task]!r}. It must be a whole number of at least 1, its training rows."
            )
        if known is not None and task not in known:
            raise DataError(
                f"{what}: no task {task!r} in the store.{nearest(task, known)} Ingest it, or take it out of the file."
            )
    total = math.fsum(file.weights.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise DataError(f"{what}: the weights sum to {total:.6g}. They must sum to 1; divide each by {total:.6g}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write_weights(path: Path | str, file: WeightFile) -> None:
    """Write a weight file in the released layout; readers see the old file or the whole new one, never a part.

    Raises DataError when the weights are not a mixture. `meta` is left out where there is none.
    """
    check_weights(file, f"Weight file {path}, about to be written")
    raw: dict[str, Any] = {
        "domain_ids": {task: number for number, task in enumerate(file.weights)},
        "domain_weights": {task: float(weight) for task, weight in file.weights.items()},
        "size": {task: file.sizes[task] for task in file.weights},
        "epoch": file.epochs,
    }
    if file.meta:
        raw["meta"] = file.meta
    with _replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(raw, indent=4), encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Trajectory:
    """Alpha and signal after each update. Axes: S updates, G tasks."""

    steps: list[int]
    tasks: list[str]
    alpha_SG: npt.NDArray[np.float64]
    signal_SG: npt.NDArray[np.float64]


def write_trajectory(
    path: Path | str, steps: Sequence[int], tasks: Sequence[str], alpha_SG: npt.ArrayLike, signal_SG: npt.ArrayLike
) -> None:
    """Write a trajectory as Parquet, one line per step and task: `step, task, alpha, signal`; atomic like the weights.

    Takes arrays or CPU tensors of shape (steps, tasks); raises ValueError for other shapes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shape = (len(steps), len(tasks))
    alpha, signal = np.asarray(alpha_SG, dtype=np.float64), np.asarray(signal_SG, dtype=np.float64)
    if alpha.shape != shape or signal.shape != shape:
        raise ValueError(
            f"A trajectory of {shape[0]} steps and {shape[1]} tasks needs arrays of shape {shape}, got {alpha.shape} and {signal.shape}."
        )
    table = pa.table(
        {
            "step": pa.array(np.repeat(np.asarray(steps, dtype=np.int64), len(tasks))),
            "task": pa.array(list(tasks) * len(steps), pa.string()),
            "alpha": pa.array(alpha.reshape(-1)),
            "signal": pa.array(signal.reshape(-1)),
        }
    )
    with _replacing(Path(path)) as temporary:
        pq.write_table(table, temporary)


def read_trajectory(path: Path | str) -> Trajectory:
    """Return the trajectory at `path`, tasks in the order of its first step.

    Raises DataError when the file cannot be read, lacks a column, or does not have every task in every step.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as err:
        raise DataError(f"Trajectory {path} cannot be read as Parquet: {err}") from err
    columns = ("step", "task", "alpha", "signal")
    if missing := [c for c in columns if c not in table.column_names]:
        raise DataError(
            f"Trajectory {path} lacks the column {', '.join(missing)}. It needs {', '.join(columns)}; it has {', '.join(table.column_names)}."
        )
    steps, names = table["step"].to_pylist(), table["task"].to_pylist()
    tasks = list(dict.fromkeys(names))
    rounds = steps[:: len(tasks)] if tasks else []
    if names != tasks * len(rounds) or steps != [step for step in rounds for _ in tasks]:
        raise DataError(
            f"Trajectory {path} must hold every one of its {len(tasks)} tasks once per step, in the same order. Write it anew."
        )
    shape = (len(rounds), len(tasks))
    alpha, signal = (table[c].to_numpy().astype(np.float64).reshape(shape) for c in ("alpha", "signal"))
    return Trajectory(rounds, tasks, alpha, signal)
