"""One training step: embed the batch, loss, gradients. No data, no optimiser, no Ray.

B rows of this worker, N rows of the global batch, P passages of a row (the positive first), M passages of the global
batch, S = B (1 + P) sequences, K positives of a row, G tasks, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdro_ray.config import OptimizeSettings, TrainSettings
from tdro_ray.data.collate import Batch
from tdro_ray.dro.measures import signal, task_counts, task_means
from tdro_ray.dro.weights import TaskWeights, row_weights
from tdro_ray.errors import TdroError
from tdro_ray.model.encoder import to_tensors
from tdro_ray.retrieval.chunks import length_chunks
from tdro_ray.retrieval.contrastive import global_batch_loss, own_passages_loss
from tdro_ray.retrieval.grad_cache import CachedForward, plan_chunks
from tdro_ray.train.backends import Backend
from tdro_ray.train.comm import gather_rows, gather_sizes, largest, sum_, world

ROW_BLOCK = 512  # rows of the loss matrix held at a time


@dataclass(frozen=True)
class TaskSettings:
    """Per-task facts that the loss needs, in the plan's order of tasks."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    temperatures: tuple[float | None, ...]
    in_batch: tuple[bool, ...]


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself, equal on all workers."""

    loss: float  # mean row loss of the global batch (stages 0, 2); robust loss (stage 1)
    num_rows: int
    detail: dict[str, Any]


def contrastive_step(
    backend: Backend, batch: Batch, settings: TrainSettings, tasks: TaskSettings, pad_id: int, device: torch.device
) -> StepResult:
    """Forward and backward of a homogeneous batch (stages 0 and 2): mean InfoNCE over the global batch's rows."""
    cached = _cached_forward(backend, batch, settings.token_budget, pad_id, device)
    rep_SD = cached.forward()
    num_local, task = len(batch.task_B), int(batch.task_B[0]) if len(batch.task_B) else 0
    temperature = tasks.temperatures[task] or settings.temperature
    query_BD, passage_XD = rep_SD[:num_local], rep_SD[num_local:]
    if tasks.in_batch[task]:
        loss_B, gradient_SD = _in_batch(query_BD, passage_XD, batch, temperature)
    else:
        loss_B, gradient_SD = _own_passages(query_BD, passage_XD, batch, temperature)
    totals = sum_(torch.stack([loss_B.sum(), torch.tensor(float(num_local), dtype=loss_B.dtype, device=device)]))
    _check_finite(totals[0], batch, tasks)
    cached.backward(gradient_SD / totals[1])
    return StepResult(float(totals[0] / totals[1]), int(totals[1]), {"task": tasks.names[task]})


def dro_step(
    backend: Backend,
    weights: TaskWeights,
    batch: Batch,
    settings: OptimizeSettings,
    tasks: TaskSettings,
    pad_id: int,
    device: torch.device,
) -> StepResult:
    """Forward and backward of a stratified batch (stage 1): update alpha, then the robust loss under the new alpha.

    Robust loss = sum_i alpha_g(i) / sum_j alpha_g(j) * L_proxy,i over the global batch (released code), so neither
    alpha nor the gradient depends on the number of workers.
    """
    cached = _cached_forward(backend, batch, settings.token_budget, pad_id, device)
    rep_SD = cached.forward()
    num_local = len(batch.task_B)
    tau_B1 = _temperatures(batch, settings.temperature, tasks, device)[:, None]
    valid_BP = torch.from_numpy(batch.passage_key_BP >= 0).to(device)
    query_BD = rep_SD[:num_local].detach().requires_grad_()
    passage_BPD = rep_SD[num_local:].detach().reshape(num_local, -1, rep_SD.shape[1]).requires_grad_()
    score_BP = torch.einsum("bd,bpd->bp", query_BD, passage_BPD)
    loss_B = own_passages_loss(score_BP / tau_B1, 1.0, valid_BP)
    assert batch.reference_BP is not None, "stage 1 needs reference similarities"
    reference_BP = torch.from_numpy(batch.reference_BP).to(device)
    reference_B = own_passages_loss(reference_BP / tau_B1, 1.0, valid_BP)

    task_B = torch.from_numpy(batch.task_B).to(device)
    packed_B3 = torch.stack([loss_B.detach().double(), reference_B.double(), task_B.double()], dim=1)
    loss_N, reference_N, task_N = gather_rows(packed_B3).cpu().unbind(1)
    task_N = task_N.long()
    _check_finite(loss_N.sum() + reference_N.sum(), batch, tasks)
    num_tasks = len(tasks.names)
    options = settings.measure_options
    signal_G = signal(
        settings.measure, loss_N, reference_N, task_N, num_tasks, group_rows=settings.group_rows, **options
    )
    present_G = task_counts(task_N, num_tasks) > 0
    weights.update(signal_G, present_G)
    weight_N = row_weights(weights.alpha_G, task_N)
    robust = float((weight_N * loss_N).sum())
    weight_B = row_weights(weights.alpha_G, task_B.cpu(), task_N).to(device)

    (loss_B * weight_B.to(loss_B.dtype)).sum().backward()
    cached.backward(torch.cat([query_BD.grad, passage_BPD.grad.flatten(0, 1)]))
    detail = {
        "signal": signal_G.tolist(),
        "alpha": weights.alpha_G.tolist(),
        "proxy_loss": task_means(loss_N, task_N, num_tasks).tolist(),
        "reference_loss": task_means(reference_N, task_N, num_tasks).tolist(),
    }
    return StepResult(robust, len(task_N), detail)


