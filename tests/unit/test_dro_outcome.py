"""What each measure does with tasks of known kind: solved, learnable with effort, and noise.

A two-layer query encoder learns four synthetic retrieval tasks. A reference is trained with uniform weights, then a
proxy of the same size with the task weights under test, as in stages 0 and 1. The passage of a query x is
    solved: x itself (solved from the start)      easy: x with its coordinates in another order
    hard: a non-linear map of x                   noise: drawn without looking at x
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tdro_ray.dro.measures import signal
from tdro_ray.dro.weights import TaskWeights, row_weights
from tdro_ray.recipe import load_recipe

TASKS = ("solved", "easy", "hard", "noise")
SOLVED, EASY, HARD, NOISE = range(4)
UNIFORM = 0.25
DIM, NEGATIVES, ROWS, PER_TASK, TAU = 16, 7, 2000, 16, 0.05
# Difference of task means, unclipped, relative to the smoothed reference loss.
MENDED = {"clip_at": "none", "normalise": True, "smooth": 1.0}
REFERENCE_STEPS, PROXY_STEPS = 600, 150
# Queries (N, D), candidates with the positive first (N, 1 + negatives, D), tasks (N,).
Rows = tuple[Tensor, Tensor, Tensor]


class Encoder(nn.Module):
    """Encodes a query as itself plus a learned correction, so that `solved` needs no training."""

    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Embedding(len(TASKS), 8)
        self.correction = nn.Sequential(
            nn.Linear(DIM + 8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, DIM)
        )

    def losses(self, rows: Rows) -> Tensor:
        query_ND, passage_NPD, task_N = rows
        query_ND = query_ND + self.correction(torch.cat([query_ND, self.task(task_N)], dim=1))
        scores_NP = torch.einsum("nd,npd->np", nn.functional.normalize(query_ND, dim=1), passage_NPD) / TAU
        return nn.functional.cross_entropy(scores_NP, torch.zeros(len(task_N), dtype=torch.long), reduction="none")


def make_tasks(seed: int) -> tuple[Callable[[], Rows], Callable[[], Rows]]:
    """Return two functions that draw one stratified batch each: of the training rows and of held-out rows."""
    random = torch.Generator().manual_seed(seed)
    wide, out = (torch.randn(DIM, DIM, generator=random) / DIM**0.5 * 2 for _ in range(2))
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.flip(1),
        lambda x: torch.tanh(x @ wide) @ out,
        lambda x: torch.randn(x.shape, generator=random),
    ]
    queries = [torch.randn(2 * ROWS, DIM, generator=random) for _ in kinds]
    passages = [
        nn.functional.normalize(kind(q) + 0.1 * torch.randn(q.shape, generator=random), dim=1)
        for kind, q in zip(kinds, queries, strict=True)
    ]

    def draw(first: int) -> Rows:
        rows = [first + torch.randint(0, ROWS, (PER_TASK, 1 + NEGATIVES), generator=random) for _ in kinds]
        query_ND = torch.cat([q[r[:, 0]] for q, r in zip(queries, rows, strict=True)])
        passage_NPD = torch.cat([p[r] for p, r in zip(passages, rows, strict=True)])
        return query_ND, passage_NPD, torch.arange(len(kinds)).repeat_interleave(PER_TASK)

    return lambda: draw(0), lambda: draw(ROWS)


def train(draw: Callable[[], Rows], steps: int, seed: int, weigh: Callable[[Encoder, Rows, Tensor], Tensor]) -> Encoder:
    """Train an encoder; `weigh` gives the weight of each row from the rows and their losses."""
    torch.manual_seed(seed)
    model = Encoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = draw()
        loss_N = model.losses(rows)
        (weigh(model, rows, loss_N.detach()) * loss_N).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def learned_alpha(measure: str, held_out: bool = False, **options: object) -> Tensor:
    """Return alpha (G,) after a proxy run, mean of two seeds; `held_out` takes the signal from rows no model trains on."""
    return torch.stack([one_proxy(seed, measure, held_out, options) for seed in range(2)]).mean(0)


def one_proxy(seed: int, measure: str, held_out: bool, options: dict[str, object]) -> Tensor:
    reference, weights = reference_of(seed), TaskWeights(len(TASKS), eta=0.05)
    draw_train, draw_held = make_tasks(seed)

    def weigh(proxy: Encoder, rows: Rows, loss_N: Tensor) -> Tensor:
        with torch.no_grad():
            judged = draw_held() if held_out else rows
            proxy_loss_N = proxy.losses(judged) if held_out else loss_N
            weights.update(signal(measure, proxy_loss_N, reference.losses(judged), judged[2], len(TASKS), **options))
        return row_weights(weights.alpha_G, rows[2]).float()

    train(draw_train, PROXY_STEPS, seed + 10, weigh)
    return weights.alpha_G


@cache
def reference_of(seed: int) -> Encoder:
    draw_train, _ = make_tasks(seed)
    return train(draw_train, REFERENCE_STEPS, seed, lambda _, rows, loss_N: torch.full_like(loss_N, 1 / len(loss_N)))


def test_our_recipes_use_the_mended_measure_on_held_out_rows() -> None:
    settings = load_recipe("real").optimize
    assert (settings.measure, settings.measure_options, settings.rows) == ("excess", MENDED, "heldout")


def test_the_mended_measure_gives_weight_to_what_can_still_be_learned() -> None:
    alpha = learned_alpha("excess", held_out=True, **MENDED)
    assert min(alpha[EASY], alpha[HARD]) > 1.2 * UNIFORM
    assert max(alpha[SOLVED], alpha[NOISE]) < 0.6 * UNIFORM


def test_smoothed_log_ratio_agrees_with_the_mended_measure() -> None:
    alpha = learned_alpha("log_ratio", held_out=True, smooth=1.0)
    assert min(alpha[EASY], alpha[HARD]) > 1.2 * UNIFORM
    assert max(alpha[SOLVED], alpha[NOISE]) < 0.6 * UNIFORM


def test_a_reference_scored_on_its_own_training_rows_lets_noise_back_in() -> None:
    """The reference has memorised some of the noise, which looks like a task on which the proxy lags behind."""
    own_rows = learned_alpha("excess", held_out=False, **MENDED)
    held_out = learned_alpha("excess", held_out=True, **MENDED)
    assert own_rows[NOISE] > 1.5 * held_out[NOISE]
    assert own_rows[SOLVED] < 0.6 * UNIFORM


def test_the_published_ratio_gives_most_weight_to_the_solved_task() -> None:
    alpha = learned_alpha("ratio")
    assert alpha.argmax() == SOLVED and alpha[SOLVED] > 1.5 * UNIFORM
    assert alpha[NOISE] < 0.5 * UNIFORM


def test_the_official_measure_takes_weight_from_the_solved_task_and_gives_it_to_noise_as_well_as_to_hard() -> None:
    alpha = learned_alpha("official")
    assert alpha[SOLVED] < 0.5 * UNIFORM
    assert alpha[NOISE] > UNIFORM and alpha[HARD] > UNIFORM


@pytest.mark.parametrize("measure", ["excess", "plain"])
def test_row_clipped_excess_and_plain_loss_give_most_weight_to_noise(measure: str) -> None:
    assert learned_alpha(measure)[NOISE] > 2 * UNIFORM
