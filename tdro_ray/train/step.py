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
from tdro_ray.model.encoder import to_packed, to_tensors
from tdro_ray.retrieval.chunks import chunk_tokens, graph_tokens, length_chunks
from tdro_ray.retrieval.contrastive import distill_loss, global_batch_loss, own_passages_loss, reverse_loss
from tdro_ray.retrieval.grad_cache import CachedForward, plan_chunks
from tdro_ray.train.backends import Backend
from tdro_ray.train.comm import gather_rows, gather_sizes, largest, sum_, world
from tdro_ray.train.nonfinite import check_finite

LOSS_BLOCK = 1 << 21  # entries of the loss matrix held at a time, so that memory does not grow with the batch


@dataclass(frozen=True)
class TaskSettings:
    """Per-task facts that the loss needs, in the plan's order of tasks."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    temperatures: tuple[float | None, ...]
    in_batch: tuple[bool, ...]
    loss_scales: tuple[float, ...] = ()  # of each task's gradient in stages 0 and 2; (): 1


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself, equal on all workers."""

    loss: float  # mean row loss of the global batch (stages 0, 2); robust loss (stage 1)
    num_rows: int
    detail: dict[str, Any]


def contrastive_step(
    backend: Backend,
    batch: Batch,
    settings: TrainSettings,
    tasks: TaskSettings,
    pad_id: int,
    device: torch.device,
    weights: TaskWeights | None = None,
) -> StepResult:
    """Forward and backward of a homogeneous batch (stages 0 and 2): mean InfoNCE over the global batch's rows.

    With `weights` the gradient is scaled by alpha_g * G of the batch's task g, alpha after an update by its loss:
    online Group DRO (Sagawa et al. 2020, Algorithm 1). The loss that is returned is the unscaled one.
    """
    cached = _cached_forward(backend, batch, settings.token_budget, pad_id, device)
    rep_SD = cached.forward()
    num_local, task = len(batch.task_B), int(batch.task_B[0]) if len(batch.task_B) else 0
    temperature = tasks.temperatures[task] or settings.temperature
    query_BD, passage_XD = rep_SD[:num_local], rep_SD[num_local:]
    if tasks.in_batch[task]:
        loss_B, gradient_SD = _in_batch(query_BD, passage_XD, batch, temperature)
        if settings.symmetric:
            reverse_B, reverse_SD = _reverse(query_BD, passage_XD, batch, temperature)
            loss_B, gradient_SD = (loss_B + reverse_B) / 2, (gradient_SD + reverse_SD) / 2
    else:
        loss_B, gradient_SD = _own_passages(query_BD, passage_XD, batch, temperature)
    if settings.distill and batch.teacher_BP is not None:
        taught_B, taught_SD = _taught(query_BD, passage_XD, batch, temperature, settings.distill_temperature)
        loss_B, gradient_SD = loss_B + settings.distill * taught_B, gradient_SD + settings.distill * taught_SD
    totals = sum_(torch.stack([loss_B.sum(), torch.tensor(float(num_local), dtype=loss_B.dtype, device=device)]))
    check_finite(totals[0], rep_SD, batch, tasks.names)
    mean, detail = float(totals[0] / totals[1]), {"task": tasks.names[task]}
    scale = tasks.loss_scales[task] if tasks.loss_scales else 1.0
    if weights is not None:
        present_G = torch.arange(len(tasks.names)) == task
        scale = float(weights.update(present_G.double() * mean, present_G)[task]) * len(tasks.names)
        detail |= {"alpha": weights.alpha_G.tolist(), "signal": weights.signal_G.tolist()}
    cached.backward(gradient_SD * (scale / totals[1]))
    return StepResult(mean, int(totals[1]), detail)


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
    alpha nor the gradient depends on the number of workers. A batch with a `probe` takes the signal from the probe's
    rows, before the update, and the gradient from its own.
    """
    assert (batch.probe or batch).reference_BP is not None, "stage 1 needs reference similarities"
    signal_N = _losses_of_all(backend, batch.probe, settings, tasks, pad_id, device) if batch.probe else None
    cached = _cached_forward(backend, batch, settings.token_budget, pad_id, device)
    leaf_SD = cached.forward()
    loss_B = _row_losses(leaf_SD, batch, settings, tasks, device)
    own_N = _gathered(loss_B, batch, settings, tasks, device)
    loss_N, reference_N, task_N = signal_N or own_N
    check_finite(loss_N.sum() + reference_N.sum() + own_N[0].sum(), leaf_SD, batch, tasks.names)
    num_tasks = len(tasks.names)
    signal_G = signal(
        settings.measure,
        loss_N,
        reference_N,
        task_N,
        num_tasks,
        group_rows=settings.group_rows,
        sizes_G=torch.tensor(tasks.sizes),
        size_c=settings.size_c,
        **settings.measure_options,
    )
    weights.update(signal_G, task_counts(task_N, num_tasks) > 0)
    robust = float((row_weights(weights.alpha_G, own_N[2]) * own_N[0]).sum())
    weight_B = row_weights(weights.alpha_G, torch.from_numpy(batch.task_B), own_N[2]).to(device)

    (loss_B * weight_B.to(loss_B.dtype)).sum().backward()
    cached.backward(leaf_SD.grad)
    detail = {
        "signal": signal_G.tolist(),
        "alpha": weights.alpha_G.tolist(),
        "proxy_loss": task_means(loss_N, task_N, num_tasks).tolist(),
        "reference_loss": task_means(reference_N, task_N, num_tasks).tolist(),
    }
    return StepResult(robust, len(own_N[2]), detail)


def _losses_of_all(
    backend: Backend, batch: Batch, settings: OptimizeSettings, tasks: TaskSettings, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `_gathered` of a batch that is only measured: nothing is kept for a backward."""
    with torch.no_grad():
        rep_SD = _cached_forward(backend, batch, settings.token_budget, pad_id, device).forward()
        return _gathered(_row_losses(rep_SD, batch, settings, tasks, device), batch, settings, tasks, device)


