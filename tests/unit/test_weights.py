"""The update of the task weights: invariants, absent tasks, exact resume, schedule, and the tests on where alpha went."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdro_ray.dro.weights import (
    TaskWeights,
    collapsed,
    converged,
    effective_tasks,
    eta_at,
    row_weights,
    tail_mean,
    weight_shift,
)
from tdro_ray.errors import CheckpointError, ConfigError, TdroError

signals = st.lists(st.lists(st.floats(-100, 100), min_size=4, max_size=4), min_size=1, max_size=12)


def run(rounds: list[list[float]], **options: object) -> TaskWeights:
    weights = TaskWeights(4, eta=0.3, **options)
    for signal_G in rounds:
        weights.update(torch.tensor(signal_G))
    return weights


@settings(deadline=None, max_examples=50)
@given(rounds=signals, order=st.permutations(range(4)))
def test_permuting_tasks_permutes_weights(rounds: list[list[float]], order: list[int]) -> None:
    weights, permuted = run(rounds), run([[s[i] for i in order] for s in rounds])
    for name in ("alpha_G", "mean_G", "ema_G"):
        torch.testing.assert_close(getattr(permuted, name), getattr(weights, name)[order])


@settings(deadline=None, max_examples=50)
@given(rounds=signals, floor=st.sampled_from([0.0, 0.05, 0.5]), momentum=st.sampled_from([0.0, 0.9]))
def test_weights_sum_to_one_and_respect_the_floor(rounds: list[list[float]], floor: float, momentum: float) -> None:
    weights = run([r * 1 for r in rounds] * 5, floor=floor, momentum=momentum)
    for value in (weights.alpha_G, weights.mean_G, weights.ema_G):
        assert value.sum().item() == pytest.approx(1, abs=1e-12)
        assert value.min().item() >= floor / 4 - 1e-15


@settings(deadline=None, max_examples=50)
@given(rounds=signals)
def test_equal_tasks_stay_equal(rounds: list[list[float]]) -> None:
    weights = run([[s[0], s[1], s[0], s[1]] for s in rounds])
    alpha = weights.alpha_G.tolist()
    assert alpha[0] == alpha[2] and alpha[1] == alpha[3]
    same = run([[s[0]] * 4 for s in rounds])
    assert same.alpha_G.tolist() == pytest.approx([0.25] * 4, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(rounds=signals, cut=st.integers(0, 12), momentum=st.sampled_from([0.0, 0.9]))
def test_resumed_is_uninterrupted_to_the_last_bit(rounds: list[list[float]], cut: int, momentum: float) -> None:
    present = [torch.tensor([True, i % 2 == 0, i % 3 == 0, False]) for i in range(len(rounds))]
    whole, first = (TaskWeights(4, 0.3, momentum=momentum) for _ in range(2))
    for signal_G, present_G in zip(rounds, present, strict=True):
        whole.update(torch.tensor(signal_G), present_G)
    for signal_G, present_G in zip(rounds[:cut], present[:cut], strict=True):
        first.update(torch.tensor(signal_G), present_G)
    second = TaskWeights(4, 0.3, momentum=momentum)
    second.load_state_dict(first.state_dict())
    for signal_G, present_G in zip(rounds[cut:], present[cut:], strict=True):
        second.update(torch.tensor(signal_G), present_G)
    for name in ("alpha_G", "mean_G", "ema_G", "signal_G"):
        assert torch.equal(getattr(second, name), getattr(whole, name)), name
    assert second.num_updates == whole.num_updates


def test_one_update_by_hand() -> None:
    weights = TaskWeights(2, eta=0.5)
    alpha = weights.update(torch.tensor([3.0, 4.0]))  # 2-norm 5, clipped to [0.6, 0.8]
    up = math.exp(0.5 * 0.8) / (math.exp(0.5 * 0.6) + math.exp(0.5 * 0.8))
    assert alpha.tolist() == pytest.approx([1 - up, up])
    assert weights.mean_G.tolist() == pytest.approx([1 - up, up])  # the initial value does not count
    assert weights.ema_G.tolist() == pytest.approx([0.9 * 0.5 + 0.1 * (1 - up), 0.9 * 0.5 + 0.1 * up])
    assert weights.signal_G.tolist() == [3.0, 4.0]  # before clipping
    assert TaskWeights(2, 0.5).update(torch.tensor([0.3, 0.4]))[1] == pytest.approx(1 / (1 + math.exp(-0.05)))


def test_momentum_adds_earlier_signals() -> None:
    weights = TaskWeights(2, eta=1.0, momentum=0.5)
    for _ in range(2):
        weights.update(torch.tensor([1.0, 0.0]))
    assert weights.alpha_G[0] == pytest.approx(1 / (1 + math.exp(-(1 + 1.5))))


def test_absent_tasks_carry_their_last_signal_or_lose_weight() -> None:
    first, later = torch.tensor([0.3, 0.3, 0.3]), torch.tensor([0.3, 0.3, 0.0])
    present = torch.tensor([True, True, False])
    carry, zero = TaskWeights(3, 1.0, absent="carry"), TaskWeights(3, 1.0, absent="zero")
    for weights in (carry, zero):
        weights.update(first)
        for _ in range(5):
            weights.update(later, present)
    assert carry.alpha_G.tolist() == pytest.approx([1 / 3] * 3)
    assert zero.alpha_G[2] < 0.2


def test_a_task_never_seen_is_neutral_until_its_first_row() -> None:
    weights = TaskWeights(3, 1.0)
    weights.update(torch.tensor([0.1, 0.3, math.nan]), torch.tensor([True, True, False]))
    assert weights.signal_G.tolist() == pytest.approx([0.1, 0.3, 0.2])
    weights.update(torch.tensor([0.1, 0.3, 0.9]))
    assert weights.signal_G.tolist() == pytest.approx([0.1, 0.3, 0.9])


def test_held_updates_note_signals_and_leave_the_mean_alone() -> None:
    weights = TaskWeights(2, eta=0.0)
    for _ in range(10):
        weights.update(torch.tensor([1.0, 0.0]))
    assert weights.alpha_G.tolist() == [0.5, 0.5] and weights.num_updates == 0
    weights.eta = 0.5
    weights.update(torch.tensor([0.0, 0.0]), torch.tensor([False, True]))  # carried from the held steps
    assert torch.equal(weights.mean_G, weights.alpha_G)
    assert weights.alpha_G[0] > 0.5


def test_a_collapsed_weight_can_come_back() -> None:
    weights = TaskWeights(2, eta=1000.0)
    weights.update(torch.tensor([1.0, 0.0]))
    assert weights.alpha_G[1] < 1e-300
    weights.update(torch.tensor([0.0, 1.0]))
    weights.update(torch.tensor([0.0, 1.0]))
    assert weights.alpha_G[1] > 0.99


def test_bad_signals_and_settings_are_refused_and_change_nothing() -> None:
    weights = TaskWeights(2, 0.1)
    with pytest.raises(TdroError, match="task number 1 is not finite"):
        weights.update(torch.tensor([1.0, math.nan]))
    assert weights.alpha_G.tolist() == [0.5, 0.5] and weights.signal_G.tolist() == [0, 0]
    with pytest.raises(ConfigError, match="can never grow"):
        TaskWeights(2, 0.1, initial=torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match="'carry'"):
        TaskWeights(2, 0.1, absent="cary")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="floor"):
        TaskWeights(2, 0.1, floor=1.0)
    with pytest.raises(CheckpointError, match="2 tasks, this run has 3"):
        TaskWeights(3, 0.1).load_state_dict(weights.state_dict())
    with pytest.raises(CheckpointError, match="lacks ema"):
        weights.load_state_dict({k: v for k, v in weights.state_dict().items() if k != "ema"})


def test_initial_weights_are_normalised() -> None:
    assert TaskWeights(2, 0.1, initial=torch.tensor([3.0, 1.0])).alpha_G.tolist() == pytest.approx([0.75, 0.25])


def test_row_weights_sum_to_one_over_the_global_batch_however_it_is_split() -> None:
    alpha, task = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0, 1, 1, 2, 0, 2, 2])
    whole = row_weights(alpha, task)
    assert whole.sum().item() == pytest.approx(1)
    assert (whole[0] / whole[1]).item() == pytest.approx(3.5)
    split = torch.cat([row_weights(alpha, part, task) for part in (task[:3], task[3:])])
    assert torch.equal(split, whole)


def test_eta_schedules() -> None:
    assert [eta_at(s, 4, 1.0) for s in range(4)] == [1.0] * 4
    assert [eta_at(s, 4, 1.0, "linear") for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [eta_at(s, 4, 1.0, "cosine") for s in (0, 2)] == pytest.approx([1, 0.5])
    assert [eta_at(s, 10, 1.0, "linear", hold=0.5) for s in (0, 4, 5, 6)] == pytest.approx([0, 0, 1, 0.8])
    with pytest.raises(ConfigError, match="'cosine'"):
        eta_at(0, 1, 1.0, "cosin")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hold"):
        eta_at(0, 1, 1.0, hold=1.0)


def test_effective_tasks_and_the_collapse_alarm() -> None:
    assert effective_tasks(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert effective_tasks(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert collapsed(torch.tensor([0.98, 0.01, 0.01]))
    assert not collapsed(torch.tensor([0.6, 0.4])) and not collapsed(torch.tensor([1.0]))


def line(alphas: list[float]) -> Tensor:
    return torch.tensor([[a, 1 - a] for a in alphas])


def test_convergence_is_seen_when_weights_stop_and_not_while_they_drift() -> None:
    moving, settled = [0.5 + 0.02 * s for s in range(20)], [0.9] * 10
    assert not converged(line(moving), tolerance=0.05, window=5)
    assert converged(line(moving + settled), tolerance=0.05, window=5)
    assert not converged(line(settled[:9]), tolerance=0.05, window=5)  # too short to tell
    assert weight_shift(line([0.5, 0.5, 0.8, 0.8]), window=2) == pytest.approx(0.3)
    # a steady drift is not taken for rest, however long the run: the running mean would move only 1/S a step
    assert not converged(line([0.1 + 0.0004 * s for s in range(2000)]), tolerance=0.01, window=50)


def test_tail_mean_leaves_the_first_part_out() -> None:
    assert tail_mean(line([0.0, 0.0, 0.4, 0.6]), 0.5).tolist() == pytest.approx([0.5, 0.5])
    assert tail_mean(line([0.0, 0.4, 0.6]), 0.01).tolist() == pytest.approx([0.6, 0.4])
