"""Measures: what a batch says about each task, as one signal per task. Pure torch; knows nothing of Ray or config.

Axes: N rows of a global batch, G tasks. Losses are InfoNCE in nats (never negative). Every measure is

    (proxy_loss_N, reference_loss_N, task_N, num_tasks, **options) -> signal_G   (float64)

with signal 0 for a task that has no row in the batch. A larger signal means more weight. Sums run in float64, so the
result does not depend on how rows were gathered from workers. A new measure is one function and one line in `MEASURES`.

Sources: tDRO, Ma et al., AAAI 2025, arXiv 2408.10613 (`ratio`) and its released code (`official`); DoReMi, Xie et
al., NeurIPS 2023, arXiv 2305.10429 (`excess`); Group DRO, Sagawa et al., ICLR 2020, arXiv 1911.08731 (`plain`,
size adjustment).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tdro_ray.errors import ConfigError, nearest


def task_sums(value_N: Tensor, task_N: Tensor, num_tasks: int) -> Tensor:
    """Return the sum of `value_N` over each task's rows, float64 (G,)."""
    return value_N.new_zeros(num_tasks, dtype=torch.float64).index_add(0, task_N.long(), value_N.double())


def task_means(value_N: Tensor, task_N: Tensor, num_tasks: int) -> Tensor:
    """Return the mean of `value_N` over each task's rows, float64 (G,); 0 for a task without rows."""
    return task_sums(value_N, task_N, num_tasks) / task_counts(task_N, num_tasks).clamp(min=1)


def task_counts(task_N: Tensor, num_tasks: int) -> Tensor:
    """Return how many rows each task has, int64 (G,). `task_counts(...) > 0` is `present_G` of `TaskWeights.update`."""
    return torch.bincount(task_N.long(), minlength=num_tasks)


def ratio(
    proxy_loss_N: Tensor,
    reference_loss_N: Tensor,
    task_N: Tensor,
    num_tasks: int,
    *,
    floor: float = 1e-8,
    smooth: float = 0.0,
    smooth_both: bool = False,
    over: Literal["means", "rows"] = "means",
    row_clip: float | None = None,
) -> Tensor:
    """Return the relative loss of the proxy (G,), the measure of the tDRO paper.

        over="means":  M_g = mean_i L_proxy,i / max(mean_i L_ref,i + s, floor)                 (the paper, s = 0)
        over="rows":   M_g = mean_i min(row_clip, L_proxy,i / max(L_ref,i + s, floor))
        smooth_both:   L_proxy + s above as well

    `floor` (nats) only guards the division. `smooth` is s in units of the batch's mean reference loss, so that one
    setting fits any temperature: s = smooth * mean_N L_ref. With s = 0 the ratio is largest where the reference loss
    is nearest to 0, solved tasks first. With s in the denominator only, a task's signal falls to 0 as it is solved,
    but once proxy and reference agree it is L / (L + s), which grows with the loss: noise wins in the end, as under
    `plain`. With s on both sides, agreement is 1 whatever the loss. A mean of row ratios is ruled by the rows with
    the smallest denominator; `row_clip` bounds what one row can add.
    """
    if row_clip is not None and over != "rows":
        raise ConfigError(
            "Option row_clip of measure 'ratio' has an effect only with over='rows'. Set that, or leave row_clip out."
        )
    s = smooth * reference_loss_N.double().mean()
    proxy_N = proxy_loss_N.double() + (s if smooth_both else 0.0)
    if over == "means":
        reference_G = task_means(reference_loss_N, task_N, num_tasks)
        return task_means(proxy_N, task_N, num_tasks) / (reference_G + s).clamp(min=floor)
    ratio_N = proxy_N / (reference_loss_N.double() + s).clamp(min=floor)
    return task_means(ratio_N.clamp(max=row_clip) if row_clip is not None else ratio_N, task_N, num_tasks)


