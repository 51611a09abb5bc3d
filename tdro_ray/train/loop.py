"""The training loop of all stages, read downward: batch, step, update, log, checkpoint. Knows nothing of Ray.

G tasks.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tdro_ray.config import ModelSettings, OptimizeSettings, ScaleSettings, TrainSettings
from tdro_ray.data.collate import Batch
from tdro_ray.dro.files import write_trajectory
from tdro_ray.dro.weights import TaskWeights, converged, eta_at, tail_mean
from tdro_ray.errors import TdroError
from tdro_ray.model.encoder import Retriever, load_retriever, save_retriever
from tdro_ray.train import checkpoint
from tdro_ray.train.backends import BACKENDS, Backend
from tdro_ray.train.comm import of_first, sum_
from tdro_ray.train.context import TrainContext
from tdro_ray.train.nonfinite import NonFiniteGradient, NonFiniteLoss, Skips
from tdro_ray.train.optimizer import trained_parameters
from tdro_ray.train.prepare import speed_up, trainable
from tdro_ray.train.sinks import LogTo, Sinks
from tdro_ray.train.step import StepResult, TaskSettings, contrastive_step, dro_step


@dataclass(frozen=True)
class TrainJob:
    """One training run, small and picklable. Stage 1 is the one whose settings are `OptimizeSettings`."""

    key: str  # of everything that decides the result; a checkpoint of another key is refused
    base: Path  # model folder to start from
    out: Path  # folder for metrics.jsonl and, at the end, model/ and trajectory.parquet
    settings: TrainSettings
    model: ModelSettings
    tasks: TaskSettings
    seed: int
    scale: ScaleSettings = field(default_factory=ScaleSettings)  # of which backend and checkpoint_minutes are read here
    snapshots: tuple[int, ...] = ()  # steps after which the model is also kept, as out/start-<step>
    log_to: LogTo = field(default_factory=LogTo)  # dashboards


def train(job: TrainJob, context: TrainContext) -> dict[str, Any]:
    """Run the job to its end, from its newest checkpoint on, and return a summary (equal on all workers)."""
    torch.set_flush_denormal(True)  # softmax at small temperatures makes denormals, which CPUs crawl through
    try:
        with ExitStack() as closing:
            return _train(job, context, closing)
    finally:
        torch.set_flush_denormal(False)


def _train(job: TrainJob, context: TrainContext, closing: ExitStack) -> dict[str, Any]:
    settings, device = job.settings, context.device
    found = context.latest_checkpoint()
    done, finished = checkpoint.progress(found, job.key) if found else (0, False)
    # Asked for before the model is loaded, so that data starts meanwhile; not at all where the run was killed between
    # its last checkpoint and its end: there is nothing to read.
    batches = iter(()) if finished else context.batches(done)
    torch.manual_seed(job.seed)
    retriever = speed_up(
        trainable(load_retriever(job.base, job.model.dtype), job.model), job.model, job.scale.backend, device
    )
    backend: Backend = BACKENDS[job.scale.backend](retriever, settings, job.scale, device)
    weights = _task_weights(settings, len(job.tasks.names))
    trajectory: list[tuple[int, list[float], list[float]]] = []
    start = _restore(job, found, backend, weights, trajectory)
    log = _Log(job, context, start)
    closing.callback(log.sinks.close)
    skips = Skips(job.out, context, settings, start)
    checkpoint_due = _due(job, context)

    for batch in log.timed(batches):
        _check_order(batch, start, context)
        torch.manual_seed(_step_seed(job.seed, batch.step, context.rank))  # dropout goes on exactly after a restart
        result: StepResult | None = None  # stays so where the step is skipped
        try:
            if isinstance(settings, OptimizeSettings):
                assert weights is not None
                weights.eta = eta_at(batch.step, settings.steps, settings.eta, settings.eta_schedule, settings.hold)
                result = dro_step(backend, weights, batch, settings, job.tasks, retriever.spec.pad_token_id, device)
            else:
                pad_id = retriever.spec.pad_token_id
                result = contrastive_step(backend, batch, settings, job.tasks, pad_id, device, weights)
        except NonFiniteLoss as err:
            skips.skip(batch, err, job.tasks.names)
        if weights is not None:
            signal_G = result.detail["signal"] if result else [0.0] * len(job.tasks.names)
            trajectory.append((batch.step, weights.alpha_G.tolist(), signal_G))
        rate = learning_rate(batch.step, settings)
        norm = backend.update(rate) if result else 0.0
        if not math.isfinite(norm):
            skips.skip(batch, NonFiniteGradient(batch), job.tasks.names)
        start = batch.step + 1
        finished = start == settings.steps or _converged(settings, trajectory)
        log.step(batch, result, rate, norm, finished)
        if start in job.snapshots:
            _snapshot(job, context, backend, start)
        if finished or checkpoint_due(start):
            _checkpoint(job, context, backend, weights, trajectory, start, finished)
        if finished:
            break
    if not finished:
        raise TdroError(
            f"The batches ended after {start} of {settings.steps} steps. Run the stage again: it goes on from its checkpoint."
        )
    return {"loss": log.last_loss, "steps": start, "tokens_per_s": log.mean_rate(), "data_wait_share": log.wait_share()}


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the rate of `step` (0-based): linear warm-up, then cosine down to `min_lr_ratio` of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    t = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    low = settings.min_lr_ratio
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * t)) / 2)


def _due(job: TrainJob, context: TrainContext) -> Callable[[int], bool]:
    """Return what says, alike on all workers, whether a checkpoint is due after so many steps: by their number, or by
    rank 0's clock since the last one. Every worker calls it after every step."""
    last, seconds = time.monotonic(), 60 * job.scale.checkpoint_minutes

    def due(step: int) -> bool:
        nonlocal last
        late = seconds > 0 and of_first(int(time.monotonic() - last >= seconds), context.device) == 1
        if not late and step % job.settings.checkpoint_every:
            return False
        last = time.monotonic()
        return True

    return due


