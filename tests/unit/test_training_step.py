"""Gradients by equality: chunked = whole, one worker = several, ours = a naive loss written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training import TASKS, dropout_model, free_port, global_batch, leave, probed_batch, share_of

from tdro_ray.config import OptimizeSettings, TrainSettings
from tdro_ray.dro.weights import TaskWeights
from tdro_ray.train.backends import Replicated
from tdro_ray.train.comm import sum_
from tdro_ray.train.step import contrastive_step, dro_step

CPU = torch.device("cpu")
BIG, SMALL = 100_000, 40  # token budgets: one pass, many chunks


def run_step(
    batch, budget, dropout=0.0, temperature=0.2, measure="ratio", weights=None, group_dro=False, symmetric=False
):
    """Return (loss, flat gradient summed over workers, detail) of one step in float64."""
    backend = Replicated(dropout_model(torch.float64, dropout), TrainSettings())
    torch.manual_seed(11)
    if batch.reference_BP is None and batch.probe is None:
        settings = TrainSettings(temperature=temperature, token_budget=budget, symmetric=symmetric)
        online = TaskWeights(3, 0.3, float("inf"), absent="zero") if group_dro else None
        result = contrastive_step(backend, batch, settings, TASKS, 0, CPU, online)
    else:
        settings = OptimizeSettings(
            temperature=temperature, token_budget=budget, measure=measure, eta=0.5, group_rows=4
        )
        weights = weights or TaskWeights(3, settings.eta)
        result = dro_step(backend, weights, batch, settings, TASKS, 0, CPU)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in backend.parameters])
    return result.loss, sum_(flat.clone()), result.detail


def assert_close(a, b, relative=1e-9):
    assert a[0] == pytest.approx(b[0], rel=relative)
    scale = b[1].norm()
    assert scale > 1e-3
    assert (a[1] - b[1]).norm() <= relative * scale


@pytest.mark.parametrize("task", [0, 1, 2, None])
def test_chunks_give_the_gradient_of_one_forward(task):
    batch = global_batch(9, 3, task)
    assert_close(run_step(batch, SMALL), run_step(batch, BIG))


@pytest.mark.parametrize("task", [0, None])
def test_two_passes_replay_dropout(task):
    """With dropout the cached gradient equals the gradient of the very same chunks with the graph kept."""
    import tdro_ray.train.step as step

    batch = global_batch(9, 3, task)
    cached = run_step(batch, SMALL, dropout=0.3)
    real = step.plan_chunks
    try:
        step.plan_chunks = lambda *sizes: (real(*sizes)[0], True)
        kept = run_step(batch, SMALL, dropout=0.3)
    finally:
        step.plan_chunks = real
    assert_close(cached, kept)


def naive_gradient(batch, temperature, symmetric=False):
    """The homogeneous loss written out row by row, by autograd through one forward per sequence."""
    model = dropout_model(torch.float64, 0.0)
    sequences = np.split(batch.ids, np.cumsum(batch.length_S)[:-1])
    rep = torch.cat(
        [model(torch.from_numpy(s.astype(np.int64))[None], torch.ones(1, len(s), dtype=torch.long)) for s in sequences]
    )
    num_rows, width = batch.passage_key_BP.shape
    keys, total = batch.passage_key_BP, 0.0
    for i in range(num_rows):
        terms = []
        for j in range(num_rows if TASKS.in_batch[batch.task_B[0]] else 1):
            row = j if TASKS.in_batch[batch.task_B[0]] else i
            for p in range(width):
                own = (row, p) == (i, 0)
                if keys[row, p] == -1 or (
                    TASKS.in_batch[batch.task_B[0]] and not own and keys[row, p] in batch.positive_key_BK[i]
                ):
                    continue
                terms.append(rep[i] @ rep[num_rows + row * width + p] / temperature)
        positive = rep[i] @ rep[num_rows + i * width] / temperature
        loss = torch.logsumexp(torch.stack(terms), 0) - positive
        if symmetric:
            others = [j for j in range(num_rows) if j == i or keys[i, 0] not in batch.positive_key_BK[j]]
            back = torch.stack([rep[j] @ rep[num_rows + i * width] / temperature for j in others])
            loss = (loss + torch.logsumexp(back, 0) - positive) / 2
        total = total + loss
    (total / num_rows).backward()
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])
    return total.item() / num_rows, flat


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_loss_is_infonce_with_equal_passages_masked(task):
    batch = global_batch(7, 3, task)
    temperature = TASKS.temperatures[task] or 0.2
    ours, naive = run_step(batch, BIG), naive_gradient(batch, temperature)
    assert_close(ours, naive)


def test_the_symmetric_loss_is_the_mean_of_both_directions():
    batch = global_batch(9, 3, 0)
    keys, positives = batch.passage_key_BP[:, 0], batch.positive_key_BK
    assert any(keys[i] in positives[j] for i in range(9) for j in range(9) if i != j)  # something is masked
    ours = run_step(batch, SMALL, symmetric=True)
    assert_close(ours, naive_gradient(batch, 0.2, symmetric=True))
    assert abs(ours[0] - run_step(batch, SMALL)[0]) > 1e-3


def _worker(rank, num_workers, port, cases, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers)
    torch.set_num_threads(1)
    results = [run_step(share_of(batch, rank, num_workers), budget, **how) for batch, budget, how in cases]
    if rank == 0:
        torch.save([(loss, grad, detail) for loss, grad, detail in results], out)
    leave()


@pytest.mark.parametrize("num_workers", [2, 4])
def test_the_number_of_workers_changes_nothing(tmp_path, num_workers):
    """Loss, every gradient, and in stage 1 alpha; uneven shares, and workers whose chunk counts differ."""
    cases = [(global_batch(9, 3, task), budget, {}) for task in (0, 1, 2, None) for budget in (BIG, SMALL)]
    cases += [(probed_batch(9, 3, 7), budget, {}) for budget in (BIG, SMALL)]
    cases += [(global_batch(9, 3, 1), BIG, {"group_dro": True}), (global_batch(9, 3, 0), SMALL, {"symmetric": True})]
    mp.spawn(_worker, (num_workers, free_port(), cases, tmp_path / "out.pt"), nprocs=num_workers)
    for (batch, budget, how), found in zip(cases, torch.load(tmp_path / "out.pt", weights_only=False), strict=True):
        alone = run_step(batch, budget, **how)
        assert_close(found, alone)
        if "alpha" in found[2]:
            np.testing.assert_allclose(found[2]["alpha"], alone[2]["alpha"], rtol=1e-12)
            np.testing.assert_allclose(found[2]["signal"], alone[2]["signal"], rtol=1e-12)


@pytest.mark.parametrize("measure", ["ratio", "official", "excess", "plain", "log_ratio"])
def test_the_robust_loss_is_under_the_weights_after_the_update(measure):
    batch = global_batch(12, 3, None)
    weights = TaskWeights(3, 0.5)
    loss, _, detail = run_step(batch, BIG, measure=measure, weights=weights)
    assert detail["alpha"] == weights.alpha_G.tolist()
    alpha_N = weights.alpha_G[torch.from_numpy(batch.task_B)]
    means = {g: m for g, m in enumerate(detail["proxy_loss"])}
    expected = sum(float(a) * means[t] for a, t in zip(alpha_N, batch.task_B)) / float(alpha_N.sum())
    assert loss == pytest.approx(expected, rel=1e-6)  # alpha is constant within a task: the mean stands for its rows


def test_a_loss_that_is_not_finite_stops_with_step_task_and_rows():
    from tdro_ray.errors import TdroError

    batch = replace(global_batch(6, 2, None), reference_BP=np.full((6, 2), np.nan, np.float32), step=17)
    with pytest.raises(TdroError, match=r"not finite at step 17.*[abc]:0"):
        run_step(batch, BIG)


def test_the_signal_is_of_the_probe_and_the_gradient_of_the_batch():
    batch = probed_batch(9, 3, 7)
    weights, probed = TaskWeights(3, 0.5), TaskWeights(3, 0.5)
    _, gradient, detail = run_step(batch, BIG, weights=weights)
    measured = run_step(batch.probe, BIG, weights=probed)[2]
    np.testing.assert_allclose(detail["signal"], measured["signal"], rtol=1e-12)
    assert (weights.alpha_G - 1 / 3).abs().max() > 0.01
    # The same gradient as of the batch alone under those weights, held still.
    held = TaskWeights(3, 0.0, initial=weights.alpha_G)
    alone = replace(
        batch, reference_BP=np.zeros_like(batch.probe.reference_BP, shape=batch.passage_key_BP.shape), probe=None
    )
    assert_close((1.0, gradient), (1.0, run_step(alone, BIG, weights=held)[1]))


def test_group_dro_scales_the_gradient_by_the_tasks_weight_after_its_own_loss():
    batch = global_batch(9, 3, 1)
    loss, plain, _ = run_step(batch, BIG)
    same, scaled, detail = run_step(batch, BIG, group_dro=True)
    grown = np.exp(0.3 * loss)  # Algorithm 1: the task's weight times exp(eta * loss), then normalised
    assert same == loss
    np.testing.assert_allclose(detail["alpha"], np.array([1, grown, 1]) / (2 + grown), rtol=1e-9)
    # Qwen2's RMSNorm works in float32 whatever the model's type: a scaled gradient is rounded otherwise there.
    assert_close((1.0, scaled), (1.0, plain * 3 * detail["alpha"][1]), relative=1e-6)


def test_loss_scales_multiply_a_tasks_gradient():
    batch = global_batch(9, 3, 1)
    backend = Replicated(dropout_model(torch.float64, 0.0), TrainSettings())
    torch.manual_seed(11)
    tasks = replace(TASKS, loss_scales=(1.0, 2.5, 0.0))
    contrastive_step(backend, batch, TrainSettings(temperature=0.2, token_budget=BIG), tasks, 0, CPU)
    flat = torch.cat([p.grad.flatten() for p in backend.parameters if p.grad is not None])
    assert float(flat.norm()) == pytest.approx(2.5 * float(run_step(batch, BIG)[1].norm()), rel=1e-6)