def official(
    proxy_loss_N: Tensor,
    reference_loss_N: Tensor,
    task_N: Tensor,
    num_tasks: int,
    *,
    p_norm: float = 1,
    cutoff: float = 1e-4,
    group_rows: int = 512,
    interleaved: bool = False,
) -> Tensor:
    """Return what the authors' released code computes (G,); needed to reproduce its numbers.

    Within each group of `group_rows` rows (a micro-batch of the released script, which accumulates four of 512):

        r_i = L_ref,i / ||L_ref||_p ;  r_i < cutoff is replaced by 1 ;  M_g = mean_i max(0, L_proxy,i / r_i)

    and the groups' signals are averaged. Three consequences. (1) Row ratios are scaled by about N and a row whose
    reference loss is below cutoff * N times the group's mean counts N times less: solved rows drop out, nearly solved
    rows (just above the cut-off) count most of all. (2) The scale changes with the group's size, which does not
    matter once the update clips the signal's norm. (3) A task absent from a group has signal 0 *there*, and the
    average still divides by all groups: a task seen in k of K groups gets k/K of its mean signal, so rare tasks
    lose weight against frequent ones. Batches with every task in every group avoid this.

    Groups are consecutive rows, as released; the last may be shorter and counts as much as the others. A batch laid
    out task by task would put few tasks in each group: `interleaved` deals the rows out in turn instead (row i to
    group i mod K), which gives each group its share of every task.
    """
    num_rows = len(task_N)
    num_groups = max(1, -(-num_rows // group_rows))
    signal_G = torch.zeros(num_tasks, dtype=torch.float64, device=proxy_loss_N.device)
    for k in range(num_groups):
        rows = slice(k, None, num_groups) if interleaved else slice(k * group_rows, (k + 1) * group_rows)
        signal_G += _official_group(proxy_loss_N[rows], reference_loss_N[rows], task_N[rows], num_tasks, p_norm, cutoff)
    return signal_G / num_groups


def _official_group(
    proxy_loss_N: Tensor, reference_loss_N: Tensor, task_N: Tensor, num_tasks: int, p_norm: float, cutoff: float
) -> Tensor:
    share_N = torch.nn.functional.normalize(reference_loss_N.double(), p=p_norm, dim=0)
    share_N = torch.where(share_N < cutoff, 1.0, share_N)
    return task_means((proxy_loss_N.double() / share_N).clamp(min=0), task_N, num_tasks)


def excess(
    proxy_loss_N: Tensor,
    reference_loss_N: Tensor,
    task_N: Tensor,
    num_tasks: int,
    *,
    clip_at: Literal["row", "task", "none"] = "row",
    normalise: bool = False,
    smooth: float = 1.0,
) -> Tensor:
    """Return how much worse the proxy is than the reference (G,), in nats; the measure of DoReMi.

        clip_at="row":   E_g = mean_i max(0, L_proxy,i - L_ref,i)        (DoReMi, Algorithm 1; released tDRO code)
        clip_at="task":  E_g = max(0, mean_i L_proxy,i - mean_i L_ref,i)
        clip_at="none":  E_g = mean_i L_proxy,i - mean_i L_ref,i         (negative where the proxy is ahead)
        normalise:       M_g = E_g / (mean_i L_ref,i + s),  s = smooth * mean_N L_ref

    Clipping row by row turns disagreement into signal: on a task that nobody can learn, two models differ by chance
    on every row, and the positive half of those differences does not average out. Clipping the task's mean leaves
    that bias only for tasks with few rows in a batch; without a clip it is gone.

    `normalise` makes a nat count more where the reference has little loss left, which takes weight from tasks that
    are noisy or far from learned; `smooth` bounds that, and s -> infinity is the plain difference up to scale. With
    clip_at="none" it is (L_proxy + s) / (L_ref + s) - 1, the ratio smoothed on both sides without its constant 1,
    which is noise to the update: clipping a signal to 2-norm 1 shrinks what differs together with what is common.
    """
    if clip_at == "row":
        excess_G = task_means((proxy_loss_N.double() - reference_loss_N.double()).clamp(min=0), task_N, num_tasks)
    else:
        excess_G = task_means(proxy_loss_N.double() - reference_loss_N.double(), task_N, num_tasks)
        excess_G = excess_G.clamp(min=0) if clip_at == "task" else excess_G
    if not normalise:
        return excess_G
    s = smooth * reference_loss_N.double().mean()
    return excess_G / (task_means(reference_loss_N, task_N, num_tasks) + s).clamp(min=1e-8)


def plain(proxy_loss_N: Tensor, reference_loss_N: Tensor, task_N: Tensor, num_tasks: int) -> Tensor:
    """Return the proxy's mean loss per task (G,), in nats: M_g = mean_i L_proxy,i. Group DRO without its adjustment.

    The reference is not used. Tasks that cannot be learned keep the highest loss and take the weight.
    """
    return task_means(proxy_loss_N, task_N, num_tasks)


def log_ratio(
    proxy_loss_N: Tensor,
    reference_loss_N: Tensor,
    task_N: Tensor,
    num_tasks: int,
    *,
    floor: float = 1e-8,
    smooth: float = 0.0,
) -> Tensor:
    """Return the log of the relative loss (G,): M_g = log((mean_i L_proxy,i + s) / (mean_i L_ref,i + s)).

    Negative where the proxy beats the reference, 0 where they are equal, so solved and noise tasks agree on 0.
    `floor` (nats) guards both means; s = smooth * mean_N L_ref pulls tasks with little loss left towards 0.
    """
    s = smooth * reference_loss_N.double().mean()
    proxy_G = (task_means(proxy_loss_N, task_N, num_tasks) + s).clamp(min=floor)
    reference_G = (task_means(reference_loss_N, task_N, num_tasks) + s).clamp(min=floor)
    return torch.log(proxy_G / reference_G)


MEASURES: dict[str, Callable[..., Tensor]] = {
    "ratio": ratio,
    "official": official,
    "excess": excess,
    "plain": plain,
    "log_ratio": log_ratio,
}


def size_adjustment(sizes_G: Tensor, c: float) -> Tensor:
    """Return Group DRO's generalisation adjustment C / sqrt(n_g) (G,), in nats, for tasks of `sizes_G` training rows.

    Small tasks over-fit more than their training loss shows (Sagawa et al. 2020, section 3.3), so it adds to theirs.
    """
    return c / sizes_G.double().clamp(min=1).sqrt()


def signal(
    name: str,
    proxy_loss_N: Tensor,
    reference_loss_N: Tensor,
    task_N: Tensor,
    num_tasks: int,
    *,
    group_rows: int = 512,
    sizes_G: Tensor | None = None,
    size_c: float = 0.0,
    **options: Any,
) -> Tensor:
    """Return the signal of the measure called `name` (G,), with Group DRO's size adjustment where `size_c` > 0.

    `group_rows` reaches `official` only: the other measures are means over the whole batch. The adjustment is added
    to tasks that have rows, so an absent task keeps signal 0. Raises ConfigError for an unknown measure or option.
    """
    measure = MEASURES.get(name)
    if measure is None:
        raise ConfigError(f"No measure {name!r}.{nearest(name, MEASURES)}")
    valid = measure_options(name)
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"Measure {name!r} has no option {option!r}.{nearest(option, valid) if valid else ' It has none.'}"
            )
    if "group_rows" in valid:
        options["group_rows"] = group_rows
    signal_G = measure(proxy_loss_N, reference_loss_N, task_N, num_tasks, **options)
    if size_c:
        if sizes_G is None:
            raise ConfigError(
                f"size_c={size_c} needs sizes_G, the number of training rows of each of the {num_tasks} tasks."
            )
        present_G = task_counts(task_N, num_tasks) > 0
        signal_G = signal_G + present_G * size_adjustment(sizes_G.to(signal_G.device), size_c)
    return signal_G


def measure_options(name: str) -> tuple[str, ...]:
    """Return the names of the options of a measure, in the order of its signature."""
    parameters = inspect.signature(MEASURES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