def _converged(settings: TrainSettings, trajectory: list[Any]) -> bool:
    """Whether stage 1 may end early: less than `tolerance` of the weight moved between the last two windows."""
    if not isinstance(settings, OptimizeSettings) or not settings.tolerance or len(trajectory) < 2 * settings.window:
        return False
    recent_SG = torch.tensor([alpha for _, alpha, _ in trajectory[-2 * settings.window :]], dtype=torch.float64)
    moving = eta_at(trajectory[-2 * settings.window][0], settings.steps, 1.0, settings.eta_schedule, settings.hold) > 0
    return moving and converged(recent_SG, settings.tolerance, settings.window)


def _snapshot(job: TrainJob, context: TrainContext, backend: Backend, step: int) -> None:
    """Keep the model as it is now, beside what the run goes on to. All ranks call it."""
    state = backend.state_dict()
    if context.rank != 0:
        return
    arriving, target = job.out / f".start-{step}", job.out / f"start-{step}"
    for folder in (arriving, target):
        shutil.rmtree(folder, ignore_errors=True)
    save_retriever(_finished(job, state["parameters"]), job.base, arriving)
    arriving.rename(target)


def _task_weights(settings: TrainSettings, num_tasks: int) -> TaskWeights | None:
    if not isinstance(settings, OptimizeSettings):  # Group DRO moves the weight of the batch's task alone, unclipped
        return TaskWeights(num_tasks, settings.group_dro, math.inf, absent="zero") if settings.group_dro else None
    return TaskWeights(
        num_tasks,
        settings.eta,
        settings.clip,
        settings.ema,
        settings.floor,
        absent=settings.absent,
        momentum=settings.momentum,
    )


def _restore(
    job: TrainJob, folder: Path | None, backend: Backend, weights: TaskWeights | None, trajectory: list[Any]
) -> int:
    if folder is None:
        return 0
    step, backend_state, dro_state = checkpoint.read(folder, job.key)
    backend.load_state_dict(backend_state)
    if weights is not None and dro_state is not None:
        weights.load_state_dict(dro_state["weights"])
        trajectory.extend(tuple(t) for t in dro_state["trajectory"])
    return step


def _checkpoint(
    job: TrainJob,
    context: TrainContext,
    backend: Backend,
    weights: TaskWeights | None,
    trajectory: list[Any],
    step: int,
    finished: bool,
) -> None:
    state = backend.state_dict()
    if context.rank != 0:
        context.report({"step": step})
        return
    folder = Path(tempfile.mkdtemp(prefix="tdro-"))
    dro = None if weights is None else {"weights": weights.state_dict(), "trajectory": trajectory}
    if finished:
        save_retriever(_finished(job, state["parameters"]), job.base, folder / "model")
        if weights is not None:
            _write_weights(folder, job, weights, trajectory)
    checkpoint.write(folder, step, job.key, state, dro, finished)
    context.report({"step": step}, folder)


