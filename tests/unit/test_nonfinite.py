"""A loss that is NaN on one of two workers is skipped on both, without a trace in the parameters, up to a limit."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_training_step import free_port
from training import TASKS, global_batch, leave, share_of, tiny_base

from tdro_ray.config import ModelSettings, OptimizeSettings, TrainSettings
from tdro_ray.dro.files import read_trajectory
from tdro_ray.errors import TdroError
from tdro_ray.model.encoder import Retriever
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, train

STEPS, ROWS = 5, 7  # rows are shared 3 to 4
POISON = 49  # a first token whose sequence gets a NaN vector


class Kept(LocalContext):
    """Keeps what every checkpoint held."""

    states: list[Any]

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        if checkpoint is not None:
            self.states.append(torch.load(checkpoint / "weights.pt", weights_only=True))
        super().report(metrics, checkpoint)


def batch_at(step: int, dro: bool, bad: tuple[int, ...]) -> Any:
    """Global batch of a step; in a bad one, the last row, which is worker 1's, makes the loss NaN."""
    batch = global_batch(ROWS, 3, None if dro else step % 3, seed=1, step=step)
    batch = replace(batch, ids=np.where(batch.ids == POISON, 2, batch.ids), row_B=np.arange(ROWS) + 100 * step)
    if step not in bad:
        return batch
    if dro:
        assert batch.reference_BP is not None
        batch.reference_BP[-1, 0] = np.nan
    else:
        batch.ids[batch.offset_S[ROWS - 1]] = POISON
    return batch


