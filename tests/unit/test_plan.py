import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdro_ray.data.plan import Fold, Plan, draw_negatives, fold_numbers, shares
from tdro_ray.errors import ConfigError

weights = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30).filter(lambda w: sum(w) > 1e-3)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(1, 400), st.integers(0, 5))
def test_every_prefix_is_within_one_batch_of_the_weights(w, num_steps, seed):
    plan = Plan([7] * len(w), w, num_steps, 3, seed)
    share = np.array(w) / sum(w)
    count = np.zeros(len(w))
    for s in range(num_steps):
        ((task, _),) = plan.step(s)
        count[task] += 1
        assert np.abs(count - share * (s + 1)).max() < 1
    assert (plan.counts() == count).all()


def test_every_pass_uses_every_row_once_and_passes_differ():
    plan = Plan([10, 4], [0.5, 0.5], 20, 2, seed=1)
    stream = np.concatenate([rows for s in range(20) for task, rows in plan.step(s) if task == 0])
    passes = [tuple(stream[i : i + 10]) for i in range(0, 20, 10)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1]


def test_any_step_is_the_same_without_replay_and_for_a_longer_plan():
    long, short = Plan([50, 2000], None, 40, 16, 9, "stratified"), Plan([50, 2000], None, 8, 16, 9, "stratified")
    for s in (7, 0, 3):
        for a, b in zip(long.rows(s), short.rows(s)):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 20))
def test_stratified_steps_hold_equal_shares(num_tasks, batch_size, num_steps):
    plan = Plan([5] * num_tasks, None, num_steps, batch_size, 0, "stratified")
    total = np.zeros(num_tasks, int)
    for s in range(num_steps):
        counts = np.bincount(plan.rows(s)[0], minlength=num_tasks)
        assert counts.sum() == batch_size
        assert counts.max() - counts.min() <= 1
        total += counts
        assert total.max() - total.min() <= 1
    assert (plan.counts() == total).all()


def test_a_batch_larger_than_its_task_repeats_rows():
    ((_, rows),) = Plan([3], [1.0], 1, 7, 0).step(0)
    assert np.bincount(rows).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_small_and_huge_tasks_share_a_plan():
    plan = Plan([200, 2_000_000], [0.5, 0.5], 100, 64, 0)
    assert plan.counts().tolist() == [50, 50]
    seen = np.concatenate([rows for s in range(100) for task, rows in plan.step(s) if task == 1])
    assert len(set(seen)) == 3200


@given(st.integers(0, 100), st.integers(1, 9))
def test_workers_shares_cover_the_batch_once(num_rows, num_workers):
    parts = [list(range(num_rows))[part] for part in shares(num_rows, num_workers)]
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_negatives_are_distinct_where_there_are_enough_and_minus_one_where_there_is_none():
    drawn = draw_negatives([7, 2, 0, 3], 3, 5, 11, slice(0, 4), 4)
    assert len(set(drawn[0])) == 3 and drawn[0].max() < 7
    assert drawn[1].min() >= 0 and drawn[1].max() < 2
    assert drawn[2].tolist() == [-1, -1, -1]
    assert sorted(drawn[3]) == [0, 1, 2]


def test_a_rows_negatives_do_not_depend_on_the_number_of_workers():
    have = [7, 2, 0, 3, 9]
    whole = draw_negatives(have, 3, 5, 11, slice(0, 5), 5)
    parts = [draw_negatives(have[part], 3, 5, 11, part, 5) for part in shares(5, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize(
    "arguments", [([], []), ([3, 0], [1, 1]), ([3], [-1.0]), ([3], [float("nan")]), ([3, 3], [1.0]), ([3], [0.0])]
)
def test_a_plan_that_cannot_be_is_refused(arguments):
    with pytest.raises(ConfigError):
        Plan(*arguments, num_steps=1, batch_size=1, seed=0)


def test_a_stratified_plan_refuses_weights_that_have_no_effect():
    with pytest.raises(ConfigError, match="no effect"):
        Plan([3, 3], [0.9, 0.1], 1, 2, 0, "stratified")


def test_folds_split_every_task_and_a_plan_keeps_to_its_part():
    sizes, count = [10, 23], 3
    for task, size in enumerate(sizes):
        numbers = fold_numbers(size, 5, task, count)
        assert np.bincount(numbers, minlength=count).tolist() == [
            len(range(size * (f + 1) // count)) - size * f // count for f in range(count)
        ]
    for number in range(count):
        for rest in (False, True):
            plan = Plan(sizes, None, 40, 8, 5, "stratified", Fold(number, count, rest))
            drawn = {(t, int(r)) for s in range(40) for t, rows in plan.step(s) for r in rows}
            wanted = {
                (t, r)
                for t, size in enumerate(sizes)
                for r in range(size)
                if (fold_numbers(size, 5, t, count)[r] == number) != rest
            }
            assert drawn == wanted


def test_a_task_with_fewer_rows_than_folds_is_refused():
    with pytest.raises(ConfigError, match=r"3 rows cannot be split into 5 folds\. Set optimize\.folds lower"):
        Plan([3, 50], None, 1, 4, 0, "stratified", Fold(0, 5))
