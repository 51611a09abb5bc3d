"""What the training loop needs from its surroundings: six members. Ray's version is in `ray_train.py`.

The loop runs on a bare machine (torch, transformers, peft) through `LocalContext`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from tdro_ray.data.collate import Batch


class TrainContext(Protocol):
    """Surroundings of one worker."""

    rank: int
    world_size: int
    device: torch.device

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield this worker's batches from step `start` on."""
        ...

    def latest_checkpoint(self) -> Path | None:
        """Return the folder of the newest complete checkpoint of this run, or None."""
        ...

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Publish metrics; keep the checkpoint that was written at `checkpoint` (rank 0 passes one). All ranks call it."""
        ...


class LocalContext:
    """One process, or one of several under an already initialised torch.distributed group.

    `make_batches(start)` yields the batches; checkpoints are kept under `folder`, the newest `keep`.
    """

    def __init__(
        self,
        make_batches: Callable[[int], Iterable[Batch]],
        folder: Path,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        keep: int = 1,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._make_batches, self._folder, self._keep = make_batches, Path(folder), keep
        self.reported: list[dict[str, Any]] = []

    def batches(self, start: int) -> Iterator[Batch]:
        return iter(self._make_batches(start))

    def latest_checkpoint(self) -> Path | None:
        found = sorted(p.parent for p in self._folder.glob("step-*/manifest.json"))
        return found[-1] if found else None

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        self.reported.append(metrics)
        if checkpoint is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"step-{metrics['step']:09d}"
        arriving = self._folder / ".arriving"  # a move from another filesystem is a copy, which a kill can cut short
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.move(str(checkpoint), arriving)
        shutil.rmtree(target, ignore_errors=True)
        arriving.rename(target)
        for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old)