def run(
    folder: Path,
    base: Path,
    rank: int,
    world: int,
    dro: bool,
    bad: tuple[int, ...],
    allowed: int,
    gradient: bool = False,
) -> Any:
    """Return (states of the checkpoints, message of the error) of a run."""
    kind = OptimizeSettings if dro else TrainSettings
    settings = kind(
        steps=STEPS, batch_size=ROWS, temperature=0.1, checkpoint_every=1, log_every=2, learning_rate=1e-2,
        warmup_steps=0, skip_nonfinite=allowed,
    )  # fmt: skip
    real = Retriever.forward

    def poisoned(self: Retriever, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        out_BD = real(self, ids_BT, mask_BT)
        if gradient and (ids_BT[:, 0] == POISON).any():
            out_BD.register_hook(lambda grad: grad * torch.nan)
            return out_BD
        return torch.where((ids_BT[:, :1] == POISON), torch.nan, out_BD)

    Retriever.forward = poisoned
    try:
        context = Kept(
            lambda start: (share_of(batch_at(s, dro, bad), rank, world) for s in range(start, STEPS)),
            folder / "kept", rank=rank, world_size=world,
        )  # fmt: skip
        context.states = []
        train(TrainJob("key", base, folder / "out", settings, ModelSettings(), TASKS, seed=3), context)
        return context.states, ""
    except TdroError as err:
        return context.states, str(err)
    finally:
        Retriever.forward = real


def worker(rank: int, port: int, folder: Path, base: Path, cases: list[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = [run(folder / str(i), base, rank, 2, *case) for i, case in enumerate(cases)]
    torch.save(found, folder / f"found-{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


CASES = [(dro, bad, allowed) for dro in (False, True) for bad, allowed in (((2,), 1), ((1, 3), 1), ((2,), 0))]


@pytest.fixture(scope="module")
def found(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, what worker 0 found, what worker 1 found) of all cases under two gloo processes."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (free_port(), folder, base, CASES), nprocs=2)
    return folder, *(torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in (0, 1))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(a["parameters"][name], b["parameters"][name]) for name in a["parameters"])


@pytest.mark.parametrize("dro", [False, True])
def test_one_workers_nan_is_skipped_by_both_and_leaves_no_trace(found: Any, dro: bool) -> None:
    folder, first, second = found
    at = CASES.index((dro, (2,), 1))
    (states, error), (_, other) = first[at], second[at]
    assert error == other == "" and len(states) == STEPS
    changed = [not same(a, b) for a, b in itertools.pairwise(states)]
    assert changed == [True, False, True, True]  # step 2 is the skipped one
    assert all(torch.isfinite(p).all() for p in states[-1]["parameters"].values())
    written = json.loads((folder / str(at) / "out" / "nonfinite.json").read_text())["steps"]
    assert [(s["step"], s["skipped"]) for s in written] == [(2, True)]
    rows = written[0]["rows"]
    assert sorted(r["row"] for r in rows) == [200 + i for i in range(ROWS)]  # of both workers
    assert [r["worker"] for r in rows] == [0] * 3 + [1] * 4
    assert [(r["worker"], r["row"]) for r in rows if r["suspect"]] == [(1, 206)]
    assert written[0]["tasks"] == (sorted({r["task"] for r in rows}) if dro else ["c"])
    records = [json.loads(line) for line in (folder / str(at) / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped") for r in records] == [None, [2], None] and all(np.isfinite(r["loss"]) for r in records)
    if dro:
        trajectory = read_trajectory(folder / str(at) / "kept" / f"step-{STEPS:09d}" / "trajectory.parquet")
        assert trajectory.steps == list(range(STEPS))
        moved = abs(np.diff(trajectory.alpha_SG, axis=0)).max(1) > 0
        assert moved.tolist() == [True, False, True, True] and (trajectory.signal_SG[2] == 0).all()


@pytest.mark.parametrize("dro", [False, True])
def test_beyond_the_limit_both_stop_and_say_why(found: Any, dro: bool) -> None:
    folder, first, second = found
    at = CASES.index((dro, (1, 3), 1))
    for states_and_error in (first[at], second[at]):
        error = states_and_error[1]
        assert "not finite at step 3 (task " in error and "1 steps were skipped before it" in error
        assert ":306" in error and f"All {ROWS} rows are in" in error and "nonfinite.json" in error
    assert len(first[at][0]) == 3
    written = json.loads((folder / str(at) / "out" / "nonfinite.json").read_text())["steps"]
    assert [(s["step"], s["skipped"]) for s in written] == [(1, True), (3, False)]


@pytest.mark.parametrize("dro", [False, True])
def test_by_default_the_first_one_stops_the_run(found: Any, dro: bool) -> None:
    at = CASES.index((dro, (2,), 0))
    for states_and_error in (found[1][at], found[2][at]):
        assert "not finite at step 2" in states_and_error[1] and "were skipped" not in states_and_error[1]


def test_a_resumed_run_counts_the_steps_that_were_skipped_before(base: Path, tmp_path: Path) -> None:
    _, error = run(tmp_path, base, 0, 1, False, (1, 3), 1)
    assert "not finite at step 3" in error
    _, error = run(tmp_path, base, 0, 1, False, (1, 3), 1)  # from the checkpoint of step 3: the same step stops it
    assert "not finite at step 3" in error and "1 steps were skipped before it" in error
    states, error = run(tmp_path, base, 0, 1, False, (1,), 1)  # mended: it goes on, and what is past stays written
    assert error == "" and len(states) == 2
    assert [s["step"] for s in json.loads((tmp_path / "out" / "nonfinite.json").read_text())["steps"]] == [1]


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_in_no_checkpoint(base: Path, tmp_path: Path) -> None:
    states, error = run(tmp_path, base, 0, 1, False, (2,), 3, gradient=True)
    assert "The gradient is not finite at step 2 (task c)" in error and len(states) == 2
    assert all(torch.isfinite(p).all() for p in states[-1]["parameters"].values())
    written = json.loads((tmp_path / "out" / "nonfinite.json").read_text())["steps"]
    assert [(s["step"], s["skipped"], len(s["rows"])) for s in written] == [(2, False, ROWS)]