def _row_losses(
    rep_SD: Tensor, batch: Batch, settings: TrainSettings, tasks: TaskSettings, device: torch.device
) -> Tensor:
    """Return InfoNCE of each row over its own passages (B,)."""
    num_local, width = batch.passage_key_BP.shape
    passage_BPD = rep_SD[num_local:].reshape(num_local, width, -1)
    score_BP = torch.einsum("bd,bpd->bp", rep_SD[:num_local], passage_BPD)
    return _own_loss(score_BP, batch, settings, tasks, device)


def _own_loss(
    score_BP: Tensor, batch: Batch, settings: TrainSettings, tasks: TaskSettings, device: torch.device
) -> Tensor:
    tau_B1 = _temperatures(batch, settings.temperature, tasks, device)[:, None]
    return own_passages_loss(score_BP / tau_B1, 1.0, torch.from_numpy(batch.passage_key_BP >= 0).to(device))


def _gathered(
    loss_B: Tensor, batch: Batch, settings: TrainSettings, tasks: TaskSettings, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (proxy losses, reference losses, tasks) of all workers' rows (N,), on the CPU; zeros without a reference."""
    reference_B = torch.zeros_like(loss_B)
    if batch.reference_BP is not None:
        reference_B = _own_loss(torch.from_numpy(batch.reference_BP).to(device), batch, settings, tasks, device)
    task_B = torch.from_numpy(batch.task_B).to(device)
    packed_B3 = torch.stack([loss_B.detach().double(), reference_B.double(), task_B.double()], dim=1)
    loss_N, reference_N, task_N = gather_rows(packed_B3).cpu().unbind(1)
    return loss_N, reference_N, task_N.long()


def _cached_forward(
    backend: Backend, batch: Batch, token_budget: int, pad_id: int, device: torch.device
) -> CachedForward:
    """Agree with all workers on one pass or two and on the number of chunks, or sharded backends would hang."""
    most = chunk_tokens(token_budget, device.type)
    kept = graph_tokens(token_budget, device.type, getattr(backend.module, "bytes_per_token", 0))
    packed = bool(getattr(backend.module, "packed", False))
    chunks, one_pass = plan_chunks(batch.length_S, kept, most, packed)
    if world()[1] > 1:
        if largest(int(not one_pass), device):
            chunks, one_pass = length_chunks(batch.length_S, most, packed), False
        num_chunks = largest(len(chunks), device)
    else:
        num_chunks = len(chunks)

    def run(chunk: np.ndarray) -> Tensor:
        if packed:
            return backend.module(*to_packed(batch.ids, batch.offset_S, batch.length_S, chunk, device))
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
    for rows in torch.arange(len(leaf_BD), device=device).split(max(1, LOSS_BLOCK // max(1, len(passage_MD)))):
        loss = global_batch_loss(leaf_BD[rows], passage_MD, target_B[rows], key_M, positive_key_BK[rows], temperature)
        loss.sum().backward()
        losses.append(loss.detach())
    passage_gradient_MD = passage_MD.grad if passage_MD.grad is not None else torch.zeros_like(passage_MD)
    gradient_MD = sum_(passage_gradient_MD)[start : start + sizes[rank]]
    gradient_XD = torch.zeros_like(passage_XD).index_put_((keep_X,), gradient_MD.to(passage_XD.dtype))
    query_gradient_BD = leaf_BD.grad if leaf_BD.grad is not None else torch.zeros_like(leaf_BD)
    return torch.cat(losses) if losses else leaf_BD.new_zeros(0), torch.cat([query_gradient_BD, gradient_XD])


def _reverse(query_BD: Tensor, passage_XD: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """As `_in_batch`, from each row's positive to the queries of all workers."""
    device, rank = query_BD.device, world()[0]
    num_local, width = batch.passage_key_BP.shape
    sizes = gather_sizes(num_local, device)
    start = sum(sizes[:rank])
    query_ND = gather_rows(query_BD.detach(), sizes).requires_grad_()
    # Workers pad positives to their own most: agree on one width before they are gathered.
    most = largest(batch.positive_key_BK.shape[1], device)
    padded_BK = np.full((num_local, most), -1, np.int64)
    padded_BK[:, : batch.positive_key_BK.shape[1]] = batch.positive_key_BK
    positive_key_NK = gather_rows(torch.from_numpy(padded_BK).to(device), sizes)
    key_B = torch.from_numpy(batch.passage_key_BP[:, 0].copy()).to(device)
    target_B = start + torch.arange(num_local, device=device)
    leaf_BD = passage_XD.detach()[::width].clone().requires_grad_()
    losses = [leaf_BD.new_zeros(0)]
    for rows in torch.arange(num_local, device=device).split(max(1, LOSS_BLOCK // max(1, len(query_ND) * most))):
        loss = reverse_loss(leaf_BD[rows], query_ND, target_B[rows], key_B[rows], positive_key_NK, temperature)
        loss.sum().backward()
        losses.append(loss.detach())
    query_gradient_ND = query_ND.grad if query_ND.grad is not None else torch.zeros_like(query_ND)
    gradient_BD = sum_(query_gradient_ND)[start : start + num_local].to(query_BD.dtype)
    gradient_XD = torch.zeros_like(passage_XD)
    if leaf_BD.grad is not None:
        gradient_XD[::width] = leaf_BD.grad.to(passage_XD.dtype)
    return torch.cat(losses), torch.cat([gradient_BD, gradient_XD])


def _own_passages(query_BD: Tensor, passage_XD: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """As `_in_batch`, for a task whose other rows are no negatives: each row sees its own passages only."""
    num_local, width = batch.passage_key_BP.shape
    query, passage = query_BD.detach().requires_grad_(), passage_XD.detach().requires_grad_()
    score_BP = torch.einsum("bd,bpd->bp", query, passage.reshape(num_local, width, -1))
    valid_BP = torch.from_numpy(batch.passage_key_BP >= 0).to(query.device)
    loss_B = own_passages_loss(score_BP, temperature, valid_BP)
    loss_B.sum().backward()
    return loss_B.detach(), torch.cat([query.grad, passage.grad])


def _taught(
    query_BD: Tensor, passage_XD: Tensor, batch: Batch, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """As `_own_passages`, from the teacher's scores of each row's own passages."""
    query, passage = query_BD.detach().requires_grad_(), passage_XD.detach().requires_grad_()
    score_BP = torch.einsum("bd,bpd->bp", query, passage.reshape(*batch.passage_key_BP.shape, -1))
    teacher_BP = torch.from_numpy(batch.teacher_BP).to(query.device, query.dtype)
    loss_B = distill_loss(score_BP, teacher_BP, temperature, teacher_temperature)
    loss_B.sum().backward()
    return loss_B.detach(), torch.cat([query.grad, passage.grad])


def _temperatures(batch: Batch, default: float, tasks: TaskSettings, device: torch.device) -> Tensor:
    tau_G = torch.tensor([t or default for t in tasks.temperatures], dtype=torch.float32)
    return tau_G[torch.from_numpy(batch.task_B)].to(device)
