"""Steps whose loss is NaN or infinite: written down with the rows of all workers, then skipped or the end of the run.

B rows of this worker, N rows of the global batch, S sequences, P passages of a row, D dimensions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdro_ray.config import TrainSettings
from tdro_ray.data.collate import Batch
from tdro_ray.errors import TdroError
from tdro_ray.train.comm import gather_rows, gather_sizes, largest
from tdro_ray.train.context import TrainContext

FILE = "nonfinite.json"


class NonFiniteLoss(TdroError):
    """Raised by a step on all workers alike, before any gradient reaches a parameter and before alpha moves."""

    what = "loss"

    def __init__(self, message: str, suspect_B: Tensor) -> None:
        super().__init__(message)
        self.suspect_B = suspect_B  # rows of this worker whose own vectors or reference similarities are not finite


class NonFiniteGradient(NonFiniteLoss):
    """The update has been made when this is known: the step cannot be skipped, and must not be kept in a checkpoint."""

    what = "gradient"

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"step {batch.step}", torch.zeros(len(batch.task_B), dtype=torch.bool))


def check_finite(total: Tensor, rep_SD: Tensor, batch: Batch, names: tuple[str, ...]) -> None:
    """Raise NonFiniteLoss unless `total`, a sum over all workers' rows, is finite."""
    if torch.isfinite(total):
        return
    num_local = len(batch.task_B)
    bad_S = ~torch.isfinite(rep_SD.detach()).all(1).cpu()
    suspect_B = bad_S[:num_local] | bad_S[num_local:].reshape(num_local, -1).any(1)
    if batch.reference_BP is not None:
        suspect_B |= ~torch.isfinite(torch.from_numpy(batch.reference_BP)).all(1)
    rows = ", ".join(f"{names[t]}:{r}" for t, r in zip(batch.task_B[:8], batch.row_B[:8], strict=True))
    raise NonFiniteLoss(
        f"The loss is not finite at step {batch.step}. This worker's rows (task:row): {rows}, … "
        "Lower the learning rate or raise the temperature; the last checkpoint is kept.",
        suspect_B,
    )


class Skips:
    """The steps of a run that were not finite, in `nonfinite.json`; at most `skip_nonfinite` of them are skipped.

    `start` is the step from which the run goes on: what was written of later ones is taken again.
    """

    def __init__(self, out: Path, context: TrainContext, settings: TrainSettings, start: int) -> None:
        self.path, self.context, self.allowed = out / FILE, context, settings.skip_nonfinite
        self.steps: list[dict[str, Any]] = []
        if context.rank == 0:
            self.steps = [step for step in _read(self.path) if step["step"] < start]
            if self.steps:
                self._write()
            else:
                self.path.unlink(missing_ok=True)
        self.count = largest(len(self.steps), context.device)  # rank 0 knows; all have to stop at the same step

    def skip(self, batch: Batch, error: NonFiniteLoss, names: tuple[str, ...]) -> None:
        """Write the step down and return when it may be skipped. Raises TdroError on all workers when it may not."""
        self.count += 1
        skipped = self.count <= self.allowed and type(error) is NonFiniteLoss
        device = self.context.device
        sizes = gather_sizes(len(batch.task_B), device)
        task_B, row_B = torch.from_numpy(batch.task_B), torch.from_numpy(batch.row_B)
        packed_B3 = torch.stack([task_B.long(), row_B.long(), error.suspect_B.long()], 1).to(device)
        rows_N3 = gather_rows(packed_B3, sizes).tolist()
        if self.context.rank == 0:
            workers = [rank for rank, size in enumerate(sizes) for _ in range(size)]
            rows = [
                {"worker": rank, "task": names[task], "row": row, "suspect": bool(suspect)}
                for rank, (task, row, suspect) in zip(workers, rows_N3, strict=True)
            ]
            tasks = sorted({row["task"] for row in rows})
            self.steps.append({"step": batch.step, "tasks": tasks, "skipped": skipped, "rows": rows})
            self._write()
        if skipped:
            return
        suspects = [f"{names[task]}:{row}" for task, row, suspect in rows_N3 if suspect]
        found = (
            f"{len(suspects)} rows have vectors that are not finite: {', '.join(suspects[:8])}. " if suspects else ""
        )
        before = f"{self.count - 1} steps were skipped before it. " if self.count > 1 else ""
        tasks = ", ".join(sorted({names[task] for task, _, _ in rows_N3}))
        raise TdroError(
            f"The {error.what} is not finite at step {batch.step} (task {tasks}). {before}{found}All {len(rows_N3)} rows are in "
            f"{self.path}. Lower the learning rate or raise the temperature; the last checkpoint is kept. "
            f"skip_nonfinite ({self.allowed} here) leaves out that many steps whose loss is not finite."
        ) from error

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{FILE}.tmp")
        temporary.write_text(json.dumps({"steps": self.steps}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError):
        return []
