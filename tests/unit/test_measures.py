"""Each measure against its equation written out in plain Python, and what its options change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdro_ray.config import MEASURE_OPTIONS
from tdro_ray.dro.measures import MEASURES, measure_options, official, signal, size_adjustment
from tdro_ray.errors import ConfigError

PROXY = torch.tensor([1.0, 3.0, 0.5, 0.1, 0.2])
REFERENCE = torch.tensor([2.0, 2.0, 1.0, 0.2, 0.0])
TASK = torch.tensor([0, 0, 1, 2, 2])  # task 3 has no row


def measured(name: str, **options: object) -> list[float]:
    return MEASURES[name](PROXY, REFERENCE, TASK, 4, **options).tolist()


def test_each_measure_is_its_equation() -> None:
    assert measured("plain") == pytest.approx([2.0, 0.5, 0.15, 0])
    assert measured("excess") == pytest.approx([0.5, 0, 0.1, 0])  # rows: max(0, -1), max(0, 1); ...; max(0, -0.1), 0.2
    assert measured("ratio") == pytest.approx([1.0, 0.5, 1.5, 0])  # 0.15 / 0.1
    assert measured("log_ratio") == pytest.approx([0, math.log(0.5), math.log(1.5), 0], abs=1e-7)
    # shares of the sum 5.2; the last row's share 0 is replaced by 1
    assert measured("official") == pytest.approx([(1 + 3) / 2 * 5.2 / 2, 0.5 * 5.2, (0.1 * 5.2 / 0.2 + 0.2) / 2, 0])


def test_official_options() -> None:
    norm = math.sqrt(4 + 4 + 1 + 0.04)
    assert measured("official", p_norm=2)[:2] == pytest.approx([2 * norm / 2, 0.5 * norm])
    # 1 / 5.2 = 0.19 is below a cut-off of 0.2, so task 1 keeps its bare loss
    assert measured("official", cutoff=0.2)[1] == pytest.approx(0.5)


def test_official_averages_groups_and_counts_an_absent_task_as_zero_there() -> None:
    whole = measured("official", group_rows=2)  # groups: task 0 | tasks 1, 2 | task 2 alone, with reference 0
    assert whole == pytest.approx([(1 + 3) / 2 * 4 / 2 / 3, 0.5 * 1.2 / 3, (0.1 * 1.2 / 0.2 + 0.2) / 3, 0])
    assert signal("official", PROXY, REFERENCE, TASK, 4, group_rows=2).tolist() == whole


def test_interleaved_groups_hold_every_task_of_a_batch_in_task_order() -> None:
    """Four equal copies of a batch, laid out task by task: each group gets one copy, so the signal is the copy's."""
    proxy_loss, reference_loss, task = (x[:4].repeat_interleave(4) for x in (PROXY, REFERENCE, TASK))
    dealt = official(proxy_loss, reference_loss, task, 4, group_rows=4, interleaved=True)
    torch.testing.assert_close(dealt, official(PROXY[:4], REFERENCE[:4], TASK[:4], 4))
    consecutive = official(proxy_loss, reference_loss, task, 4, group_rows=4)
    assert not torch.allclose(consecutive, dealt)


def test_only_official_looks_at_groups() -> None:
    for name in MEASURES:
        same = torch.equal(
            signal(name, PROXY, REFERENCE, TASK, 4, group_rows=1), signal(name, PROXY, REFERENCE, TASK, 4)
        )
        assert same == (name != "official"), name


@pytest.mark.parametrize("name", MEASURES)
def test_zero_reference_losses_give_finite_signals(name: str) -> None:
    for proxy_loss in (torch.zeros(3), torch.ones(3)):
        signal_G = MEASURES[name](proxy_loss, torch.zeros(3), torch.tensor([0, 0, 1]), 3)
        assert torch.isfinite(signal_G).all()
        assert signal_G[2] == 0
    with_floor = MEASURES["ratio"](torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.long), 1, floor=0.5)
    assert with_floor.tolist() == [2.0]


def test_ratio_mends() -> None:
    mean = 5.2 / 5  # smooth is in units of the batch's mean reference loss
    assert measured("ratio", smooth=1.0) == pytest.approx([2 / (2 + mean), 0.5 / (1 + mean), 0.15 / (0.1 + mean), 0])
    both = measured("ratio", smooth=1.0, smooth_both=True)
    assert both[:2] == pytest.approx([(2 + mean) / (2 + mean), (0.5 + mean) / (1 + mean)])
    assert measured("ratio", over="rows")[:2] == pytest.approx([(0.5 + 1.5) / 2, 0.5])
    assert measured("ratio", over="rows")[2] > 1e6  # 0.2 / floor
    assert measured("ratio", over="rows", row_clip=2.0) == pytest.approx([1.0, 0.5, (0.5 + 2) / 2, 0])
    with pytest.raises(ConfigError, match="over='rows'"):
        measured("ratio", row_clip=2.0)