def _cached_forward(
    backend: Backend, batch: Batch, token_budget: int, pad_id: int, device: torch.device
) -> CachedForward:
    """Agree with all workers on one pass or two and on the number of chunks, or sharded backends would hang."""
    chunks, one_pass = plan_chunks(batch.length_S, token_budget)
    if world()[1] > 1:
        if largest(int(not one_pass), device):
            chunks, one_pass = length_chunks(batch.length_S, token_budget), False
        num_chunks = largest(len(chunks), device)
    else:
        num_chunks = len(chunks)

    def run(chunk: np.ndarray) -> Tensor:
        return backend.module(*to_tensors(batch.ids, batch.offset_S, batch.length_S, chunk, pad_id, device))

    return CachedForward(run, chunks, one_pass, num_chunks, backend.backward)


def _in_batch(query_BD: Tensor, passage_XD: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (row losses (B,), gradient of their sum over *all* workers' losses on this worker's embeddings (S, D))."""
    device = query_BD.device
    keep_X = torch.from_numpy(batch.passage_key_BP.ravel() >= 0).to(device)
    key_X = torch.from_numpy(batch.passage_key_BP.ravel()).to(device)
    local_MD, rank = passage_XD.detach()[keep_X], world()[0]
    sizes = gather_sizes(len(local_MD), device)
    passage_MD = gather_rows(local_MD, sizes).requires_grad_()
    key_M = gather_rows(key_X[keep_X], sizes)
    start = sum(sizes[:rank])
    # Column of each row's positive: its place among this worker's kept passages, after the lower ranks' ones.
    place_X = torch.cumsum(keep_X, 0) - 1
    target_B = start + place_X[:: batch.passage_key_BP.shape[1]]
    positive_key_BK = torch.from_numpy(batch.positive_key_BK).to(device)
    leaf_BD = query_BD.detach().requires_grad_()
    losses = []
    for rows in torch.arange(len(leaf_BD), device=device).split(ROW_BLOCK):
        loss = global_batch_loss(leaf_BD[rows], passage_MD, target_B[rows], key_M, positive_key_BK[rows], temperature)
        loss.sum().backward()
        losses.append(loss.detach())
    passage_gradient_MD = passage_MD.grad if passage_MD.grad is not None else torch.zeros_like(passage_MD)
    gradient_MD = sum_(passage_gradient_MD)[start : start + sizes[rank]]
    gradient_XD = torch.zeros_like(passage_XD).index_put_((keep_X,), gradient_MD.to(passage_XD.dtype))
    query_gradient_BD = leaf_BD.grad if leaf_BD.grad is not None else torch.zeros_like(leaf_BD)
    return torch.cat(losses) if losses else leaf_BD.new_zeros(0), torch.cat([query_gradient_BD, gradient_XD])


def _own_passages(query_BD: Tensor, passage_XD: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """As `_in_batch`, for a task whose other rows are no negatives: each row sees its own passages only."""
    num_local, width = batch.passage_key_BP.shape
    query, passage = query_BD.detach().requires_grad_(), passage_XD.detach().requires_grad_()
    score_BP = torch.einsum("bd,bpd->bp", query, passage.reshape(num_local, width, -1))
    valid_BP = torch.from_numpy(batch.passage_key_BP >= 0).to(query.device)
    loss_B = own_passages_loss(score_BP, temperature, valid_BP)
    loss_B.sum().backward()
    return loss_B.detach(), torch.cat([query.grad, passage.grad])


def _temperatures(batch: Batch, default: float, tasks: TaskSettings, device: torch.device) -> Tensor:
    tau_G = torch.tensor([t or default for t in tasks.temperatures], dtype=torch.float32)
    return tau_G[torch.from_numpy(batch.task_B)].to(device)


def _check_finite(total: Tensor, batch: Batch, tasks: TaskSettings) -> None:
    if not torch.isfinite(total):
        rows = ", ".join(f"{tasks.names[t]}:{r}" for t, r in zip(batch.task_B[:8], batch.row_B[:8], strict=True))
        raise TdroError(
            f"The loss is not finite at step {batch.step}. This worker's rows (task:row): {rows}, … "
            "Lower the learning rate or raise the temperature; the last checkpoint is kept."
        )
