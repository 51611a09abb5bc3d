"""Negatives by vectors: the margins by hand, and equality with comparing all with all."""

import numpy as np
import pytest

from tdro_ray.config import MineSettings, Recipe
from tdro_ray.data.dense import dense_hits, within_margins


def unit(degrees: list[float]) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def settings(**changes: object) -> MineSettings:
    return MineSettings.model_validate({"method": "encoder", "model": "m", "first_rank": 1, "last_rank": 9, **changes})


@pytest.mark.parametrize(
    ("margins", "left"),
    [
        ({"margin_relative": None}, [1, 2, 3, 4]),
        ({"margin_relative": 0.95}, [3, 4]),  # positive 0.985: at most 0.936
        ({"margin_relative": None, "margin_absolute": 0.2}, [4]),  # at most 0.785
        ({"margin_relative": 0.95, "margin_absolute": 0.0}, [3, 4]),
        ({"margin_relative": None, "first_rank": 4, "last_rank": 4}, [3]),  # the positive is rank 3
    ],
)
def test_margins_by_hand(margins, left):
    passages = unit([10, 2, 5, 30, 60])  # to the query: 0.985 (the positive), 0.999, 0.996, 0.866, 0.5
    hits = dense_hits(unit([0]), passages, [[0]], settings(**margins))
    assert hits.passages[0].tolist() == left
    assert hits.positive_Q[0] == pytest.approx(np.cos(np.radians(10)))
    if "first_rank" not in margins:
        assert (hits.num_ranked, hits.num_filtered) == (4, 4 - len(left))


def test_a_positive_below_zero_still_has_a_margin():
    assert within_margins(np.array([-0.19, -0.22]), -0.2, None, 0.95).tolist() == [False, True]


def test_the_hits_are_those_of_comparing_all_with_all():
    rng = np.random.default_rng(0)
    q, p = rng.normal(size=(1100, 16)).astype(np.float32), rng.normal(size=(300, 16)).astype(np.float32)
    q, p = q / np.linalg.norm(q, axis=1, keepdims=True), p / np.linalg.norm(p, axis=1, keepdims=True)
    positives = [[n % 300, (n * 7) % 300] for n in range(len(q))]
    asked = settings(first_rank=2, last_rank=40, margin_relative=0.9, margin_absolute=0.05)
    hits = dense_hits(q, p, positives, asked)
    scores = q @ p.T
    for n in range(len(q)):
        best = scores[n, positives[n]].min()
        order = np.argsort(-scores[n])[1:40]
        wanted = [
            o
            for o in order
            if o not in positives[n] and scores[n, o] <= best - 0.05 and scores[n, o] <= best - 0.1 * abs(best)
        ]
        assert hits.passages[n].tolist() == wanted


@pytest.mark.parametrize(
    ("mine", "says"),
    [({"method": "encoder"}, "mine.model"), ({"model": "m"}, "no effect under bm25")],
)
def test_settings_that_do_not_fit_are_refused(mine, says):
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({"mine": mine})
