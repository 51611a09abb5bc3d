"""Checkpoints of a training run: everything that it needs to go on exactly. The manifest is written last.

weights.pt     trainable parameters and optimiser state (as the backend gathers them)
dro.pt         task weights and trajectory (stage 1 only)
model/         the finished model folder (last checkpoint only)
manifest.json  step, settings key, whether the run ended there
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tdro_ray.errors import CheckpointError


def write(
    folder: Path,
    step: int,
    key: str,
    backend_state: dict[str, Any],
    dro_state: dict[str, Any] | None,
    finished: bool = False,
) -> None:
    """Write the checkpoint that says: `step` steps are done, and whether they are all that the run needs."""
    torch.save(backend_state, folder / "weights.pt")
    if dro_state is not None:
        torch.save(dro_state, folder / "dro.pt")
    (folder / "manifest.json").write_text(
        json.dumps({"step": step, "key": key, "finished": finished}) + "\n", encoding="utf-8"
    )


def progress(folder: Path, key: str) -> tuple[int, bool]:
    """Return (steps done, whether the run ended there). Raises CheckpointError for another run's or a damaged one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found, steps, finished = manifest["key"], int(manifest["step"]), bool(manifest["finished"])
    except (OSError, ValueError, KeyError) as err:
        raise _damaged(folder, err) from err
    if found != key:
        raise CheckpointError(f"The checkpoint {folder} is of other settings (key {found}, wanted {key}). Delete it.")
    return steps, finished


def read(folder: Path, key: str) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
    """Return (steps done, backend state, stage-1 state). Raises CheckpointError for another run's or a damaged one."""
    steps, _ = progress(folder, key)
    try:
        state = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True, mmap=True)
        dro = folder / "dro.pt"
        return steps, state, torch.load(dro, weights_only=True) if dro.exists() else None
    except (OSError, ValueError, RuntimeError) as err:
        raise _damaged(folder, err) from err


def publish(folder: Path, out: Path) -> None:
    """Copy what the last checkpoint finished (model, alpha, trajectory) into `out`, each by rename."""
    for name in ("model", "alpha.json", "trajectory.parquet"):
        source, target = folder / name, out / name
        if not source.exists():
            continue
        temporary = out / f".{name}.tmp"
        _remove(temporary)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, temporary)
        _remove(target)
        temporary.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _damaged(folder: Path, err: Exception) -> CheckpointError:
    return CheckpointError(f"The checkpoint {folder} cannot be read: {err}. Delete it to start from the one before.")