def _finished(job: TrainJob, parameters: dict[str, torch.Tensor]) -> Retriever:
    """Return the base model with the trained parameters in host memory: the trained module itself may be in shards."""
    retriever = trainable(load_retriever(job.base, job.model.dtype), job.model)
    with torch.no_grad():
        for name, p in trained_parameters(retriever).items():
            p.copy_(parameters[name])
    return retriever


def _write_weights(folder: Path, job: TrainJob, weights: TaskWeights, trajectory: list[Any]) -> None:
    steps, alpha_SG, signal_SG = zip(*trajectory, strict=True)
    write_trajectory(folder / "trajectory.parquet", steps, list(job.tasks.names), alpha_SG, signal_SG)
    found = {"current": weights.alpha_G, "mean": weights.mean_G, "ema": weights.ema_G}
    if isinstance(job.settings, OptimizeSettings):
        found["tail"] = tail_mean(torch.tensor(alpha_SG, dtype=torch.float64), job.settings.tail)
    (folder / "alpha.json").write_text(json.dumps({k: v.tolist() for k, v in found.items()}), encoding="utf-8")


def _check_order(batch: Batch, expected: int, context: TrainContext) -> None:
    if (batch.step, batch.rank) != (expected, context.rank):
        raise TdroError(
            f"Worker {context.rank} expected its share of step {expected} and received step {batch.step}, share {batch.rank}: "
            "batches arrived out of order. Nothing was trained on it; run the stage again, it goes on from its checkpoint."
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 4099 + rank) % (2**63)


class _Log:
    """Times, rates and losses of the steps; rank 0 writes every `log_every`-th into `metrics.jsonl`."""

    def __init__(self, job: TrainJob, context: TrainContext, start: int) -> None:
        self.path, self.context, self.settings = job.out / "metrics.jsonl", context, job.settings
        self.sinks = Sinks(job.log_to if context.rank == 0 else LogTo(), start, job.tasks.names)
        self.last_loss, self._losses = math.nan, []
        self._steps, self._skipped = 0, []
        self._wait = self._total_wait = 0.0
        self._tokens = self._total_tokens = 0
        self._began = self._mark = time.perf_counter()
        if context.rank == 0:
            job.out.mkdir(parents=True, exist_ok=True)
            kept = [ln for ln in _lines(self.path) if json.loads(ln)["step"] <= start]
            self.path.write_text("".join(kept), encoding="utf-8")

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches and count how long each was waited for; the first wait is start-up, not data wait."""
        first = True
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if first:
                self._began = self._mark = time.perf_counter()
                first = False
            else:
                self._wait += time.perf_counter() - before
            yield batch

    def step(self, batch: Batch, result: StepResult | None, rate: float, norm: float, last: bool) -> None:
        self._steps += 1
        if result is None:
            self._skipped.append(batch.step)
        else:
            self.last_loss = result.loss
            self._losses.append(result.loss)
        self._tokens += int(batch.length_S.sum())
        done = batch.step + 1
        if done % self.settings.log_every and not last:
            return
        tokens = int(sum_(torch.tensor([self._tokens], dtype=torch.int64, device=self.context.device)))
        now = time.perf_counter()
        seconds = max(1e-9, now - self._mark)
        record = {
            "step": done,
            "loss": sum(self._losses) / len(self._losses) if self._losses else self.last_loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_s": tokens / seconds,
            "data_wait_s": self._wait / self._steps,
            "step_s": seconds / self._steps,
            "peak_memory_mb": _peak_memory_mb(self.context.device),
            **({"skipped": self._skipped} if self._skipped else {}),
            **(result.detail if result else {}),
        }
        if self.context.rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.sinks.write(record)
        self._total_wait += self._wait
        self._total_tokens += tokens
        self._wait, self._tokens, self._losses, self._mark = 0.0, 0, [], now
        self._steps, self._skipped = 0, []

    def mean_rate(self) -> float:
        return self._total_tokens / max(1e-9, self._mark - self._began)

    def wait_share(self) -> float:
        return self._total_wait / max(1e-9, self._mark - self._began)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