def test_smoothing_takes_a_solved_task_out_of_the_ratio() -> None:
    """Losses of 1e-3 against 2e-4: a ratio of 5, above any other, though nothing is left to learn."""
    proxy_loss, reference_loss, task = torch.tensor([1e-3, 3.0]), torch.tensor([2e-4, 1.5]), torch.tensor([0, 1])
    assert MEASURES["ratio"](proxy_loss, reference_loss, task, 2).argmax() == 0
    smoothed = MEASURES["ratio"](proxy_loss, reference_loss, task, 2, smooth=0.1)
    assert smoothed[1] > 1.5 and smoothed[0] < 0.05
    assert MEASURES["log_ratio"](proxy_loss, reference_loss, task, 2, smooth=0.1)[0] < 0.05


def test_excess_of_means_averages_chance_out() -> None:
    """Two models that differ by chance only: the positive halves of row differences remain, the means cancel."""
    noise = torch.Generator().manual_seed(0)
    proxy_loss, reference_loss = (2 + torch.rand(4000, generator=noise) for _ in range(2))
    task = torch.zeros(4000, dtype=torch.long)
    assert MEASURES["excess"](proxy_loss, reference_loss, task, 1).item() > 0.15
    assert MEASURES["excess"](proxy_loss, reference_loss, task, 1, clip_at="task").item() < 0.02
    assert measured("excess", clip_at="task") == pytest.approx([0, 0, 0.05, 0])
    assert measured("excess", clip_at="none") == pytest.approx([0, -0.5, 0.05, 0])
    assert measured("excess", normalise=True, smooth=1.0)[0] == pytest.approx(0.5 / (2 + 5.2 / 5))


def test_signed_normalised_excess_is_the_ratio_smoothed_on_both_sides_less_one() -> None:
    excess_G = measured("excess", clip_at="none", normalise=True, smooth=0.5)
    ratio_G = measured("ratio", smooth=0.5, smooth_both=True)
    assert [r - 1 for r in ratio_G[:3]] == pytest.approx(excess_G[:3])


def test_where_proxy_and_reference_agree_a_smoothed_denominator_alone_ranks_by_loss() -> None:
    loss, task = torch.tensor([0.01, 1.0, 5.0]), torch.arange(3)
    denominator = MEASURES["ratio"](loss, loss, task, 3, smooth=1.0)
    assert denominator.argmax() == 2 and denominator.argmin() == 0
    both = MEASURES["ratio"](loss, loss, task, 3, smooth=1.0, smooth_both=True)
    assert both.tolist() == pytest.approx([1, 1, 1])


def test_size_adjustment_adds_to_small_tasks_that_are_present() -> None:
    sizes = torch.tensor([100, 400, 25, 4])
    assert size_adjustment(sizes, 2.0).tolist() == pytest.approx([0.2, 0.1, 0.4, 1.0])
    adjusted = signal("plain", PROXY, REFERENCE, TASK, 4, sizes_G=sizes, size_c=2.0)
    assert adjusted.tolist() == pytest.approx([2.2, 0.6, 0.55, 0])


def test_messages_name_the_mend() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ratio'"):
        signal("rato", PROXY, REFERENCE, TASK, 4)
    with pytest.raises(ConfigError, match="Did you mean 'smooth'"):
        signal("ratio", PROXY, REFERENCE, TASK, 4, smoth=1)
    with pytest.raises(ConfigError, match="needs sizes_G"):
        signal("plain", PROXY, REFERENCE, TASK, 4, size_c=1.0)


def test_the_settings_know_the_options_of_every_measure() -> None:
    """`group_rows` is a setting of its own."""
    assert {m: tuple(o for o in measure_options(m) if o != "group_rows") for m in MEASURES} == MEASURE_OPTIONS


losses = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20), st.integers(0, 3)), min_size=1, max_size=60)


def tensors(rows: list[tuple[float, float, int]]) -> tuple[Tensor, Tensor, Tensor]:
    proxy_loss, reference_loss, task = zip(*rows, strict=True)
    return torch.tensor(proxy_loss), torch.tensor(reference_loss), torch.tensor(task)


@settings(deadline=None, max_examples=50)
@given(rows=losses, order=st.permutations(range(5)))
@pytest.mark.parametrize("name", MEASURES)
def test_renaming_tasks_renames_signals_and_absent_tasks_have_none(name: str, rows: list, order: list[int]) -> None:
    proxy_loss, reference_loss, task = tensors(rows)
    signal_G = MEASURES[name](proxy_loss, reference_loss, task, 5)
    renamed = MEASURES[name](proxy_loss, reference_loss, torch.tensor(order)[task], 5)
    torch.testing.assert_close(renamed[torch.tensor(order)], signal_G)
    assert torch.isfinite(signal_G).all() and signal_G.dtype == torch.float64
    assert all(signal_G[g] == 0 for g in range(5) if g not in task.tolist())


@settings(deadline=None, max_examples=50)
@given(rows=losses, seed=st.integers(0, 1000))
@pytest.mark.parametrize("name", MEASURES)
def test_order_of_rows_does_not_matter_within_a_group(name: str, rows: list, seed: int) -> None:
    columns = tensors(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    shuffled = MEASURES[name](*(c[order] for c in columns), 4)
    torch.testing.assert_close(shuffled, MEASURES[name](*columns, 4), rtol=1e-9, atol=1e-12)
